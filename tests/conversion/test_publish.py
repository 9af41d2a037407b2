"""Publishing: what is chosen, what is refused, and uploads to the test Hub, whole, broken off and repeated."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fork_server
import pytest
import torch
from conftest import run_python
from hub_server import HubServer
from PIL import Image
from transformers import AutoProcessor

from examples.random_clip import write_checkpoint
from longclip_hf.conversion import folder as folder_module
from longclip_hf.conversion import hub as hub_module
from longclip_hf.conversion import publish
from longclip_hf.conversion.publish import check_loads, choose_files, main, prepare, write_card
from longclip_hf.conversion.stretch import stretch
from longclip_hf.errors import ConversionError
from modeling_longclip import LongCLIPModel

Copy = Callable[[Path], Path]
Capture = pytest.CaptureFixture[str]
TESTS = Path(__file__).parents[1]
SECRET = "hf_" + "s3cretS3cret" * 3
CODE = ["compat.py", "configuration_longclip.py", "defaults.py", "modeling_longclip.py"]
FILES = sorted([
    *CODE, "config.json", "merges.txt", "model.safetensors", "preprocessor_config.json", "special_tokens_map.json",
    "tokenizer.json", "tokenizer_config.json", "vocab.json",
])  # fmt: skip


@pytest.fixture
def folder(longclip_folder: Path, copy_of: Copy) -> Path:
    return copy_of(longclip_folder)


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)


def refusal(args: list[Any], capsys: Capture) -> str:
    assert main([str(arg) for arg in args]) == 2
    return " ".join(capsys.readouterr().err.split())


class TestFiles:
    def test_those_of_a_stretched_folder(self, folder: Path) -> None:
        assert choose_files(folder, has_image_tower=True) == (FILES, [])

    def test_everything_else_stays_and_is_named(self, folder: Path) -> None:
        left = [
            ".env", "all_results.json", "debug.py", "id_rsa", "model.bin", "model.ckpt", "notes.txt", "optimizer.pt",
            "pytorch_model.bin", "rng_state.pth", "trainer_state.json", "training_args.bin",
        ]  # fmt: skip
        for name in left:
            (folder / name).write_text("{}")
        for name in ("checkpoint-3", ".git"):
            shutil.copytree(folder, folder.parent / "other", dirs_exist_ok=True)
            shutil.move(folder.parent / "other", folder / name)
        (folder / "LICENSE").write_text("MIT")
        files, left_out = choose_files(folder, has_image_tower=True)
        assert files == sorted([*FILES, "LICENSE"])
        assert left_out == sorted([*left, "checkpoint-3/", ".git/"])

    def test_shards_are_those_of_the_index(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
        for name in [*shards, "model-00003-of-00003.safetensors"]:
            (folder / name).write_bytes(b"")
        index = {"weight_map": {"a": shards[0], "b": shards[1], "c": shards[0]}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        files, left_out = choose_files(folder, has_image_tower=True)
        assert set(files) - set(FILES) == {*shards, "model.safetensors.index.json"}
        assert left_out == ["model-00003-of-00003.safetensors"]
        (folder / shards[1]).unlink()
        with pytest.raises(ConversionError, match=f"lacks {shards[1]}"):
            choose_files(folder, has_image_tower=True)

    @pytest.mark.parametrize("name", ["model.safetensors", "vocab.json", "tokenizer.json", "defaults.py"])
    def test_what_a_model_needs(self, name: str, folder: Path) -> None:
        (folder / "pytorch_model.bin").write_bytes(b"0")
        (folder / name).unlink()
        with pytest.raises(ConversionError, match=f"lacks {name}. Weights are published as safetensors"):
            choose_files(folder, has_image_tower=True)


class TestPrepare:
    def test_sends_and_writes_nothing(self, folder: Path) -> None:
        before = {file: file.read_bytes() for file in folder.iterdir()}
        publication = prepare(folder, "user/long", license="mit")
        assert publication.names() == sorted([*FILES, "README.md"])
        assert publication.contents()["README.md"] == publication.card.encode()
        assert {file: file.read_bytes() for file in folder.iterdir()} == before
        write_card(publication)
        assert (folder / "README.md").read_text() == publication.card
        assert {file.name for file in folder.iterdir()} == {*FILES, "README.md"}
        assert prepare(folder, "user/long").card == publication.card

    @pytest.mark.parametrize("place", ["config.json", "merges.txt", "the command", "vocab.json"])
    def test_a_token_is_not_published(self, place: str, folder: Path, capsys: Capture) -> None:
        secret = "hf_abcdefghijklmnopqrstuvwxyz01234567"
        args = [folder, "user/long"]
        if place == "the command":
            args += ["--made-with", f"HF_TOKEN={secret} python training/train.py"]
        elif place == "config.json":
            content = json.loads((folder / place).read_text())
            (folder / place).write_text(json.dumps(content | {"token": secret}))
        else:
            (folder / place).write_text(f'{(folder / place).read_text()}\n"{secret}"\n')
        said = refusal(args, capsys)
        named = "README.md" if place == "the command" else place
        assert said == f"error: {named} would hold an access token (hf_...). Take it out, and revoke it on the Hub."

    def test_nor_is_the_one_in_use(self, folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", "short-secret")
        said = refusal([folder, "user/long", "--made-with", "HF_TOKEN=short-secret python it"], capsys)
        assert "README.md would hold an access token" in said and "short-secret" not in said

    @pytest.mark.parametrize("trained", [True, False])
    def test_another_card_is_not_lost(self, trained: bool, folder: Path, capsys: Capture) -> None:
        (folder / "README.md").write_text("# Mine\n")
        if trained:
            (folder / "training_args.bin").write_bytes(b"0")
        said = refusal([folder, "user/long"], capsys)
        assert "README.md is not of this project, and would be replaced." in said and "--overwrite" in said
        assert prepare(folder, "user/long", overwrite=True).unstated[0] == "the licence (--license)"

    @pytest.mark.parametrize(
        ("repo", "options", "message"),
        [
            ("long", [], "long names no user or organisation: write USER/long."),
            ("user/lo ng", [], "user/lo ng is no Hub id"),
            ("user/a/b", [], "user/a/b is no Hub id"),
            (
                "user/long",
                ["--results", "nowhere.json"],
                "nowhere.json could not be read as results: [Errno 2] No such file",
            ),
            ("user/long", ["--results-model", "it"], "--results-model is for --results FILE, which is missing."),
        ],
    )
    def test_options_that_do_not_fit(
        self, repo: str, options: list[str], message: str, longclip_folder: Path, capsys: Capture
    ) -> None:
        assert message in refusal([longclip_folder, repo, *options], capsys)

    def test_folders_that_are_none(self, clip_folder: Path, tmp_path: Path, capsys: Capture) -> None:
        for folder in (clip_folder, tmp_path, tmp_path / "nowhere"):
            assert f"{folder} holds no Long-CLIP" in refusal([folder, "user/long"], capsys)

    def test_help(self, capsys: Capture) -> None:
        with pytest.raises(SystemExit) as caught:
            main(["--help"])
        assert caught.value.code == 0
        shown = capsys.readouterr().out
        assert all(word in shown for word in ("longclip-publish", "--yes", "--private", "--tag", "fresh process"))


def test_a_dry_run_shows_all_and_sends_nothing(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "training_args.bin").write_bytes(b"0")
    checked: list[Any] = []
    monkeypatch.setattr(publish, "check_loads", checked.append)
    monkeypatch.setattr(hub_module, "upload", lambda *args, **kwargs: pytest.fail("nothing is sent"))
    folder = folder.rename(folder.with_name("[red]tuned"))  # a name, not markup
    before = (folder / "README.md").read_text()
    assert main([str(folder), "user/tuned", "--license", "mit"]) == 0
    shown = capsys.readouterr().out
    assert "[red]tuned" in shown
    weights = f"{(folder / 'model.safetensors').stat().st_size:,}"
    assert any("model.safetensors" in line and weights in line and "LFS" in line for line in shown.splitlines())
    assert any("config.json" in line and "regular" in line for line in shown.splitlines())
    assert "Left out: training_args.bin." in shown and "license: mit" in shown and "Fine-tuning changed" in shown
    assert "The card does not state the base model (--base-model), the command that made it (--made-with), a" in shown
    assert shown.endswith("Nothing was sent. Send it to user/tuned with --yes.\n")
    assert [publication.folder for publication in checked] == [folder]
    assert (folder / "README.md").read_text() == before


def test_an_interrupt(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(publication: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(publish, "check_loads", interrupted)
    assert main([str(folder), "user/long", "--yes"]) == 130
    assert "Interrupted; the same command goes on" in capsys.readouterr().err


class TestFreshProcess:
    @pytest.fixture
    def own_code(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
        """Adds to `modeling_longclip.py`, in the folder and in the project."""

        def add(code: str) -> None:
            with (folder / "modeling_longclip.py").open("a") as file:
                file.write(code)
            changed = shutil.copytree(folder, tmp_path / "project")
            monkeypatch.setattr(folder_module, "CODE_FILES", tuple(changed / name for name in CODE))

        return add

    def test_the_code_has_no_secret_and_its_error_is_shown(
        self, own_code: Callable[[str], None], folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        secrets = ("HF_TOKEN", "OPENAI_API_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "WANDB_API_KEY", "NETRC", "MY_PW")
        for name in secrets:
            monkeypatch.setenv(name, SECRET)
        home = Path.home()
        own_code(
            f"\nimport os\nfound = [name for name in {secrets} if name in os.environ]\n"
            f"found += ['home'] * (os.path.expanduser('~') == {str(home)!r})\n"
            "raise RuntimeError(f'found {found}')\n"
        )
        said = refusal([folder, "user/long"], capsys)
        assert "does not load in a fresh process, so nothing is sent: RuntimeError: found []" in said

    def test_features_must_be_equal_both_ways(self, own_code: Callable[[str], None], folder: Path) -> None:
        own_code(
            "\n_forward = LongCLIPModel.forward\n"
            "def forward(self, *args, **kwargs):\n"
            "    output = _forward(self, *args, **kwargs)\n"
            "    output.logits_per_image = output.logits_per_image + 0.01\n"
            "    return output\n"
            "LongCLIPModel.forward = forward\n"
        )
        with pytest.raises(ConversionError, match="AssertionError: Tensor-likes are not close!"):
            check_loads(prepare(folder, "user/long"))

    def test_the_tokenizer_must_cut_where_the_model_ends(self, folder: Path) -> None:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 77}))
        with pytest.raises(ConversionError, match="the tokenizer cuts texts at 77 tokens, and the model reads 248"):
            check_loads(prepare(folder, "user/long"))


class TestCodeOfOthers:
    @pytest.mark.parametrize("name", ["modeling_longclip.py", "defaults.py"])
    def test_is_neither_run_nor_sent(self, name: str, folder: Path, tmp_path: Path, capsys: Capture) -> None:
        with (folder / name).open("a") as code:
            code.write(f"\nopen({str(tmp_path / 'ran')!r}, 'w')\n")
        said = refusal([folder, "user/long"], capsys)
        assert f"has code that is not this version's, which is neither run nor sent: {name}." in said
        assert "--update-code" in said and not (tmp_path / "ran").exists()

    def test_of_an_earlier_version_is_replaced_where_that_is_asked(self, folder: Path, tmp_path: Path) -> None:
        own = (folder / "compat.py").read_bytes()
        (folder / "compat.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        (folder / "defaults.py").unlink()
        (folder / "longclip_v1.py").write_text("old = True\n")
        publication = prepare(folder, "user/long", update_code=True)
        assert publication.names() == sorted([*FILES, "README.md"]) and publication.left_out == ["longclip_v1.py"]
        content = publication.contents()["compat.py"]
        assert isinstance(content, Path) and content.read_bytes() == own
        check_loads(publication)
        assert not (tmp_path / "ran").exists()
        write_card(publication)
        assert (folder / "compat.py").read_bytes() == own and (folder / "defaults.py").is_file()
        assert prepare(folder, "user/long").names() == publication.names()

    @pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
    def test_is_not_named(self, name: str, folder: Path, capsys: Capture) -> None:
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(settings | {"deep": {"auto_map": {"AutoModel": "a/b--c.D"}}}))
        said = refusal([folder, "user/long"], capsys)
        assert f"{folder / name} names the code of others: deep.auto_map." in said


class TestLinks:
    @pytest.mark.parametrize(
        "name", ["LICENSE", "README.md", "vocab.json", "model.safetensors", "modeling_longclip.py"]
    )
    def test_nothing_outside_the_folder_is_sent(
        self, name: str, folder: Path, tmp_path: Path, capsys: Capture
    ) -> None:
        target = tmp_path / "private"
        target.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"mine")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)
        assert f"{folder / name} leads out of its folder, to {target}." in refusal([folder, "user/long"], capsys)

    def test_nor_by_an_index(self, folder: Path, tmp_path: Path, capsys: Capture) -> None:
        (folder / "model.safetensors").rename(tmp_path / "other.safetensors")
        for shard in ("../other.safetensors", str(tmp_path / "other.safetensors")):
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
            assert "leads out of its folder" in refusal([folder, "user/long"], capsys)

    def test_a_waiting_link_is_not_written_through(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "bashrc").write_text("mine")
        for name in (".README.md.incomplete", "README.md.incomplete"):
            (folder / name).symlink_to(tmp_path / "bashrc")
        write_card(prepare(folder, "user/long"))
        assert (tmp_path / "bashrc").read_text() == "mine" and not (folder / "README.md").is_symlink()


# Uploads, in a process whose Hub is the test's: the client reads its address once, at import. The server runs in it
# too, so that faults are injected between two uploads.
CHILD = """
import json, os, sys, time
from pathlib import Path
sys.path[:0] = [sys.argv[1]]
from hub_server import HubServer
del sys.path[0]  # its folders are called as the packages are

