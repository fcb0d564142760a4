"""As much of a W&B server as opens runs and takes their rows, on loopback."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """Listens until it is closed; `taken` holds what the runs have sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.taken: list[dict[str, Any]] = []
        self.silence: threading.Event | None = None
        """Where it is set, rows get no answer before it happens."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def listening() -> Iterator[Server]:
    """A server that ends with the block, at the latest."""
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        if server.silence:
            server.silence.set()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if "file_stream" in self.path:
            if self.server.silence:
                self.server.silence.wait(60)
                return
            self.server.taken.append(json.loads(body))
        data = json.dumps(_answer(self.path, body)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        del format, args


def _answer(path: str, body: bytes) -> dict[str, Any]:
    if "file_stream" in path:
        return {}
    if b"RunResumeStatus" in body:
        return {"data": {"model": None}}
    if b"upsertBucket" in body:
        name = json.loads(body)["variables"]["name"]
        project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
        bucket = {"id": name, "name": name, "displayName": name, "project": project}
        bucket |= {"config": "{}", "sweepName": None, "historyLineCount": 0}
        return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
    return {"errors": [{"message": "not here"}]}
