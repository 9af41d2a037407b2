"""The test Hub against the real client, which runs in child processes: it reads its environment once, at import."""

from __future__ import annotations

import http.client
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fork_server
import pytest
from hub_server import HubServer

BIG = bytes(range(256)) * 40

# Every snippet runs after this, and reports through `report(...)`, or through the exception it ends with.
PRELUDE = """
import json, sys
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download, snapshot_download

api, args = HfApi(), json.loads(sys.argv[1])

def report(**values):
    print("REPORT" + json.dumps(values))

def raised(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        return [type(error).__name__, status]

def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes().hex() for p in Path(folder).rglob("*") if p.is_file()}
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub", lfs_threshold=1000) as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "folder"
    (root / "sub").mkdir(parents=True)
    (root / "config.json").write_text("{}")
    (root / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (root / "empty.txt").write_text("")
    (root / "sub" / "model.bin").write_bytes(BIG)
    return root


def client(hub: HubServer, code: str, *args: Any) -> dict[str, Any]:
    """What the last `report` of a snippet said."""
    line = [sys.executable, "-c", PRELUDE + code, json.dumps([str(arg) for arg in args])]
    child = fork_server.run(line, env=hub.environment())
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.split("REPORT")[-1])


def hexes(files: dict[str, Path]) -> dict[str, str]:
    return {path: content.read_bytes().hex() for path, content in files.items()}


def local(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def test_upload_folder(hub: HubServer, folder: Path) -> None:
    seen = client(
        hub,
        """
url = api.create_repo("user/tiny")
again = api.create_repo("user/tiny", exist_ok=True)
commit = api.upload_folder(repo_id="user/tiny", folder_path=args[0])
same = api.upload_folder(repo_id="user/tiny", folder_path=args[0])
info = api.model_info("user/tiny", files_metadata=True)
deleted = api.delete_file("config.json", "user/tiny")
stale = raised(api.upload_file, path_or_fileobj=b"x", path_in_repo="x", repo_id="user/tiny", parent_commit=commit.oid)
report(
    id=url.repo_id, again=again.repo_id, name=api.whoami()["name"], twice=raised(api.create_repo, "user/tiny"),
    oid=commit.oid, same=same.oid, info=info.sha, deleted=deleted.oid, stale=stale,
    lfs={s.rfilename: s.lfs.sha256 if s.lfs else None for s in info.siblings},
)
""",
        folder,
    )
    assert seen["id"] == seen["again"] == "user/tiny"
    assert seen["name"] == "user"
    assert seen["twice"] == ["HfHubHTTPError", 409]
    assert seen["oid"] == seen["same"] == seen["info"]
    assert seen["stale"] == ["HfHubHTTPError", 412]
    # One commit made the repository, one brought all files, none was made for unchanged ones.
    assert hub.commits("user/tiny")[1:] == [seen["oid"], seen["deleted"]]
    uploaded = hub.files("user/tiny", seen["oid"])
    assert hexes(uploaded) == {**hexes(local(folder)), ".gitattributes": uploaded[".gitattributes"].read_bytes().hex()}
    assert set(uploaded) - set(hub.files("user/tiny")) == {"config.json"}
    assert [path for path, sha in seen["lfs"].items() if sha] == ["sub/model.bin"]
    assert [method for method, path in hub.requests if path == f"/lfs/{seen['lfs']['sub/model.bin']}"] == ["PUT"]


def test_revisions(hub: HubServer, folder: Path) -> None:
    first = hub.add_repo("user/tiny", folder)
    client(hub, 'api.create_tag("user/tiny", tag="v1"); api.create_branch("user/tiny", branch="a/b"); report()')
    (folder / "config.json").write_text('{"new": 1}')
    second = hub.add_repo("user/tiny", folder)
    seen = client(
        hub,
        """
