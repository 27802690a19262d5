"""A small Hub on loopback: repositories with branches and commits, large files, tokens; and ways to make it fail."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_of_the_tests"
USER = "tester"
DATE = "2026-01-01T00:00:00.000Z"
Files = dict[str, bytes]


@dataclass
class Commit:
    """One state of a repository."""

    title: str
    parent: str | None
    files: Files
    description: str = ""

    @property
    def oid(self) -> str:
        digest = hashlib.sha1(f"{self.title}|{self.parent}".encode())
        for name, content in sorted(self.files.items()):
            digest.update(name.encode() + hashlib.sha1(content).digest())
        return digest.hexdigest()


@dataclass
class Repository:
    """Commits by their hash, and which one each branch is at."""

    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def add(self, commit: Commit, branch: str) -> str:
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit.oid

    def find(self, revision: str) -> str | None:
        known = self.branches.get(revision, revision)
        return known if known in self.commits else None

    def files(self, revision: str = "main") -> Files:
        return self.commits[self.branches.get(revision, revision)].files

    def behind(self, oid: str | None) -> Iterator[Commit]:
        """A commit and all before it."""
        while oid is not None:
            yield self.commits[oid]
            oid = self.commits[oid].parent

    def last_change(self, path: str, oid: str) -> Commit:
        """The commit that gave a file the content it has in another."""
        content, changed = self.commits[oid].files[path], self.commits[oid]
        for commit in self.behind(oid):
            if commit.files.get(path) != content:
                break
            changed = commit
        return changed

    def history(self, branch: str = "main") -> list[str]:
        """Titles of the commits, the newest first."""
        return [commit.title for commit in self.behind(self.branches.get(branch))]


class FakeHub:
    """The server and what it holds.

    Attributes:
        repositories: by name.
        requests: method and path of everything that was asked.
        refused: status by a pattern of ``METHOD path``, to be answered instead.
        gitignored: pattern of files that a commit leaves out.
        extra_tree: paths that every listing names beside what is there, as a hostile server might.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.refused: dict[str, int] = {}
        self.gitignored: str | None = None
        self.extra_tree: list[str] = []
        self.before_commit: Callable[[Repository], None] | None = None
        self.url = ""

    def asked(self, pattern: str) -> list[str]:
        return [line for line in self.requests if re.search(pattern, line)]

    def new(self, name: str, files: Files | None = None, *, private: bool = False) -> Repository:
        repository = self.repositories[name] = Repository(private)
        repository.add(Commit("initial commit", None, {".gitattributes": b"", **(files or {})}), "main")
        return repository


