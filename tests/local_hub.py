"""A model hub on this machine: enough of the protocol for the real client to fetch repositories from a folder."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

_REVISION = "a" * 40


class LocalHub(ThreadingHTTPServer):
    """Serves `root/org/name/*` as the files of the model `org/name`, and keeps the paths of the files it served."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.served: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def local_hub(root: Path) -> Iterator[LocalHub]:
    with LocalHub(root) as hub:
        thread = Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: LocalHub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *args: object, **kwargs: object) -> None:
        """Nothing on stderr."""

    def _answer(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        if path.startswith("api/models/"):
            org, name, *rest = path.removeprefix("api/models/").split("/")
            folder = self.server.root / org / name
            if not folder.is_dir():
                self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
                return
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            names = [str(file.relative_to(folder)) for file in files]
            if rest[:1] == ["tree"]:
                tree = [
                    {"type": "file", "path": name, "oid": _etag(file), "size": file.stat().st_size}
                    for name, file in zip(names, files, strict=True)
                ]
                self._send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
                return
            info = {"id": f"{org}/{name}", "sha": _REVISION, "siblings": [{"rfilename": name} for name in names]}
            self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
            return
        org, name, _, _, *rest = path.split("/")
        file = self.server.root / org / name / "/".join(rest)
        if self.command == "GET":
            self.server.served.append("/".join(rest))
        self._send(200, file.read_bytes(), {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": _REVISION})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
