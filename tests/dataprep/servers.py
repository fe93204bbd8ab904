"""A web server with faults, in a thread of the test."""

import contextlib
import hashlib
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Web:
    """Serves ``files`` by path; a path may have ``faults``, of which each request takes one."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[Any]] = {}
        self.requests: list[tuple[str, str]] = []  # path, range

    def address(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/{path}"

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"


@contextlib.contextmanager
def web() -> Iterator[Web]:
    """A fault is a status, a (status, headers) pair, or a word: see the code."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.lstrip("/").partition("?")[0]
            served.requests.append((path, self.headers.get("Range", "")))
            waiting = served.faults.get(path)
            fault = waiting.pop(0) if waiting else None
            data = served.files.get(path)
            if isinstance(fault, int):
                return self.answer(fault, {}, b"")
            if isinstance(fault, tuple):
                return self.answer(fault[0], fault[1], data or b"")
            if data is None:
                return self.answer(404, {}, b"")
            headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()[:16]}"'}
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if fault == "cut":  # a connection that ends in the middle
                return self.answer(200, headers | {"Content-Length": str(len(data))}, data[: len(data) // 2], close=True)
            if fault == "endless":  # and of no known length
                self.send_response(200)
                self.send_header("Connection", "close")
                self.end_headers()
                with contextlib.suppress(OSError):
                    while True:
                        self.wfile.write(bytes(1 << 16))
            elif fault == "silent":
                time.sleep(3)
                self.close_connection = True
            elif wanted and fault != "no ranges":
                begin, end = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
                headers["Content-Range"] = f"bytes {begin}-{end}/{len(data)}" if data else "bytes */0"
                self.answer(206 if data else 416, headers, data[begin : end + 1])
            else:
                self.answer(200, headers, data)
            return None

        def answer(self, status: int, headers: dict[str, str], data: bytes, close: bool = False) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(data))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)
            self.close_connection = close

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    served = Web(server.server_port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
