"""A server for the command line to speak with: it answers what the test says, and keeps what it was sent."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


@dataclass
class FakeServer:
    """Answers every request with ``status`` and ``body``, and keeps what it was sent."""

    url: str = ""
    status: int = 200
    body: bytes = b"{}"
    interrupt: bool = False
    # What is answered only once something else has been.
    slow: str = ""
    others: threading.Event = field(default_factory=threading.Event)
    seen: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)

    def answer(self, body: object, status: int = 200) -> None:
        self.status, self.body = status, json.dumps(body).encode()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """A server on loopback, answered from a thread."""
    fake = FakeServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            sent = json.loads(self.rfile.read(length)) if length else None
            fake.seen.append((f"{self.command} {self.path}", dict(self.headers.items()), sent))
            if fake.seen[-1][0] == fake.slow:
                fake.others.wait(timeout=10)
            else:
                fake.others.set()
            if fake.interrupt:
                os.kill(os.getpid(), signal.SIGINT)
                return
            self.send_response(fake.status)
            self.send_header("Content-Length", str(len(fake.body)))
            self.end_headers()
            self.wfile.write(fake.body)

        def do_POST(self) -> None:
            self.do_GET()

        def do_DELETE(self) -> None:
            self.do_GET()

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        fake.url = f"http://127.0.0.1:{http.server_port}"
        try:
            yield fake
        finally:
            http.shutdown()
            thread.join(timeout=5)