refs = api.list_repo_refs("user/tiny")
report(
    refs={ref.name: ref.target_commit for ref in refs.branches + refs.tags},
    clash=raised(api.create_tag, "user/tiny", tag="v1"),
    files={rev: content(snapshot_download("user/tiny", revision=rev)) for rev in ("main", "v1", "a/b", *args)},
    one=hf_hub_download("user/tiny", "config.json", revision=args[1]),
    listed=sorted(api.list_repo_files("user/tiny", revision="v1")),
    top=[node.path for node in api.list_repo_tree("user/tiny")],
    below=[node.path for node in api.list_repo_tree("user/tiny", "sub")],
    nowhere=raised(lambda: list(api.list_repo_tree("user/tiny", "nowhere"))),
    paths=[node.path for node in api.get_paths_info("user/tiny", ["sub", "config.json", "nowhere"])],
)
""",
        first,
        second,
    )
    assert first != second and seen["refs"] == {"main": second, "a/b": first, "v1": first}
    assert seen["clash"] == ["HfHubHTTPError", 409]
    new, old = hexes(local(folder)), {**hexes(local(folder)), "config.json": b"{}".hex()}
    assert seen["files"] == {"main": new, second: new, first: old, "v1": old, "a/b": old}
    assert Path(seen["one"]).read_text() == '{"new": 1}'
    assert Path(seen["one"]).is_relative_to(hub.root)
    assert seen["listed"] == sorted(old)
    assert seen["top"] == ["README.md", "config.json", "empty.txt", "sub"]
    assert seen["below"] == ["sub/model.bin"]
    assert seen["nowhere"][1] == 404
    assert seen["paths"] == ["sub", "config.json"]


def test_errors(hub: HubServer, folder: Path) -> None:
    hub.add_repo("user/tiny", folder)
    hub.add_repo("user/secret", folder, private=True)
    seen = client(
        hub,
        """
wrong, anonymous = HfApi(token="hf_wrong"), HfApi(token=False)
report(
    repo=raised(hf_hub_download, "user/none", "config.json"),
    file=raised(hf_hub_download, "user/tiny", "none.json"),
    revision=raised(hf_hub_download, "user/tiny", "config.json", revision="none"),
    snapshot=raised(snapshot_download, "user/none"),
    public=raised(anonymous.model_info, "user/tiny"),
    # Before it is allowed, for a refused client falls back on its cache.
    anonymous=raised(anonymous.hf_hub_download, "user/secret", "config.json"),
    allowed=raised(api.snapshot_download, "user/secret"),
    wrong=raised(wrong.model_info, "user/secret"),
    whoami=raised(wrong.whoami),
    create=raised(wrong.create_repo, "user/new"),
    upload=raised(wrong.upload_file, path_or_fileobj=b"x", path_in_repo="x", repo_id="user/tiny"),
    private=[api.create_repo("user/hidden", private=True), api.model_info("user/hidden").private],
)
""",
    )
    assert seen["repo"] == seen["snapshot"] == ["RepositoryNotFoundError", 404]
    assert seen["file"][0].endswith("EntryNotFoundError") and seen["file"][1] == 404
    assert seen["revision"] == ["RevisionNotFoundError", 404]
    assert seen["public"] is seen["allowed"] is None
    assert seen["anonymous"] == ["RepositoryNotFoundError", 401]
    assert seen["wrong"] == seen["create"] == seen["upload"] == ["HfHubHTTPError", 401]
    assert seen["whoami"][1] == 401
    assert seen["private"][1] is True
    assert len(hub.commits("user/tiny")) == 1


def test_faults(hub: HubServer, folder: Path) -> None:
    hub.add_repo("user/tiny", folder)
    hub.fail_next("PUT", "/lfs/", 503)
    hub.fail_next("POST", "/commit/", 409)
    hub.fail_next("HEAD", "/resolve/", 403)
    hub.fail_next("GET", "/revision/main", 503)
    hub.fail_next("GET", "/api/models/user/tiny", 0)
    hub.fail_next("POST", "/branch/", 0)
    seen = client(
        hub,
        """
