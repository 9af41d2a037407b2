"""Endpoints that hang, cut or ask to wait: every look-up ends soon, with one line that says what happened."""

import json
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fork_server
import pytest
from hub_server import HubServer

from longclip_hf.conversion import hub as hub_module
from longclip_hf.errors import ConversionError

SCRIPT = Path(__file__).parents[2] / "conversion" / "stretch.py"


@pytest.fixture
def silent() -> Iterator[str]:
    """An endpoint that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def accept() -> None:
            try:
                while True:
                    held.append(server.accept()[0])
            except OSError:
                return

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        for connection in held:
            connection.close()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub") as server:
        yield server


def stretch(source: str, env: dict[str, str], cwd: Path) -> tuple[int, str, float]:
    """Exit code, all that was printed, and seconds."""
    began = time.perf_counter()
    done = fork_server.run([sys.executable, str(SCRIPT), source, "--output", str(cwd / "long")], cwd=cwd, env=env)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + " ".join(done.stderr.split()), time.perf_counter() - began


def test_an_endpoint_that_never_answers(silent: str, hub: HubServer, tmp_path: Path) -> None:
    env = {**hub.environment(), "HF_ENDPOINT": silent, "HF_HUB_ETAG_TIMEOUT": "1"}
    code, said, seconds = stretch("user/tiny", env, tmp_path)
    assert code == 2 and f"error: user/tiny: no such folder here, and the Hub gave no such model ({silent} did" in said
    assert re.search(r"did not answer in time \(\w*Timeout; 1 s for a look-up, which HF_HUB_ETAG_TIMEOUT sets\)", said)
    assert seconds < 40, "most of which are imports"
    assert not (tmp_path / "long").exists()


def test_the_limit_of_a_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_ETAG_TIMEOUT", raising=False)
    assert hub_module._limit() == 20


# All in one process: the client reads its environment once, at import.
CHILD = """
import json, os, sys, time
from pathlib import Path
sys.path[:0] = [sys.argv[1]]
from hub_server import HubServer
del sys.path[0]
hub = HubServer(Path(sys.argv[2]) / "hub").__enter__()
os.environ.update(hub.environment())
pauses = []
time.sleep = pauses.append

from longclip_hf.conversion import checkpoint, hub as client
from longclip_hf.errors import ConversionError

said = []
client.notice = said.append
folder = Path(sys.argv[2]) / "folder"
folder.mkdir()
(folder / "config.json").write_text("{}")
hub.add_repo("user/tiny", folder)

def ask(*faults, name="user/tiny"):
    del pauses[:], said[:]
    for fault in faults:
        hub.fail_next(*fault)
    try:
        outcome = {"names": sorted(p.name for p in checkpoint.download(name, None, ["config.json"]).iterdir())}
    except ConversionError as error:
        outcome = {"error": str(error)}
    hub.heal()
    return outcome | {"pauses": list(pauses), "said": list(said)}

LOOK = ("GET", "/api/models/user/")
report = {
    "cut": ask((*LOOK, 0, 100)),
    "unknown": ask(name="user/none"),
    "forbidden": ask((*LOOK, 403, 100)),
    "wait": ask((*LOOK, 429, 1, {"Retry-After": "3"})),
}
report["long wait, cached"] = ask((*LOOK, 429, 100, {"Retry-After": "3000"}))
report["cut, cached"] = ask((*LOOK, 0, 100))
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def lookups(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    work = tmp_path_factory.mktemp("lookups")
    line = [sys.executable, "-W", "ignore", "-c", CHILD, Path(__file__).parents[1], work]
    done = fork_server.run(line, cwd=work, env={"HF_HOME": str(work / "home")})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_failures_are_one_line(lookups: dict[str, Any]) -> None:
    for name, reason in {
        "cut": r"\(the connection failed \(\w+: .*\)\.\)",
        "unknown": r"\(there is no such repository or user, .* \(404: ",
        "forbidden": r"\(the token may not do that\. .* \(403: .*Bearer hf_",
    }.items():
        assert re.search(rf"the Hub gave no such model {reason}", lookups[name]["error"]), lookups[name]
        assert "\n" not in lookups[name]["error"]


def test_a_hub_that_asks_to_wait(lookups: dict[str, Any]) -> None:
    waited = lookups["wait"]
    assert waited["names"] == ["config.json"] and waited["pauses"] == [3]
    assert waited["said"][0].startswith("the Hub asks to wait 3 s before the next request.")
    assert waited["said"][0].endswith("Trying again in 3 s.")


def test_the_cache_is_taken_and_named(lookups: dict[str, Any]) -> None:
    for name, reason in {"long wait, cached": "asks to wait 3000 s", "cut, cached": "the connection failed"}.items():
        found = lookups[name]
        assert found["names"] == ["config.json"] and found["pauses"] == []
        assert found["said"][0].startswith("user/tiny is taken from the cache, ") and reason in found["said"][0]


class Answer(Exception):
    """As the Hub's errors are: with a response."""

    def __init__(self, **headers: str) -> None:
        self.response = type("Response", (), {"headers": headers, "status_code": 429})


@pytest.mark.parametrize(
    ("value", "seconds"), [("7", 7), ("0", 0), ("", 10), ("soon", 10), ("Wed, 21 Oct 2015 07:28:00 GMT", 0)]
)
def test_retry_after(value: str, seconds: float) -> None:
    assert hub_module._retry_after(Answer(**{"Retry-After": value})) == seconds


def test_what_the_project_says_is_not_reworded() -> None:
    """Its errors are ValueErrors, as those of a client are."""

    def refuse() -> None:
        raise ConversionError("There it is, public.")

    with pytest.raises(ConversionError, match=r"^There it is, public\.$"):
        hub_module._patiently(refuse, "user/tiny")