secret, folder = sys.argv[3], Path(sys.argv[4])
hub = HubServer(Path(sys.argv[2]), token=secret, lfs_threshold=9_500).__enter__()
os.environ.update(hub.environment())
pauses = []
time.sleep = pauses.append  # the client's own pauses between two attempts too

from longclip_hf.conversion.hub import upload
from longclip_hf.conversion.publish import prepare
from longclip_hf.errors import ConversionError

def attempt(name, **options):
    "Uploads to user/NAME; what the Hub had to do for it."
    asked, said, commits = len(hub.requests), [], []
    del pauses[:]
    try:
        publication = prepare(folder, f"user/{name}")
        done = upload(publication.repo_id, publication.contents(), say=said.append, **options)
        outcome = {"commit": done.commit, "is_new": done.is_new, "removed": done.removed, "url": done.url}
    except ConversionError as error:
        outcome = {"error": str(error)}
    requests = hub.requests[asked:]
    hub.heal()
    if f"user/{name}" in hub._repos:
        commits = hub.commits(f"user/{name}")
    puts = [path.split("/")[-1] for method, path in requests if method == "PUT"]
    return outcome | {"said": said, "commits": commits, "puts": puts, "requests": requests, "pauses": list(pauses)}

def fault(name, method, path, status, times=1):
    "With a new file for git-LFS, so that there is something to send."
    (folder / "LICENSE").write_text(name * 2_000)
    hub.fail_next(method, path, status, times)
    return attempt(name)

