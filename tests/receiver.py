"""A receiver of webhooks: answers as it is told to, and keeps what it got."""

from __future__ import annotations

import http.server
import queue
import ssl
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

CERTIFICATE = Path(__file__).with_name("hooks.example.pem")


class Received(NamedTuple):
    """A request as it arrived, and when on the monotonic clock; header names are in lower case."""

    path: str
    headers: dict[str, str]
    body: bytes
    at: float


class Answer(NamedTuple):
    """What the receiver says; a negative `body_bytes` is a body that never ends."""

    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    body_bytes: int = 0


class Receiver:
    """An HTTP or, with `tls`, HTTPS server on a free port of 127.0.0.1; it answers 200 unless told otherwise."""

    def __init__(self, *, tls: bool = False) -> None:
        self.names: list[str | None] = []
        self._received: queue.Queue[Received] = queue.Queue()
        self._answers: queue.Queue[Answer] = queue.Queue()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(CERTIFICATE)
            context.sni_callback = lambda _, name, __: self.names.append(name)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = int(self._server.server_address[1])
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self.port}/in"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def will_answer(self, *answers: Answer) -> None:
        for answer in answers:
            self._answers.put(answer)

    def take(self, timeout_s: float = 30) -> Received:
        """Return the next request, waiting for it."""
        return self._received.get(timeout=timeout_s)

    def waiting(self) -> int:
        """Return how many requests have not been taken."""
        return self._received.qsize()

    def __enter__(self) -> Receiver:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(receiver) -> type[http.server.BaseHTTPRequestHandler]:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                at = time.monotonic()
                body = self.rfile.read(int(self.headers["content-length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                try:
                    answer = receiver._answers.get_nowait()
                except queue.Empty:
                    answer = Answer()
                receiver._received.put(Received(self.path, headers, body, at))
                self.send_response(answer.status)
                for name, value in answer.headers:
                    self.send_header(name, value)
                if answer.body_bytes >= 0:
                    self.send_header("content-length", str(answer.body_bytes))
                self.end_headers()
                self._send_body(answer.body_bytes)

            def _send_body(self, size: int) -> None:
                try:
                    while size:
                        self.wfile.write(b"x" * min(1024, size) if size > 0 else b"x" * 1024)
                        size -= min(1024, size) if size > 0 else 0
                except OSError:
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                return

        return Handler
