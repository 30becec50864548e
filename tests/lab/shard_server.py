"""An HTTP server of shards that misbehaves as its urls say."""

from __future__ import annotations

import gzip
import random
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BODY = random.Random(0).randbytes(1 << 20)


class _Handler(BaseHTTPRequestHandler):
    """Paths are /BEHAVIOUR/COUNT/anything: the first COUNT requests misbehave, the rest are served well."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        with self.server.mutex:
            self.server.requests.append(self.path)
            count = self.server.requests.count(self.path)
        behaviour, times = self.path.split("/")[1:3]
        if count > int(times):
            behaviour = "good"
        body = BODY[:1000] if behaviour == "short_unnoticed" else BODY
        if behaviour in ("404", "403", "503"):
            return self._answer(int(behaviour), 0)
        if behaviour == "hang":
            self.server.released.wait(30)
        if behaviour == "gzip":
            body = gzip.compress(BODY)
        self._answer(200, len(body), {"Content-Encoding": "gzip"} if behaviour == "gzip" else {})
        if behaviour == "slow":
            for i in range(0, len(body), 1 << 17):
                self.wfile.write(body[i : i + (1 << 17)])
                time.sleep(0.25)
        elif behaviour in ("drop", "short", "stall"):
            self.wfile.write(body[: len(body) // 2])
            if behaviour == "stall":
                self.server.released.wait(30)
            if behaviour == "drop":  # a reset, not an orderly end
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                self.connection.close()
            self.close_connection = True
        else:
            self.wfile.write(body)

    def _answer(self, status: int, length: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Counts requests by path."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.mutex = threading.Lock()
        self.requests: list[str] = []
        self.released = threading.Event()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"

    def handle_error(self, *_: object) -> None:
        pass  # clients that hang up are part of the tests
