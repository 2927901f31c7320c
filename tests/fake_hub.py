"""A Hugging Face Hub on 127.0.0.1 that speaks what ``huggingface_hub`` needs to download a model."""

import contextlib
import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Repository:
    """A model on the Hub: the files of each commit, the commits that branches and tags stand for, and who may read.

    ``cut`` names files of which only the first half is ever sent.
    """

    commits: dict[str, dict[str, bytes]]
    references: dict[str, str]
    token: str | None = None
    gated: bool = False
    forbidden: bool = False
    cut: set[str] = field(default_factory=set)


def repository_of(directory: Path, *tags: str, **options: Any) -> Repository:
    """Return the model in ``directory`` as a repository of one commit, to which ``main`` and ``tags`` refer."""
    files = {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
    commit = hashlib.sha1(json.dumps({name: digest(data) for name, data in files.items()}).encode()).hexdigest()
    return Repository({commit: files}, dict.fromkeys(("main", *tags), commit), **options)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class FakeHub:
    """The running server: where it is, what it has, and what was asked of it."""

    endpoint: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def downloaded(self) -> set[str]:
        """Return the names of the files whose bytes were asked for."""
        return {path.split("/resolve/")[1].split("/", 1)[1] for path in self._of("GET") if "/resolve/" in path}

    def _of(self, method: str) -> list[str]:
        return [request.split(" ", 1)[1] for request in self.requests if request.startswith(f"{method} ")]


@contextlib.contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Run a Hub without models for the length of a block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = FakeHub(f"http://127.0.0.1:{server.server_port}")
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub: FakeHub = self.server.hub  # type: ignore[attr-defined]
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        if path.startswith("/api/models/"):
            name, kind, rest = _split(path.removeprefix("/api/models/"), ("/revision/", "/tree/"))
        else:
            name, kind, rest = _split(path.removeprefix("/"), ("/resolve/",))
        repository = hub.repositories.get(name)
        if repository is None:
            # The Hub does not tell models that are not there from those that one may not see.
            self._refuse(401, None, "Invalid username or password.")
        elif repository.forbidden:
            self._refuse(403, None, "Your token may not read this.")
        elif repository.token is not None and self.headers.get("Authorization") != f"Bearer {repository.token}":
            if repository.gated:
                self._refuse(401, "GatedRepo", "Access to this model is restricted.")
            elif self.headers.get("Authorization"):
                self._refuse(401, None, "Invalid credentials in Authorization header")
            else:
                self._refuse(401, None, "Invalid username or password.")
        else:
            self._serve(repository, name, kind, rest)

    def _serve(self, repository: Repository, name: str, kind: str, rest: str) -> None:
        known = {**repository.references, **{commit: commit for commit in repository.commits}}
        revision = next((r for r in known if rest == r or rest.startswith(f"{r}/")), "main" if not rest else None)
        if revision is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {rest}")
            return
        commit = known[revision]
        files = repository.commits[commit]
        if kind == "/tree/":
            entries = [
                {"type": "file", "path": file, "size": len(data), "oid": digest(data)[:40]}
                for file, data in files.items()
            ]
            self._send(json.dumps(entries).encode())
        elif kind == "/resolve/":
            self._send_file(repository, files, rest.removeprefix(f"{revision}/"), commit)
        else:
            siblings = [{"rfilename": file, "size": len(data)} for file, data in files.items()]
            self._send(json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode())

    def _send_file(self, repository: Repository, files: dict[str, bytes], file: str, commit: str) -> None:
        data = files.get(file)
        if data is None:
            self._refuse(404, "EntryNotFound", f"no {file}")
            return
        sent = data[: len(data) // 2] if file in repository.cut and self.command == "GET" else data
        self._send(data, {"ETag": f'"{digest(data)}"', "X-Repo-Commit": commit}, sent)
        if sent is not data:
            self.close_connection = True

    def _send(self, data: bytes, headers: dict[str, str] | None = None, sent: bytes | None = None) -> None:
        self.send_response(200)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data if sent is None else sent)

    def _refuse(self, status: int, code: str | None, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        self.send_response(status)
        if code is not None:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _split(path: str, kinds: tuple[str, ...]) -> tuple[str, str, str]:
    """Return a model's name, what is asked of it, and the rest of the path."""
    for kind in kinds:
        name, found, rest = path.partition(kind)
        if found:
            return name, kind, rest
    return path, "", ""
