"""A Hugging Face Hub on 127.0.0.1 that takes one upload of a folder, as ``huggingface_hub`` makes it.

Small text files come with the commit; large ones come before, in one piece or in many.
"""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

CHUNK: Final = 5000
COMMIT: Final = "0" * 40


@dataclass
class Uploads:
    """What has been uploaded: the pieces by hash, and the files of the commit by name."""

    endpoint: str
    pieces: dict[str, dict[int, bytes]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)


@contextlib.contextmanager
def fake_uploads() -> Iterator[Uploads]:
    """Run the Hub for the length of a block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    uploads = Uploads(f"http://127.0.0.1:{server.server_port}")
    server.uploads = uploads  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield uploads
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    @property
    def uploads(self) -> Uploads:
        found: Uploads = self.server.uploads  # type: ignore[attr-defined]
        return found

    def do_GET(self) -> None:
        self._answer({"name": "me", "type": "user", "sha": COMMIT, "siblings": [], "id": "me/merged"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if "/preupload/" in self.path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif self.path.endswith("/objects/batch"):
            self._answer({"transfer": "multipart", "objects": [*map(self._upload_of, json.loads(body)["objects"])]})
        elif "/commit/" in self.path:
            self._commit([json.loads(line) for line in body.splitlines()])
            self._answer({"commitUrl": f"{self.uploads.endpoint}/me/merged/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self._answer({"url": f"{self.uploads.endpoint}/me/merged", "name": "me/merged", "id": "1"})

    def do_PUT(self) -> None:
        _, _, oid, number = self.path.split("/")
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.uploads.pieces.setdefault(oid, {})[int(number)] = data
        self._answer({}, {"ETag": hashlib.md5(data).hexdigest()})

    def _upload_of(self, one: dict[str, Any]) -> dict[str, Any]:
        """Say where the pieces of a file go; one that is as small as a piece goes as a whole."""
        where = f"{self.uploads.endpoint}/piece/{one['oid']}"
        count = -(-one["size"] // CHUNK)
        upload: dict[str, Any] = {"href": f"{where}/1"}
        if count > 1:
            upload["header"] = {"chunk_size": str(CHUNK)} | {str(n): f"{where}/{n}" for n in range(1, count + 1)}
        return {"oid": one["oid"], "size": one["size"], "actions": {"upload": upload}}

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        """Put the files together."""
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.uploads.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                pieces = self.uploads.pieces[value["oid"]]
                data = b"".join(pieces[number] for number in sorted(pieces))
                assert hashlib.sha256(data).hexdigest() == value["oid"]
                self.uploads.files[value["path"]] = data

    def _answer(self, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        for name, value in {"Content-Length": str(len(data)), "Content-Type": "application/json"}.items():
            self.send_header(name, value)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
