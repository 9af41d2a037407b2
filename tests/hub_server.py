"""A small Hugging Face Hub on the loopback interface, so that uploads and downloads are tested offline.

Repositories of models take uploads, those of data sets are read only, in one space of names. There are no pull
requests, and listings are never paginated.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from typing import Self  # not in Python 3.10

USER = "user"
# The Hub commits this file when it creates a repository: a new repository is never empty.
GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"

REPO, REV, PATH = r"(?P<repo>[^/]+/[^/]+)", r"(?P<rev>[^/]+)", r"(?P<path>.+)"
Route = Callable[..., Any]
ROUTES: list[tuple[str, re.Pattern[str], bool, Route]] = []


def route(method: str, pattern: str, auth: bool = False) -> Callable[[Route], Route]:
    """Serve `method` on the paths that match `pattern` whole; `auth` asks for the token, whatever the repository."""
    return lambda function: ROUTES.append((method, re.compile(pattern), auth, function)) or function


class HubError(Exception):
    """An error answer; clients pick their exception from `code` (the X-Error-Code header), then from `status`."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None, **body: str):
        headers = {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}
        self.answer = Answer.json({"error": message, **body}, status, {k: v for k, v in headers.items() if v})


@dataclass
class Answer:
    """`size` bytes of `body`, of which only half are sent when it is `cut`."""

    body: BinaryIO
    size: int
    status: int
    headers: dict[str, str]
    cut: bool = False

    @classmethod
    def json(cls, payload: Any, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
        data = json.dumps(payload).encode()
        return cls(io.BytesIO(data), len(data), status, {"Content-Type": "application/json", **(headers or {})})


@dataclass(frozen=True)
class Entry:
    """One version of a file: its content lies under the name `sha256`, `oid` is its git blob id."""

    sha256: str
    size: int
    oid: str
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass
class Repo:
    """Commits by sha, oldest first, and the branches and tags that point at them."""

    id: str
    private: bool
    commits: dict[str, dict[str, Entry]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, Entry], branch: str = "main", summary: str = "") -> str:
        etags = {path: entry.etag for path, entry in sorted(files.items())}
        sha = hashlib.sha1(json.dumps([self.id, self.branches.get(branch), summary, etags]).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, Entry]]:
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, self.commits[sha]