import hashlib
weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
report = {"weights": weights}

# The weights never arrive; the same command then sends them, and only them.
hub.fail_next("PUT", weights, 0, times=100)
report["cut"] = attempt("cut")
report["repeated"] = attempt("cut")
report["unchanged"] = attempt("cut")

report["lfs 503"] = fault("lfs503", "PUT", "/lfs/", 503, times=2)
report["commit 503"] = fault("commit503", "POST", "/commit/", 503, times=2)
report["commit 500"] = fault("commit500", "POST", "/commit/", 500, times=100)
report["commit cut"] = fault("commit-cut", "POST", "/commit/", 0)
report["create cut"] = fault("create-cut", "POST", "/repos/create", 0, times=100)
for status in (401, 403, 404, 409):
    if status != 409:  # with which the Hub says that the repository is there
        report[f"create {status}"] = fault(f"create{status}", "POST", "/repos/create", status)
    report[f"commit {status}"] = fault(f"commit{status}", "POST", "/commit/", status)
report["lfs 403"] = fault("lfs403", "PUT", "/lfs/", 403)

report["revision"] = attempt("revision", revision="v2/try", private=True)
report["revision again"] = attempt("revision", revision="v2/try", tag="v2")
report["branches"] = hub._repos["user/revision"].branches
report["tags"] = hub._repos["user/revision"].tags
report["private"] = hub._repos["user/revision"].private
report["tag taken"] = attempt("revision", tag="v2")
report["not private"] = attempt("cut", private=True)