upload = dict(path_or_fileobj=b"y" * 2000, path_in_repo="big", repo_id="user/tiny")
report(
    refused=raised(api.upload_file, **upload),
    passed=raised(api.upload_file, **upload),
    forbidden=raised(hf_hub_download, "user/tiny", "config.json"),
    unavailable=raised(snapshot_download, "user/tiny"),
    cut=raised(api.model_info, "user/tiny"),
    branch=raised(api.create_branch, "user/tiny", branch="new"),
    after=raised(api.create_branch, "user/tiny", branch="new"),
)
""",
    )
    assert [method for method, path in hub.requests if path.startswith("/lfs/")] == ["PUT", "PUT"]  # it was retried
    assert seen["refused"][1] == 409
    assert seen["passed"] is seen["after"] is None
    assert seen["forbidden"] == seen["unavailable"] == ["LocalEntryNotFoundError", None]
    assert seen["cut"][0] in ("ChunkedEncodingError", "RemoteProtocolError")
    assert seen["branch"][0] in ("ConnectionError", "RemoteProtocolError")
    assert len(hub.commits("user/tiny")) == 2


def test_cut_download(hub: HubServer, folder: Path) -> None:
    """Whether a client resumes or gives up, it never takes half a file for the whole one."""
    hub.add_repo("user/tiny", folder)
    hub.fail_next("GET", "/resolve/", 0)
    seen = client(
        hub,
        """
failure = raised(hf_hub_download, "user/tiny", "sub/model.bin")
report(failure=failure, file=hf_hub_download("user/tiny", "sub/model.bin"))
""",
    )
    assert Path(seen["file"]).read_bytes() == BIG
    assert seen["failure"] is None or seen["failure"][1] is None


def test_plain_http(hub: HubServer, folder: Path) -> None:
    """What not every client asks for, over one connection."""
    sha = hub.add_repo("user/tiny", folder)
    connection = http.client.HTTPConnection(hub.endpoint.removeprefix("http://"), timeout=10)

    def ask(method: str, path: str, **options: Any) -> tuple[http.client.HTTPResponse, bytes]:
        connection.request(method, path, **options)
        response = connection.getresponse()
        return response, response.read()

    url = f"/user/tiny/resolve/{sha}/sub/model.bin"
    try:
        response, body = ask("HEAD", url)
        assert (response.status, response.headers["Content-Length"], body) == (200, str(len(BIG)), b"")
        assert response.headers["X-Repo-Commit"] == sha and response.headers["ETag"].startswith('"')
        for wanted, part in {"5-9": BIG[5:10], "5-": BIG[5:], f"0-{2 * len(BIG)}": BIG}.items():
            response, body = ask("GET", url, headers={"Range": f"bytes={wanted}"})
            assert (response.status, body) == (206, part)
        assert ask("GET", url, headers={"Range": f"bytes={len(BIG)}-"})[0].status == 416
        response, _ = ask("GET", "/user/tiny/resolve/main/none")
        assert (response.status, response.headers["X-Error-Code"]) == (404, "EntryNotFound")
        assert response.headers["X-Repo-Commit"] == sha

        token = {"Authorization": f"Bearer {hub.token}"}
        tag = json.dumps({"tag": "v1"}).encode()
        assert ask("POST", "/api/models/user/tiny/tag/main", body=tag)[0].status == 401
        chunks = {"body": iter([tag[:3], tag[3:]]), "encode_chunked": True}
        headers = {**token, "Transfer-Encoding": "chunked"}
        assert ask("POST", "/api/models/user/tiny/tag/main", headers=headers, **chunks)[0].status == 200
        assert hub.files("user/tiny", "v1").keys() == local(folder).keys()
        assert ask("PUT", f"/lfs/{'0' * 64}", body=b"x")[0].status == 403
        assert hub.requests[-1] == ("PUT", f"/lfs/{'0' * 64}")
    finally:
        connection.close()


def test_transformers(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    tower = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"model_type": "clip", "text_config": {**tower, "max_position_embeddings": 248}, "vision_config": tower}
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(config))
    hub.add_repo("user/tiny", tmp_path / "tiny")
    seen = client(
        hub,
        """
from transformers import AutoConfig
config = AutoConfig.from_pretrained("user/tiny")
report(kind=type(config).__name__, length=config.text_config.max_position_embeddings)
""",
    )
    assert seen == {"kind": "CLIPConfig", "length": 248}
    assert [path.split("/")[-1] for method, path in hub.requests if "/resolve/" in path] == ["config.json"] * 2