def tree(files: dict[str, Entry]) -> dict[str, dict[str, Any]]:
    """All files and folders of a commit, described as the Hub does, by path."""
    folders = {str(folder) for path in files for folder in PurePosixPath(path).parents[:-1]}
    nodes: dict[str, dict[str, Any]] = {}
    for path in folders:
        nodes[path] = {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
    for path, entry in files.items():
        nodes[path] = {"type": "file", "path": path, "size": entry.size, "oid": entry.oid}
        if entry.lfs:  # the sha256 is called `oid` in a tree, `sha256` among the siblings of a repository's info
            lfs = {"oid": entry.sha256, "sha256": entry.sha256, "size": entry.size, "pointerSize": 130}
            nodes[path]["lfs"] = lfs
    return dict(sorted(nodes.items()))


class Listener(ThreadingHTTPServer):
    hub: HubServer
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that hangs up, as a killed child process does, is no fault of the server.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Request(BaseHTTPRequestHandler):
    """One request as `HubServer.answer` sees it: command, headers, route, query and body; it sends the answer."""

    server: Listener
    route: str
    query: dict[str, list[str]]
    body: BinaryIO
    fault: int | None  # the status that the test wants
    fault_headers: dict[str, str]
    protocol_version = "HTTP/1.1"
    # The head and the body are written apart: with Nagle's algorithm every answer would wait for a delayed ACK.
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def json(self) -> Any:
        return json.loads(self.body.read() or b"{}")

    def _read(self, size: int) -> Iterator[bytes]:
        while size:
            if not (chunk := self.rfile.read(min(size, 2**20))):
                raise ConnectionError("the client hung up in the middle of its request")
            size -= len(chunk)
            yield chunk

    def _chunks(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            yield from self._read(int(self.headers.get("Content-Length", 0)))
            return
        while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
            yield from self._read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass

    def _handle(self) -> None:
        target = urlsplit(self.path)
        self.route, self.query = target.path, parse_qs(target.query)
        self.fault = self.server.hub.take_fault(self)
        if self.fault == 0 and self.command == "PUT":
            for _ in self._read(int(self.headers.get("Content-Length", 0)) // 2):
                pass
            self.close_connection = True
            return
        # The body is read before anything is answered, or its rest would be taken for the next request.
        with tempfile.SpooledTemporaryFile(max_size=2**20) as self.body:
            for chunk in self._chunks():
                self.body.write(chunk)
            self.body.seek(0)
            answer = self.server.hub.answer(self)
        self.close_connection = self.close_connection or answer is None or answer.cut
        if answer is None:
            return
        with answer.body:
            self.send_response(answer.status)
            for name, value in {**answer.headers, "Content-Length": str(answer.size)}.items():
                self.send_header(name, value)
            self.end_headers()
            left = 0 if self.command == "HEAD" else answer.size // 2 if answer.cut else answer.size
            while left:
                left -= self.wfile.write(answer.body.read(min(left, 2**20)))

    do_GET = do_HEAD = do_POST = do_PUT = _handle


class HubServer:
    """A Hub whose file contents lie under `root`; `token` is the only one it accepts.

    Files of more than `lfs_threshold` bytes go through git-LFS; without a threshold none does.
    """

    def __init__(self, root: Path, token: str = "hf_test", lfs_threshold: int | None = None) -> None:
        self.root, self.token, self.lfs_threshold = Path(root), token, lfs_threshold
        self.endpoint = ""
        self.requests: list[tuple[str, str]] = []
        self._blobs = self.root / "blobs"
        self._blobs.mkdir(parents=True, exist_ok=True)
        self._repos: dict[str, Repo] = {}
        self._announced: set[str] = set()
        self._faults: list[tuple[str, str, int, dict[str, str]]] = []
        self._lock = threading.RLock()

    def __enter__(self) -> Self:
        self._listener = Listener(("127.0.0.1", 0), Request)
        self._listener.hub = self
        self.endpoint = f"http://127.0.0.1:{self._listener.server_port}"
        self._thread = threading.Thread(target=self._listener.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.shutdown()
        self._thread.join()
        self._listener.server_close()

    def environment(self) -> dict[str, str]:
        """The variables that make a fresh process talk to this server, with a cache of its own."""
        home = self.root / "hf_home"
        cache = {"HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub")}  # the latter wins, so it is set as well
        switches = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        proxy = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        return {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": self.token, **cache, **switches, **proxy}

    def add_repo(self, repo_id: str, folder: Path, private: bool = False) -> str:
        """Make the files of `folder` the content of `main`, in one new commit, and return its sha."""
        files = {}
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            with path.open("rb") as source:
                files[path.relative_to(folder).as_posix()] = self._store(source, self._is_lfs(path.stat().st_size))
        with self._lock:
            return self._repos.setdefault(repo_id, Repo(repo_id, private)).commit(files)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, Path]:
        """The files of a revision: path in the repository -> path of the content on disk (not to be written to)."""
        with self._lock:
            _, files = self._repos[repo_id].at(revision)
            return {path: self._blobs / entry.sha256 for path, entry in sorted(files.items())}

    def commits(self, repo_id: str) -> list[str]:
        """The shas of all commits, oldest first."""
        with self._lock:
            return list(self._repos[repo_id].commits)

    def fail_next(
        self, method: str, path_substring: str, status: int, times: int = 1, headers: dict[str, str] | None = None
    ) -> None:
        """Answer `status` to the next `times` matching requests, which change nothing.

        Status 0 cuts the connection: in the middle of the body for a GET and a PUT, instead of any answer for the
        others. Any other status comes with a message that echoes the token, as a careless proxy's would.
        """
        with self._lock:
            self._faults += [(method, path_substring, status, headers or {})] * times

    def heal(self) -> None:
        """Forget the faults that are left."""
        with self._lock:
            self._faults.clear()

    def take_fault(self, request: Request) -> int | None:
        """The status that a request was promised by `fail_next`, if it was; each promise is kept once."""
        with self._lock:
            self.requests.append((request.command, request.route))
            fault = next((f for f in self._faults if f[0] == request.command and f[1] in request.route), None)
            if fault is None:
                return None
            self._faults.remove(fault)
            request.fault_headers = fault[3]
            return fault[2]

    def answer(self, request: Request) -> Answer | None:
        """The answer to a request, None to hang up."""
        with self._lock:
            if request.fault:
                echo = f"injected fault, Authorization: {request.headers.get('Authorization')}"
                return Answer.json({"error": echo}, request.fault, request.fault_headers)
            if request.fault == 0 and request.command != "GET":
                return None
            try:
                answer = self._dispatch(request)
            except HubError as error:
                answer = error.answer
            answer.cut = request.fault is not None
            return answer

    def _dispatch(self, request: Request) -> Answer:
        method = "GET" if request.command == "HEAD" else request.command
        # Data sets are repositories like models, below other addresses.
        target = request.route.replace("/api/datasets/", "/api/models/", 1).removeprefix("/datasets")
        for verb, pattern, auth, function in ROUTES:
            if verb == method and (match := pattern.fullmatch(target)):
                if auth:
                    self._authenticate(request, on_repo="repo" in pattern.groupindex)
                # Unquoted only now: a quoted slash in a revision or a path does not separate parts of the route.
                parts = {name: unquote(part) for name, part in match.groupdict().items() if part is not None}
                result = function(self, request, **parts)
                return result if isinstance(result, Answer) else Answer.json(result)
        raise HubError(404, "RepoNotFound", f"No route for {request.command} {request.route}")

    def _authenticate(self, request: Request, on_repo: bool = True) -> None:
        sent = request.headers.get("Authorization")
        if sent == f"Bearer {self.token}":
            return
        if sent:
            raise HubError(401, "", "Invalid credentials in Authorization header")
        # Over https clients make a RepositoryNotFoundError of this by themselves; over http they need the code.
        raise HubError(401, "RepoNotFound" if on_repo else "", "Invalid username or password.")

    def _open(self, request: Request, repo_id: str) -> Repo:
        if repo_id not in self._repos:
            raise HubError(404, "RepoNotFound", "Repository not found")
        if self._repos[repo_id].private:
            self._authenticate(request)
        return self._repos[repo_id]

    def _is_lfs(self, size: int) -> bool:
        return self.lfs_threshold is not None and size > self.lfs_threshold

    def _store(self, source: BinaryIO, lfs: bool) -> Entry:
        digest = hashlib.sha256()
        with tempfile.NamedTemporaryFile(dir=self._blobs, delete=False) as copy:
            while chunk := source.read(2**20):
                digest.update(chunk)
                copy.write(chunk)
        Path(copy.name).replace(self._blobs / digest.hexdigest())
        return self._entry(digest.hexdigest(), lfs)

    def _entry(self, sha256: str, lfs: bool) -> Entry:
        blob = self._blobs / sha256
        # Clients recognise a regular file by its git blob id, and an LFS one by its sha256: there any id will do.
        content = sha256.encode() if lfs else blob.read_bytes()
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return Entry(sha256, blob.stat().st_size, oid, lfs)

    @route("GET", "/api/whoami-v2", auth=True)
    def _whoami(self, request: Request) -> Any:
        token = {"displayName": "test", "role": "write"}
        return {"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token", "accessToken": token}}

    @route("POST", "/api/validate-yaml")
    def _validate_yaml(self, request: Request) -> Any:
        return {"errors": [], "warnings": []}

    @route("POST", "/api/repos/create", auth=True)
    def _create(self, request: Request) -> Any:
        wanted = request.json()
        if wanted.get("type", "model") != "model":
            raise HubError(400, "", "Only models are served here")
        repo_id = f"{wanted.get('organization') or USER}/{wanted['name']}"
        url = f"{self.endpoint}/{repo_id}"
        if repo_id in self._repos:
            raise HubError(409, "", "You already created this model repo", url=url)
        # The first is what huggingface_hub 0.x sends, the second what it sends from 1.x on.
        private = bool(wanted.get("private") or wanted.get("visibility") == "private")
        self._repos[repo_id] = Repo(repo_id, private)
        self._repos[repo_id].commit({".gitattributes": self._store(io.BytesIO(GITATTRIBUTES), lfs=False)})
        return {"url": url, "name": repo_id}

    @route("GET", rf"/api/models/{REPO}(?:/revision/{REV})?")
    def _info(self, request: Request, repo: str, rev: str = "main") -> Any:
        found = self._open(request, repo)
        sha, files = found.at(rev)
        siblings = [{"rfilename": path} for path in sorted(files)]
        if "blobs" in request.query:
            nodes = tree(files)
            for sibling in siblings:
                node = nodes[sibling["rfilename"]]
                sibling |= {"size": node["size"], "blobId": node["oid"], "lfs": node.get("lfs")}
        flags = {"private": found.private, "gated": False, "disabled": False, "tags": []}
        return {"id": repo, "modelId": repo, "author": repo.split("/")[0], "sha": sha, **flags, "siblings": siblings}

    @route("GET", rf"/api/models/{REPO}/tree/{REV}(?:/{PATH})?")
    def _tree(self, request: Request, repo: str, rev: str, path: str = "") -> Any:
        sha, files = self._open(request, repo).at(rev)
        start = len(path) + 1 if path else 0
        below = {name: node for name, node in tree(files).items() if name.startswith(f"{path}/" if path else "")}
        if path and not below:
            raise HubError(404, "EntryNotFound", f"{path} does not exist on {rev}", {"X-Repo-Commit": sha})
        recursive = request.query.get("recursive", [""])[0].lower() in ("true", "1")
        return [node for name, node in below.items() if recursive or "/" not in name[start:]]

    @route("POST", rf"/api/models/{REPO}/paths-info/{REV}")
    def _paths_info(self, request: Request, repo: str, rev: str) -> Any:
        _, files = self._open(request, repo).at(rev)
        nodes = tree(files)
        return [nodes[path] for path in parse_qs(request.body.read().decode()).get("paths", []) if path in nodes]

    @route("GET", rf"/api/models/{REPO}/refs")
    def _refs(self, request: Request, repo: str) -> Any:
        found = self._open(request, repo)
        result: dict[str, Any] = {"converts": [], "pullRequests": []}
        for key, kind, refs in (("branches", "heads", found.branches), ("tags", "tags", found.tags)):
            result[key] = [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": sha} for n, sha in refs.items()]
        return result

    @route("POST", rf"/api/models/{REPO}/(?P<kind>branch|tag)/{REV}", auth=True)
    def _create_ref(self, request: Request, repo: str, kind: str, rev: str) -> Any:
        found, wanted = self._open(request, repo), request.json()
        if kind == "tag":
            refs, name, start = found.tags, wanted["tag"], rev
        else:
            refs, name, start = found.branches, rev, wanted.get("startingPoint", "main")
        if name in refs:
            raise HubError(409, "", f"{kind} {name} already exists")
        refs[name], _ = found.at(start)
        return {}

    @route("POST", rf"/api/models/{REPO}/preupload/{REV}", auth=True)
    def _preupload(self, request: Request, repo: str, rev: str) -> Any:
        _, files = self._open(request, repo).at(rev)
        plan = []
        for item in request.json()["files"]:
            mode = "lfs" if self._is_lfs(item["size"]) else "regular"
            # A client leaves a file out of its commit when this id is the one of its own version.
            oid = files[item["path"]].etag if item["path"] in files else None
            plan.append({"path": item["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": plan}

    @route("POST", rf"/{REPO}\.git/info/lfs/objects/batch", auth=True)
    def _lfs_batch(self, request: Request, repo: str) -> Any:
        self._open(request, repo)
        objects = []
        for item in request.json()["objects"]:
            upload = {"oid": item["oid"], "size": item["size"]}
            if not (self._blobs / item["oid"]).exists():
                # An upload carries no token, as on the Hub: it is allowed because it was announced with one.
                self._announced.add(item["oid"])
                put = {"href": f"{self.endpoint}/lfs/{item['oid']}"}
                verify = {"href": f"{self.endpoint}/{repo}.git/info/lfs/objects/verify"}
                upload["actions"] = {"upload": put, "verify": verify}
            objects.append(upload)
        return {"transfer": "basic", "objects": objects}

    @route("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})")
    def _lfs_upload(self, request: Request, oid: str) -> Any:
        if oid not in self._announced:
            raise HubError(403, "", "This upload was not announced")
        if self._store(request.body, lfs=True).sha256 != oid:
            raise HubError(400, "", "The content does not have the announced sha256")
        return {}

    @route("POST", rf"/{REPO}\.git/info/lfs/objects/verify", auth=True)
    def _lfs_verify(self, request: Request, repo: str) -> Any:
        item = request.json()
        blob = self._blobs / item["oid"]
        if not blob.exists() or blob.stat().st_size != item["size"]:
            raise HubError(404, "", "The object was not uploaded")
        return {}

    @route("POST", rf"/api/models/{REPO}/commit/{REV}", auth=True)
    def _commit(self, request: Request, repo: str, rev: str) -> Any:
        found = self._open(request, repo)
        if "create_pr" in request.query:
            raise HubError(400, "", "Pull requests are not served here")
        if rev not in found.branches:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        head, files = found.at(rev)
        files, summary = dict(files), ""
        for line in request.body:
            item = json.loads(line)
            key, value, path = item["key"], item["value"], item["value"].get("path")
            if key == "header":
                summary = value["summary"]
                if value.get("parentCommit", head) != head:
                    raise HubError(412, "", "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[path] = self._store(io.BytesIO(base64.b64decode(value["content"])), lfs=False)
            elif key == "lfsFile":
                if not (self._blobs / value["oid"]).exists():
                    raise HubError(400, "", f"The content of {path} was not uploaded")
                files[path] = self._entry(value["oid"], lfs=True)
            elif key == "deletedFile":
                if files.pop(path, None) is None:
                    raise HubError(404, "EntryNotFound", "A file with this name doesn't exist")
            elif key == "deletedFolder":
                files = {n: entry for n, entry in files.items() if not n.startswith(f"{path.rstrip('/')}/")}
            else:
                raise HubError(400, "", f"Unknown operation {key}")
        sha = found.commit(files, rev, summary)
        return {"success": True, "commitOid": sha, "commitUrl": f"{self.endpoint}/{repo}/commit/{sha}"}

    @route("GET", rf"/{REPO}/resolve/{REV}/{PATH}")
    def _resolve(self, request: Request, repo: str, rev: str, path: str) -> Any:
        sha, files = self._open(request, repo).at(rev)
        if path not in files:  # with the commit, for which clients remember that it lacks the file
            raise HubError(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
        entry = files[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{entry.etag}"', "Accept-Ranges": "bytes"}
        start, stop, status = 0, entry.size, 200
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", "")):
            start = int(wanted[1])
            stop = min(int(wanted[2]) + 1, entry.size) if wanted[2] else entry.size
            if start >= stop:
                raise HubError(416, "", "Range not satisfiable", {"Content-Range": f"bytes */{entry.size}"})
            headers["Content-Range"], status = f"bytes {start}-{stop - 1}/{entry.size}", 206
        body = (self._blobs / entry.sha256).open("rb")
        body.seek(start)
        return Answer(body, stop - start, status, headers)
