"""A stand-in Hugging Face Hub on loopback: what huggingface_hub 2.4 asks of the real one, and nothing else.

Served: create, validate-yaml, preupload, LFS batch, upload and verify, commit, branches, info, tree, paths-info,
resolve (HEAD, GET, Range, ETag), whoami; models and data sets; private repositories, tokens, 401, 403 and 404 as the
Hub gives them. Blobs lie in a folder, commits in memory. `hub.fail_once(...)` breaks one answer on purpose.

huggingface_hub reads HF_ENDPOINT, HF_HOME and HF_TOKEN at import: run its client in a child process whose environment
is `hub.environment(home, token=...)`. Where hf_xet is installed the 2.4 client never chooses plain LFS by itself,
whatever the server answers; that environment therefore sets HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

# Put together at run time, so that no file of the project holds anything shaped like a token.
ANN = "hf_" + "Ann" * 9  # may write to everything under ann/
BOB = "hf_" + "Bob" * 9  # may write to everything under bob/
ANN_READ_ONLY = "hf_" + "Ann" * 8 + "ro"
USERS = {ANN: ("ann", "write"), BOB: ("bob", "write"), ANN_READ_ONLY: ("ann", "read")}
LFS_SUFFIXES = (".safetensors", ".bin", ".model", ".parquet", ".zip")
KINDS = {"models": "model", "datasets": "dataset"}


class HubError(Exception):
    """A refusal: status, message, the X-Error-Code that huggingface_hub turns into a class, more of the body."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict | None = None, **body):
        super().__init__(message)
        self.status = status
        self.body = {"error": message, **body}
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}


class DropConnection(Exception):
    """Close the socket without an answer."""


@dataclass(frozen=True)
class FileAnswer:
    """The bytes of a file, with the headers that tell its commit and its ETag."""

    status: int
    content: bytes
    headers: dict[str, str]


@dataclass(frozen=True)
class Entry:
    """One file of a commit.  sha256 names its blob; oid is the git-sha1 of a small file, sha256 of an LFS file."""

    sha256: str
    oid: str
    size: int
    is_lfs: bool


@dataclass
class Repository:
    """Commits are whole trees (path -> Entry); branches point at commit ids of 40 hex digits."""

    kind: str
    repo_id: str
    private: bool
    commits: dict[str, dict[str, Entry]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, tree: dict[str, Entry], branch: str) -> str:
        content = json.dumps(
            [self.repo_id, len(self.commits), sorted((path, entry.oid) for path, entry in tree.items())]
        )
        commit_id = hashlib.sha1(content.encode()).hexdigest()
        self.commits[commit_id] = tree
        self.branches[branch] = commit_id
        return commit_id

    def resolve(self, revision: str) -> str:
        commit_id = self.branches.get(revision, revision)
        if commit_id not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit_id


class StandInHub(ThreadingHTTPServer):
    """The server and its state.  Tests read `url`, `requests`, `files(...)`, `read(...)`; they may also `add(...)`."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.blobs = folder
        self.users = dict(USERS)
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, name of the user or None
        self.faults: list[tuple[str, re.Pattern, int | str, dict[str, str]]] = []
        self.upload_keys: set[str] = set()
        self.after_commit: Callable[[str], None] | None = None  # called with the repository's name
        self.lock = threading.RLock()

    def environment(self, home: Path, token: str | None = ANN, **more: str) -> dict[str, str]:
        """os.environ for a child process: this hub, an empty home, the token in it only."""
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        given = {"HF_TOKEN": token} if token else {}
        return {
            **kept,
            **given,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            **more,
        }

    def fail_once(self, method: str, path_pattern: str, fault: int | str, **headers: str) -> None:
        """Answer the next such request with that status and headers (Retry_After="1"); fault="drop" closes the
        connection before anything is done, "drop-after" does the work and then closes the connection, "hang" does
        neither for three seconds."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults.append((method, re.compile(path_pattern), fault, named))

    def take_fault(self, method: str, path: str) -> tuple[int | str | None, dict[str, str]]:
        with self.lock:
            for fault in self.faults:
                if fault[0] == method and fault[1].search(path):
                    self.faults.remove(fault)
                    return fault[2:]
        return None, {}

    def store(self, content: bytes, path: str) -> Entry:
        sha256 = hashlib.sha256(content).hexdigest()
        (self.blobs / sha256).write_bytes(content)
        if path.endswith(LFS_SUFFIXES):
            return Entry(sha256, sha256, len(content), True)
        return Entry(sha256, hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), len(content), False)

    def add(self, repo_id: str, files: dict[str, bytes], *, kind: str = "model", private: bool = False) -> str:
        """Make a repository holding these files, as if somebody had pushed it.  Returns the commit id."""
        with self.lock:
            repository = self.repositories.setdefault((kind, repo_id), Repository(kind, repo_id, private))
            return repository.commit({path: self.store(content, path) for path, content in files.items()}, "main")

    def files(self, repo_id: str, revision: str = "main", kind: str = "model") -> set[str]:
        repository = self.repositories[kind, repo_id]
        return set(repository.commits[repository.resolve(revision)])

    def read(self, repo_id: str, path: str, revision: str = "main", kind: str = "model") -> bytes:
        repository = self.repositories[kind, repo_id]
        return (self.blobs / repository.commits[repository.resolve(revision)][path].sha256).read_bytes()

    def replace(self, repo_id: str, path: str, content: bytes) -> None:
        """Swap a file's content in every commit, keeping the ids: what a damaged store would do."""
        for tree in self.repositories["model", repo_id].commits.values():
            tree[path] = self.store(content, path)


