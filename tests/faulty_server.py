"""A web server on loopback that fails as it is told: over a folder, or before another server."""

from __future__ import annotations

import http.client
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

Kind = Literal[
    "unavailable", "missing", "forbidden",
    "reset", "truncated", "longer", "flipped", "hung", "slow", "endless",
]  # fmt: skip
STATUS = {"unavailable": 503, "missing": 404, "forbidden": 403}
HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "date", "server"}


@dataclass
class Fault:
    """What happens to the next requests (GET) for paths that match."""

    path: str
    kind: Kind
    times: int = 1_000_000


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path | None, upstream: tuple[str, int] | None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.upstream = upstream
        self.faults: list[Fault] = []
        self.gets: list[str] = []
        """Paths asked for, in order, those that failed too."""
        self.sent = 0
        """Bytes of bodies that have no end."""
        self.closing = threading.Event()
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def count(self, name: str) -> int:
        """GET requests for paths that end with `name`."""
        return sum(path.endswith(name) for path in self.gets)

    def fault(self, path: str) -> Kind | None:
        with self._lock:
            self.gets.append(path)
            for fault in self.faults:
                if fault.times and re.search(fault.path, path):
                    fault.times -= 1
                    return fault.kind
        return None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> tuple[int, list[tuple[str, str]], bytes]:
        if self.server.folder is not None:
            file = self.server.folder / unquote(self.path).lstrip("/")
            return (200, [], file.read_bytes()) if file.is_file() else (404, [], b"nothing here")
        assert self.server.upstream is not None
        connection = http.client.HTTPConnection(*self.server.upstream, timeout=30)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        connection.request(self.command, self.path, body, headers)
        response = connection.getresponse()
        kept = [(name, value) for name, value in response.getheaders() if name.lower() not in HOP_BY_HOP]
        return response.status, kept, response.read()

    def do_GET(self) -> None:
        if self.server.closing.is_set():  # a connection that was kept alive
            self.close_connection = True
            return
        kind = self.server.fault(self.path.partition("?")[0]) if self.command == "GET" else None
        status, headers, content = self._answer()
        if kind in STATUS:
            status, headers, content = STATUS[kind], [], b"injected"
        if kind == "flipped":
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        if kind == "longer":
            content += b"more"
        if kind == "slow":
            time.sleep(1.0)
        if kind == "endless":
            self._never_end()
            return
        self._send_head(status, headers, len(content))
        if kind in ("reset", "truncated", "hung"):
            self._break_off(kind, content[: len(content) // 2])
        elif self.command != "HEAD":
            self.wfile.write(content)

    def _send_head(self, status: int, headers: list[tuple[str, str]], length: int) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def _never_end(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.close_connection = True
        with suppress(ConnectionError):
            while not self.server.closing.is_set():
                self.wfile.write(bytes(1 << 16))
                self.server.sent += 1 << 16

    def _break_off(self, kind: Kind, content: bytes) -> None:
        self.wfile.write(content)
        self.wfile.flush()
        if kind == "hung":
            self.server.closing.wait(60)
        if kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        self.close_connection = True

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815


@contextmanager
def serving(folder: Path | None = None, upstream: tuple[str, int] | None = None) -> Iterator[Server]:
    """A running server over `folder`, or before the server at `upstream`."""
    server = Server(folder, upstream)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