stale = Path(sys.argv[2]) / "stale"
stale.mkdir()
for name in ("model-00001-of-00001.safetensors", "model.safetensors.index.json", "photo.jpg"):
    (stale / name).write_text("old")
hub.add_repo("user/stale", stale)
report["stale"] = attempt("stale")
report["stale files"] = sorted(hub.files("user/stale"))

other = Path(sys.argv[2]) / "other"
other.mkdir()
(other / "README.md").write_text("---\\nlicense: mit\\n---\\n# Somebody else's\\n")
hub.add_repo("user/other", other)
report["other card"] = attempt("other")
report["other card kept"] = hub.files("user/other")["README.md"].read_text()
report["other card, overwritten"] = attempt("other", overwrite=True)

hub.fail_next("POST", "/commit/", 429, headers={"Retry-After": "7"})
(folder / "LICENSE").write_text("429")
report["commit 429"] = attempt("limited")
hub.fail_next("POST", "/commit/", 429, headers={"Retry-After": "3600"})
(folder / "LICENSE").write_text("429 again")
report["commit 429 long"] = attempt("limited")

os.environ["HF_TOKEN"] = "hf_" + "wrong" * 7
report["wrong token"] = attempt("wrong")
del os.environ["HF_TOKEN"]
report["no token"] = attempt("none")
report["files"] = {name: path.read_bytes().hex() for name, path in hub.files("user/cut").items()}
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def uploads(longclip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What happened to each upload, by name; `folder` is what the first ones sent, `shown` all that was printed."""
    work = tmp_path_factory.mktemp("uploads")
    shutil.copytree(longclip_folder, work / "folder")
    line = [sys.executable, "-W", "ignore", "-c", CHILD, TESTS, work / "hub", SECRET, work / "folder"]
    done = fork_server.run(line, cwd=work, env={"HF_HOME": str(work / "home")})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"shown": done.stdout + done.stderr}


class TestUpload:
    def test_a_cut_connection_leaves_no_commit_and_is_repeated(self, uploads: dict[str, Any]) -> None:
        cut, repeated, weights = uploads["cut"], uploads["repeated"], uploads["weights"]
        assert "user/cut was not published: the connection failed (" in cut["error"]
        assert cut["commits"] == repeated["commits"][:1], "the repository, and nothing in it"
        sent = set(cut["puts"]) - {weights}
        assert len(sent) == 3 and cut["puts"].count(weights) > 2, "tokenizer.json, vocab.json and a file of code"
        assert repeated["puts"] == [weights], "what is there is not sent again"
        assert repeated["commits"][1:] == [repeated["commit"]] and repeated["is_new"]

    def test_all_files_are_there_in_one_commit(self, uploads: dict[str, Any], longclip_folder: Path) -> None:
        published = {name: bytes.fromhex(content) for name, content in uploads["files"].items()}
        assert published.keys() == {*FILES, "README.md", ".gitattributes"}
        assert all(published[name] == (longclip_folder / name).read_bytes() for name in FILES)
        assert b'AutoModel.from_pretrained("user/cut", trust_remote_code=True)' in published["README.md"]

    def test_nothing_new_is_no_commit(self, uploads: dict[str, Any]) -> None:
        unchanged, repeated = uploads["unchanged"], uploads["repeated"]
        assert unchanged["puts"] == [] and not unchanged["is_new"]
        assert unchanged["commit"] == repeated["commit"] and unchanged["commits"] == repeated["commits"]

    def test_a_failing_hub_is_asked_again(self, uploads: dict[str, Any]) -> None:
        assert len(uploads["lfs 503"]["puts"]) == 3 and len(uploads["lfs 503"]["commits"]) == 2
        for name in ("commit 503", "commit cut"):
            upload = uploads[name]
            assert upload["is_new"] and len(upload["commits"]) == 2
            assert len(upload["puts"]) == 1
        assert len([r for r in uploads["commit 503"]["requests"] if "/commit/" in r[1]]) == 3
        assert all("Trying again in" in text for text in uploads["commit cut"]["said"])

    def test_a_hub_that_stays_down(self, uploads: dict[str, Any]) -> None:
        down = uploads["commit 500"]
        assert "user/commit500 was not published: the Hub failed (500: " in down["error"]
        assert "Run the same command again later" in down["error"]
        assert [text.split()[-2] for text in down["said"]] == ["2", "4"]
        assert len(down["commits"]) == 1 and len(down["puts"]) == 1
        assert "the connection failed (" in uploads["create cut"]["error"]

    @pytest.mark.parametrize(
        ("status", "remedy"),
        [
            (401, "the Hub does not accept the token. Log in again"),
            (403, "the token may not do that. Make one that may write to user"),
            (404, "there is no such repository or user"),
            (409, "another change came in between"),
        ],
    )
    def test_refusals_are_not_repeated(self, status: int, remedy: str, uploads: dict[str, Any]) -> None:
        for step in ("create", "commit") if status != 409 else ("commit",):
            refused = uploads[f"{step} {status}"]
            assert f"user/{step}{status} was not published: {remedy}" in refused["error"]
            assert "\n" not in refused["error"] and refused["said"] == [] and len(refused["commits"]) <= 1
        if status == 403:
            assert "the token may not do that" in uploads["lfs 403"]["error"]

    def test_a_branch_and_a_tag(self, uploads: dict[str, Any]) -> None:
        first, again = uploads["revision"], uploads["revision again"]
        assert uploads["branches"] == {"main": first["commits"][0], "v2/try": first["commit"]}
        assert not again["is_new"] and uploads["tags"] == {"v2": first["commit"]}
        assert uploads["private"] is True
        taken = uploads["tag taken"]
        assert f"user/revision has a tag v2 already, of commit {first['commit'][:12]}." in taken["error"]
        assert not [path for method, path in taken["requests"] if "/commit/" in path or method == "PUT"]

    def test_what_is_private_is_not_sent_to_a_public_repository(self, uploads: dict[str, Any]) -> None:
        refused = uploads["not private"]
        assert "user/cut is there already and public. Nothing was sent" in refused["error"]
        assert refused["commits"] == uploads["unchanged"]["commits"]

    def test_weights_of_an_earlier_version_go_with_the_commit(self, uploads: dict[str, Any]) -> None:
        """They would be loaded instead of the new ones, or beside them."""
        removed = ["model-00001-of-00001.safetensors", "model.safetensors.index.json"]
        assert sorted(uploads["stale"]["removed"]) == removed and len(uploads["stale"]["commits"]) == 2
        assert set(uploads["stale files"]) == {*FILES, "LICENSE", "README.md", "photo.jpg"}

    def test_the_card_of_others_is_not_replaced_unasked(self, uploads: dict[str, Any]) -> None:
        refused, overwritten = uploads["other card"], uploads["other card, overwritten"]
        assert (
            "user/other has a card (README.md) that is not of this project, and would be replaced" in refused["error"]
        )
        assert len(refused["commits"]) == 1 and refused["said"] == [] and refused["puts"] == []
        assert uploads["other card kept"].endswith("# Somebody else's\n")
        assert overwritten["is_new"] and len(overwritten["commits"]) == 2

    def test_a_hub_that_asks_to_wait(self, uploads: dict[str, Any]) -> None:
        limited, too_long = uploads["commit 429"], uploads["commit 429 long"]
        assert limited["is_new"] and limited["pauses"] == [7]
        assert limited["said"][0].startswith("the Hub asks to wait 7 s before the next request.")
        assert too_long["pauses"] == [] and "the Hub asks to wait 3600 s" in too_long["error"]

    def test_tokens(self, uploads: dict[str, Any]) -> None:
        assert "the Hub does not accept the token" in uploads["wrong token"]["error"]
        assert uploads["wrong token"]["commits"] == []
        assert uploads["no token"]["error"].startswith("There is no access token: log in with `hf auth login`")
        assert uploads["no token"]["requests"] == []
        assert "injected fault, Authorization: Bearer hf_***" in uploads["commit 500"]["error"], "the Hub echoes it"
        assert SECRET not in uploads["shown"] and "wrongwrong" not in uploads["shown"]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub", token=SECRET, lfs_threshold=9_500) as server:
        yield server


@pytest.mark.slow
def test_published_and_loaded_by_id(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    """The whole command, then every way of loading that the card names, at the revision that the command printed."""
    (folder / "training_args.bin").write_bytes(b"0")
    (folder / ".env").write_text(f"HF_TOKEN={SECRET}")
    options = ["--license", "mit", "--made-with", "python training/train.py --recipe laptop"]
    shown = run_main([folder, "user/tuned", *options, "--yes", "--tag", "v1"], hub, tmp_path)
    assert "with equal features" in shown and "Left out: .env, training_args.bin." in shown
    [_, commit] = hub.commits("user/tuned")
    assert f'Pinned: AutoModel.from_pretrained("user/tuned", revision="{commit}", trust_remote_code=True)' in shown
    published = hub.files("user/tuned", "v1")
    assert published.keys() == {*FILES, "README.md", ".gitattributes"}
    assert published["README.md"].read_bytes() == (folder / "README.md").read_bytes()
    assert all(SECRET.encode() not in path.read_bytes() for path in published.values())

    (folder / "config.json").write_text("{}")
    hub.add_repo("user/tuned", folder)  # main goes on; what is pinned does not
    image = Image.radial_gradient("L").convert("RGB")
    image.save(tmp_path / "photo.jpg")
    blocks = [block.split("```")[0] for block in published["README.md"].read_text().split("```python\n")[1:]]
    names = ("sentence_transformers", "diffusers")
    code = "\n".join(b for b in blocks if not any(n in b and importlib.util.find_spec(n) is None for n in names))
    assert len(blocks) == 4 and code.count("from_pretrained") == 3
    code = code.replace('"user/tuned"', f'"user/tuned", revision="{commit}"')
    code = code.replace("model = CLIP", "stock = CLIP")
    out = run_python(
        f"import torch\ntorch.set_grad_enabled(False)\n{code}\n"
        "again = stock(**inputs).logits_per_image\n"
        "difference = (similarity - again).abs().max().item()\n"
        "print('REPORT', type(model).__name__, type(stock).__name__, len(scores), difference)\n"
        "print('LOGITS', *similarity.flatten().tolist())\n",
        hub.environment(),
        cwd=tmp_path,
    )  # fmt: skip
    report, logits = (line.split() for line in out.splitlines() if line.startswith(("REPORT", "LOGITS")))
    assert report[1:4] == ["LongCLIPModel", "CLIPModel", "2"] and float(report[4]) < 1e-6
    assert hub.requests[-1][1].startswith("/") and not any(method == "POST" for method, _ in hub.requests[-5:])

    local = replace_config(folder, published["config.json"])
    processor = AutoProcessor.from_pretrained(local)
    captions = ["a photo of a dog", "a photo of a cat that sleeps on a red sofa beside a window"]
    inputs = processor(
        text=captions, images=[Image.open(tmp_path / "photo.jpg")], padding=True, truncation=True, return_tensors="pt"
    )
    with torch.inference_mode():
        expected = LongCLIPModel.from_pretrained(local)(**inputs).logits_per_image.flatten()
    torch.testing.assert_close(torch.tensor([float(x) for x in logits[1:]]), expected, rtol=1e-5, atol=1e-5)


def replace_config(folder: Path, config: Path) -> Path:
    shutil.copy(config, folder / "config.json")
    return folder


def run_main(args: list[Any], hub: HubServer, cwd: Path) -> str:
    """The command in a process of its own, whose output never shows the token."""
    line = [sys.executable, "-m", "longclip_hf.conversion.publish", *map(str, args)]
    done = fork_server.run(line, cwd=cwd, env={**hub.environment(), "COLUMNS": "120"})
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr
    return done.stdout


def test_a_text_tower(tmp_path: Path) -> None:
    """Without images; its card names a diffusers pipeline instead of a transformers one."""
    from transformers import CLIPModel, CLIPTextModelWithProjection

    write_checkpoint(tmp_path / "clip", "tiny", full_vocabulary=False)
    config = CLIPModel.from_pretrained(tmp_path / "clip").config.text_config
    CLIPTextModelWithProjection(config).save_pretrained(tmp_path / "text")
    stretch(str(tmp_path / "text"), tmp_path / "long", processor=str(tmp_path / "clip"))
    publication = prepare(tmp_path / "long", "user/text")
    assert (
        publication.stock_class == "CLIPTextModelWithProjection"
        and "preprocessor_config.json" not in publication.files
    )
    assert "pipeline_tag: feature-extraction" in publication.card and "StableDiffusionPipeline" in publication.card
    check_loads(publication)