@dataclass
class Answer:
    """Status, body and headers of an answer."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, data: Any, status: int = 200, **headers: str) -> Answer:
        given = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
        return cls(status, json.dumps(data).encode(), given)


NO_REPOSITORY = Answer.of({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
NO_REVISION = Answer.of({"error": "Revision not found"}, 404, X_Error_Code="RevisionNotFound")
_REPOSITORY = r"(?P<name>[\w.-]+/[\w.-]+)"


class Asked:
    """One request, and what the Hub answers to it."""

    def __init__(self, hub: FakeHub, method: str, target: str, *, body: bytes, token: str | None) -> None:
        self.hub, self.method, self.body, self.token = hub, method, body, token
        parts = urlsplit(target)
        self.path, self.query = parts.path, parse_qs(parts.query)

    def answer(self) -> Answer:
        line = f"{self.method} {self.path}"
        self.hub.requests.append(line)
        for pattern, status in self.hub.refused.items():
            if re.search(pattern, line):
                return Answer.of({"error": "refused by the test"}, status)
        for pattern, method in ROUTES:
            if found := re.fullmatch(pattern, line):
                named = {name: unquote(text) for name, text in found.groupdict().items() if text is not None}
                return method(self, **named)
        return Answer.of({"error": f"no such page: {line}"}, 404)

    @property
    def data(self) -> Any:
        return json.loads(self.body)

    def _may_write(self, name: str) -> Answer | None:
        if self.token != TOKEN:
            return Answer.of({"error": "Invalid username or password."}, 401)
        if name.partition("/")[0] != USER:
            return Answer.of({"error": f"You don't have the rights to write to {name}"}, 403)
        return None

    def _visible(self, name: str) -> Repository | None:
        found = self.hub.repositories.get(name)
        return None if found is None or (found.private and self.token != TOKEN) else found

    def whoami(self) -> Answer:
        if self.token != TOKEN:
            return Answer.of({"error": "Invalid user token."}, 401)
        return Answer.of({"type": "user", "name": USER, "orgs": []})

    def create(self) -> Answer:
        name = f"{self.data.get('organization') or USER}/{self.data['name']}"
        if refused := self._may_write(name):
            return refused
        if name in self.hub.repositories:
            return Answer.of({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
        self.hub.new(name, private=self.data.get("visibility") == "private" or bool(self.data.get("private")))
        return Answer.of({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def delete(self) -> Answer:
        name = f"{self.data.get('organization') or USER}/{self.data['name']}"
        if refused := self._may_write(name):
            return refused
        del self.hub.repositories[name]
        return Answer.of({})

    def validate_yaml(self) -> Answer:
        return Answer.of({"errors": [], "warnings": []})

    def info(self, name: str, revision: str = "main") -> Answer:
        repository = self._visible(name)
        if repository is None:
            return NO_REPOSITORY
        if (oid := repository.find(revision)) is None:
            return NO_REVISION
        listed = [{"rfilename": file} for file in repository.files(oid)]
        about = {"_id": "0" * 24, "id": name, "modelId": name, "sha": oid, "private": repository.private, "tags": []}
        return Answer.of({**about, "siblings": listed, "disabled": False, "gated": False, "downloads": 0, "likes": 0})

    def tree(self, name: str, revision: str) -> Answer:
        repository = self._visible(name)
        if repository is None:
            return NO_REPOSITORY
        if (oid := repository.find(revision)) is None:
            return NO_REVISION
        files = {**repository.files(oid), **dict.fromkeys(self.hub.extra_tree, b"hostile")}
        folders = {parent for path in files for parent in _parents(path)}
        listed = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
        return Answer.of([*listed, *(self._listed(path, content) for path, content in files.items())])

    def _listed(self, path: str, content: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
        large = hashlib.sha256(content).hexdigest()
        if large in self.hub.objects:
            entry["lfs"] = {"oid": large, "size": len(content), "pointerSize": 134}
        return entry

    def commits(self, name: str, revision: str) -> Answer:
        repository = self.hub.repositories[name]
        page = int(self.query.get("p", ["0"])[0])
        told = [
            {"id": c.oid, "authors": [], "date": DATE, "title": c.title, "message": c.description}
            for c in repository.behind(repository.find(revision))
        ]
        return Answer.of(told if page == 0 else [])

    def paths_info(self, name: str, revision: str) -> Answer:
        repository, asked = self.hub.repositories[name], parse_qs(self.body.decode())
        oid = repository.find(revision)
        assert oid is not None
        found = [(path, content) for path, content in repository.files(oid).items() if path in asked["paths"]]
        last = {path: repository.last_change(path, oid) for path, _ in found}
        expand = asked.get("expand", [""])[0].lower() == "true"
        told = {p: {"lastCommit": {"id": c.oid, "title": c.title, "date": DATE}} for p, c in last.items()}
        return Answer.of([{**self._listed(path, content), **(told[path] if expand else {})} for path, content in found])

    def branch(self, name: str, branch: str) -> Answer:
        if refused := self._may_write(name):
            return refused
        repository = self.hub.repositories[name]
        if branch in repository.branches:
            return Answer.of({"error": "Reference already exists"}, 409)
        repository.branches[branch] = repository.branches["main"]
        return Answer.of({})

    def remove_branch(self, name: str, branch: str) -> Answer:
        if refused := self._may_write(name):
            return refused
        del self.hub.repositories[name].branches[branch]
        return Answer.of({})

    def preupload(self, name: str, revision: str) -> Answer:
        if (repository := self._visible(name)) is None:
            return NO_REPOSITORY
        if (oid := repository.find(revision)) is None:
            return NO_REVISION
        there, modes = repository.files(oid), []
        for file in self.data["files"]:
            path, large = file["path"], file["path"].endswith(".safetensors")
            ignored = bool(self.hub.gitignored and re.fullmatch(self.hub.gitignored, path))
            content = there.get(path)
            known = hashlib.sha256(content).hexdigest() if content is not None and large else None
            oid_there = known if large else git_oid(content) if content is not None else None
            mode = "lfs" if large else "regular"
            modes.append({"path": path, "uploadMode": mode, "shouldIgnore": ignored, "oid": oid_there})
        return Answer.of({"files": modes})

    def batch(self, name: str) -> Answer:
        if refused := self._may_write(name):
            return refused
        listed = []
        for wanted in self.data["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/objects/{wanted['oid']}"}}
            listed.append(entry)
        return Answer.of({"transfer": "basic", "objects": listed})

    def store(self, oid: str) -> Answer:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return Answer.of({"error": "another file than was announced"}, 400)
        self.hub.objects[oid] = self.body
        return Answer()

    def commit(self, name: str, revision: str) -> Answer:
        if refused := self._may_write(name):
            return refused
        repository = self.hub.repositories[name]
        if self.hub.before_commit is not None:
            self.hub.before_commit(repository)
        head = repository.branches[revision]
        files, title, parent, description = dict(repository.files(revision)), "", None, ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                title, parent = value["summary"], value.get("parentCommit")
                description = value.get("description", "")
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        if parent is not None and parent != head:
            return Answer.of({"error": "A commit has happened since. Please refresh and try again."}, 412)
        made = Commit(title, head, files, description)
        done = {"success": True, "commitOid": made.oid, "commitUrl": f"{self.hub.url}/{name}/commit/{made.oid}"}
        if self.query.get("create_pr") == ["1"]:
            repository.add(made, "refs/pr/1")
            return Answer.of({**done, "pullRequestUrl": f"{self.hub.url}/{name}/discussions/1"})
        repository.add(made, revision)
        return Answer.of({**done, "hookOutput": ""})

    def resolve(self, name: str, revision: str, file: str) -> Answer:
        repository = self._visible(name)
        if repository is None:
            return NO_REPOSITORY
        if (oid := repository.find(revision)) is None:
            return NO_REVISION
        files = {**repository.files(oid), **dict.fromkeys(self.hub.extra_tree, b"hostile")}
        if file not in files:
            missing = {"X_Error_Code": "EntryNotFound", "X_Repo_Commit": oid}
            return Answer.of({"error": "Entry not found"}, 404, **missing)
        content = files[file]
        large = hashlib.sha256(content).hexdigest()
        tag = large if large in self.hub.objects else git_oid(content)
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": oid, "Content-Type": "application/octet-stream"}
        return Answer(200, content, headers)


Route = Callable[..., Answer]
ROUTES: list[tuple[str, Route]] = [
    (r"GET /api/whoami-v2", Asked.whoami),
    (r"POST /api/repos/create", Asked.create),
    (r"DELETE /api/repos/delete", Asked.delete),
    (r"POST /api/validate-yaml", Asked.validate_yaml),
    (rf"GET /api/models/{_REPOSITORY}(/revision/(?P<revision>[^/]+))?", Asked.info),
    (rf"GET /api/models/{_REPOSITORY}/tree/(?P<revision>[^/]+)", Asked.tree),
    (rf"GET /api/models/{_REPOSITORY}/commits/(?P<revision>[^/]+)", Asked.commits),
    (rf"POST /api/models/{_REPOSITORY}/paths-info/(?P<revision>[^/]+)", Asked.paths_info),
    (rf"POST /api/models/{_REPOSITORY}/branch/(?P<branch>[^/]+)", Asked.branch),
    (rf"DELETE /api/models/{_REPOSITORY}/branch/(?P<branch>[^/]+)", Asked.remove_branch),
    (rf"POST /api/models/{_REPOSITORY}/preupload/(?P<revision>[^/]+)", Asked.preupload),
    (rf"POST /api/models/{_REPOSITORY}/commit/(?P<revision>[^/]+)", Asked.commit),
    (rf"POST /{_REPOSITORY}\.git/info/lfs/objects/batch", Asked.batch),
    (r"PUT /objects/(?P<oid>\w+)", Asked.store),
    (rf"(GET|HEAD) /{_REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", Asked.resolve),
]


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _parents(path: str) -> Iterator[str]:
    parts = path.split("/")[:-1]
    for length in range(1, len(parts) + 1):
        yield "/".join(parts[:length])


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # header and body in one packet: else each answer waits for an acknowledgement

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def _read(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", "").lower():
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)

        def _serve(self) -> None:
            kind, _, token = self.headers.get("Authorization", "").partition(" ")
            asked = Asked(hub, self.command, self.path, body=self._read(), token=token if kind == "Bearer" else None)
            answer = asked.answer()
            self.send_response(answer.status)
            for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    return Handler


@contextmanager
def running() -> Iterator[FakeHub]:
    """A Hub that listens until the block ends."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