REPO = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
KIND = r"/api/(?P<plural>models|datasets)/"
RESOLVE = rf"/(?:(?P<plural>datasets)/)?{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"
ROUTES = {
    "GET": [
        (r"/api/whoami-v2", "whoami"),
        (KIND + REPO, "info"),
        (KIND + REPO + r"/revision/(?P<revision>[^/]+)", "info"),
        (KIND + REPO + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "tree"),
        (RESOLVE, "resolve"),
    ],
    "HEAD": [(RESOLVE, "resolve")],
    "POST": [
        (r"/api/repos/create", "create"),
        (r"/api/validate-yaml", "validate_yaml"),
        (KIND + REPO + r"/preupload/(?P<revision>[^/]+)", "preupload"),
        (KIND + REPO + r"/commit/(?P<revision>[^/]+)", "commit"),
        (KIND + REPO + r"/branch/(?P<branch>[^/]+)", "branch"),
        (KIND + REPO + r"/paths-info/(?P<revision>[^/]+)", "paths_info"),
        (rf"/(?:(?P<plural>datasets)/)?{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
        (r"/lfs/verify/(?P<sha256>\w+)", "lfs_verify"),
    ],
    "PUT": [(r"/lfs/upload/(?P<sha256>\w+)", "lfs_upload")],
}


class Handler(BaseHTTPRequestHandler):
    """One request: find the route, check the token, call the method of that name, send its JSON or bytes."""

    protocol_version = "HTTP/1.1"
    server: StandInHub

    def log_message(self, *args) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self.serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def serve(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self.read_body()
        fault, headers = self.server.take_fault(self.command, url.path)
        try:
            if fault == "hang":
                time.sleep(3)
            if fault in ("drop", "hang"):
                raise DropConnection
            user = self.authenticate()
            self.server.requests.append((self.command, url.path, user))
            if isinstance(fault, int):
                raise HubError(fault, "on purpose", headers=headers)
            with self.server.lock:
                answer = self.route(url.path)
            if fault == "drop-after":
                raise DropConnection
            if isinstance(answer, FileAnswer):
                self.answer(answer.status, answer.content, answer.headers)
            else:
                self.answer(200, json.dumps(answer).encode(), {})
        except HubError as error:
            self.answer(error.status, json.dumps(error.body).encode(), error.headers)
        except DropConnection:
            self.close_connection = True

    def read_body(self) -> bytes:
        """The body by Content-Length or in chunks: uploads of file objects come in chunks."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def authenticate(self) -> str | None:
        """The user's name, None for nobody; an unknown token is refused whatever it asks for, as on the Hub."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token:
            self.user, self.role = None, None
        elif token in self.server.users:
            self.user, self.role = self.server.users[token]
        else:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.user

    def route(self, path: str):
        for pattern, name in ROUTES.get(self.command, []):
            if match := re.fullmatch(pattern, path):
                arguments = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                if "repo_id" in arguments:
                    plural = arguments.pop("plural", "models")
                    self.repository = self.find(KINDS[plural], arguments.pop("repo_id"))
                return getattr(self, name)(**arguments)
        raise HubError(404, f"the stand-in does not serve {self.command} {path}")

    def answer(self, status: int, content: bytes, headers: dict) -> None:
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def find(self, kind: str, repo_id: str) -> Repository:
        """A private repository does not exist for others: 401 for nobody, 404 for somebody else."""
        repository = self.server.repositories.get((kind, repo_id))
        if repository is None or (repository.private and self.user != repo_id.split("/")[0]):
            if self.user is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repository

    def need_write(self, namespace: str) -> None:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        if self.user != namespace or self.role != "write":
            raise HubError(403, f'You don\'t have the rights to write under the namespace "{namespace}"')

    # Accounts and repositories

    def whoami(self):
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        return {"type": "user", "name": self.user, "orgs": [], "auth": {"accessToken": {"role": self.role}}}

    def create(self):
        wish = json.loads(self.body)
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        namespace = wish.get("organization") or self.user
        repo_id, kind = f"{namespace}/{wish['name']}", wish.get("type", "model")
        self.need_write(namespace)
        url = f"{self.server.url}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"
        if (kind, repo_id) in self.server.repositories:
            raise HubError(409, "You already created this repo", url=url)
        private = wish.get("visibility") == "private"
        repository = self.server.repositories[kind, repo_id] = Repository(kind, repo_id, private)
        attributes = self.server.store(b"*.safetensors filter=lfs\n", ".gitattributes")
        repository.commit({".gitattributes": attributes}, "main")
        return {"url": url, "name": repo_id, "id": secrets.token_hex(12)}

    def branch(self, branch: str):
        self.need_write(self.repository.repo_id.split("/")[0])
        if branch in self.repository.branches:
            raise HubError(409, f"Reference already exists: {branch}")
        start = (json.loads(self.body) if self.body else {}).get("startingPoint", "main")
        self.repository.branches[branch] = self.repository.resolve(start)
        return {}

    def info(self, revision: str = "main"):
        commit_id = self.repository.resolve(revision)
        tree = self.repository.commits[commit_id]
        return {
            "id": self.repository.repo_id,
            "author": self.repository.repo_id.split("/")[0],
            "sha": commit_id,
            "private": self.repository.private,
            "gated": False,
            "disabled": False,
            "tags": [],
            "createdAt": "2026-01-01T00:00:00.000Z",
            "lastModified": "2026-01-01T00:00:00.000Z",
            "siblings": [{"rfilename": path} for path in sorted(tree)],
        }

    # Reading files

    def describe(self, path: str, entry: Entry) -> dict:
        lfs = {"lfs": {"oid": entry.sha256, "size": entry.size, "pointerSize": 130}} if entry.is_lfs else {}
        return {"type": "file", "path": path, "oid": entry.oid, "size": entry.size, **lfs}

    def tree(self, revision: str, path: str = ""):
        tree = self.repository.commits[self.repository.resolve(revision)]
        prefix = f"{path}/" if path else ""
        inside = {name: entry for name, entry in tree.items() if name.startswith(prefix)}
        if path and not inside:
            raise HubError(404, f"{path} does not exist on {revision!r}", "EntryNotFound")
        folders = {name[: match.start()] for name in inside for match in re.finditer("/", name)}
        found = [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)]
        found += [self.describe(name, entry) for name, entry in sorted(inside.items())]
        if self.query.get("recursive", ["false"])[0].lower() == "true":
            return [item for item in found if item["path"].startswith(prefix)]
        return [item for item in found if item["path"].startswith(prefix) and "/" not in item["path"][len(prefix) :]]

    def paths_info(self, revision: str):
        tree = self.repository.commits[self.repository.resolve(revision)]
        found = []
        for path in parse_qs(self.body.decode()).get("paths", []):
            if path in tree:
                found.append(self.describe(path, tree[path]))
            elif any(name.startswith(f"{path}/") for name in tree):
                found.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
        return found

    def resolve(self, revision: str, path: str):
        commit_id = self.repository.resolve(revision)
        headers = {"X-Repo-Commit": commit_id, "Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        entry = self.repository.commits[commit_id].get(path)
        if entry is None:
            raise HubError(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit_id})
        headers["ETag"] = f'"{entry.oid}"'
        if entry.is_lfs:
            headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
        content = (self.server.blobs / entry.sha256).read_bytes()
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(wanted[1]), int(wanted[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            return FileAnswer(206, content[start : end + 1], headers)
        return FileAnswer(200, content, headers)

    # Writing files

    def validate_yaml(self):
        """Three of the Hub's many rules: a closed front matter, no empty licence, a base model by Hub id."""
        content = json.loads(self.body)["content"]
        front = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
        if content.startswith("---") and not front:
            raise self.invalid_yaml("the front matter is not closed")
        if front and re.search(r"^license:\s*$", front[1], re.MULTILINE):
            raise self.invalid_yaml('"license" must not be empty')
        base = front and re.search(r"^base_model: *(.*)$", front[1], re.MULTILINE)
        if base and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base[1]):
            raise self.invalid_yaml(f'"base_model" with value "{base[1]}" is not valid')
        return {"errors": [], "warnings": []}

    def invalid_yaml(self, message: str) -> HubError:
        return HubError(400, message, errors=[{"message": message}], warnings=[])

    def preupload(self, revision: str):
        self.need_write(self.repository.repo_id.split("/")[0])
        tree = self.repository.commits[self.repository.resolve(revision)]
        modes = {True: "lfs", False: "regular"}
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": modes[file["path"].endswith(LFS_SUFFIXES)],
                    "shouldIgnore": False,
                    "oid": tree[file["path"]].oid if file["path"] in tree else None,
                }
                for file in json.loads(self.body)["files"]
            ]
        }

    def lfs_batch(self):
        self.need_write(self.repository.repo_id.split("/")[0])
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            described = {"oid": wanted["oid"], "size": wanted["size"]}
            if not (self.server.blobs / wanted["oid"]).exists():
                key = secrets.token_hex(8)
                self.server.upload_keys.add(key)
                upload = {"href": f"{self.server.url}/lfs/upload/{wanted['oid']}?key={key}"}
                verify = {"href": f"{self.server.url}/lfs/verify/{wanted['oid']}"}
                described["actions"] = {"upload": upload, "verify": verify}
            objects.append(described)
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, sha256: str):
        """Signed by its key instead of a token, as at the Hub's object store."""
        if self.query.get("key", [""])[0] not in self.server.upload_keys:
            raise HubError(403, "the signature of this upload address is not valid")
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise HubError(400, "the content does not have the announced sha256")
        (self.server.blobs / sha256).write_bytes(self.body)
        return {}

    def lfs_verify(self, sha256: str):
        stored, size = self.server.blobs / sha256, json.loads(self.body)["size"]
        if self.user is None or not stored.exists() or stored.stat().st_size != size:
            raise HubError(404, "the object has not arrived")
        return {}

    def commit(self, revision: str):
        self.need_write(self.repository.repo_id.split("/")[0])
        if revision not in self.repository.branches:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        head = self.repository.branches[revision]
        tree = dict(self.repository.commits[head])
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header" and value.get("parentCommit", head) != head:
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            if key == "file":
                tree[value["path"]] = self.server.store(base64.b64decode(value["content"]), value["path"])
            elif key == "lfsFile":
                if not (self.server.blobs / value["oid"]).exists():
                    raise HubError(400, f"the LFS object of {value['path']} was never uploaded")
                tree[value["path"]] = Entry(value["oid"], value["oid"], value["size"], True)
            elif key == "deletedFile":
                tree.pop(value["path"], None)
        commit_id = self.repository.commit(tree, revision)
        if self.server.after_commit:
            self.server.after_commit(self.repository.repo_id)
        url = f"{self.server.url}/{self.repository.repo_id}/commit/{commit_id}"
        return {"success": True, "commitOid": commit_id, "commitUrl": url, "hookOutput": ""}


@contextmanager
def running_hub(folder: Path):
    """Start a stand-in on a free port of loopback; stop it at the end."""
    hub = StandInHub(folder)
    thread = threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


@pytest.fixture
def stand_in_hub(tmp_path_factory):
    with running_hub(tmp_path_factory.mktemp("stand_in_hub")) as hub:
        yield hub
