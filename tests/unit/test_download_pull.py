"""``opta-lmx pull``: what it sends, what a terminal shows meanwhile, and how it ends."""

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from opta_lmx.cli import main
from opta_lmx.cli.failure import ExitCode


def state(state: str = "downloading", done: int = 0, **more: object) -> dict[str, object]:
    """A download of 4 MiB."""
    now = {"download_id": "d1", "repo_id": "a/b", "state": state, "done_bytes": done, "total_bytes": 4 * 2**20}
    return now | {"bytes_per_second": 0.0, "eta_seconds": None, "error": None} | more


@dataclass
class FakeServer:
    """Accepts a download and tells of ``events``; an event that is None interrupts the command."""

    url: str = ""
    events: list[dict[str, object] | None] = field(default_factory=lambda: [state("completed", 4 * 2**20)])
    seen: list[tuple[str, Any]] = field(default_factory=list)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    """A server on loopback, answered from a thread."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith("OPTA_LMX")]:
        monkeypatch.delenv(name)
    fake = FakeServer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            fake.seen.append((f"{self.command} {self.path}", json.loads(self.rfile.read(length) or b"null")))
            self._answer(202, json.dumps(state()).encode())

        def do_DELETE(self) -> None:
            self.do_POST()

        def do_GET(self) -> None:
            fake.seen.append((f"GET {self.path}", None))
            self.send_response(200)
            self.end_headers()
            for event in fake.events:
                if event is None:
                    os.kill(os.getpid(), signal.SIGINT)
                    return
                self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")

        def _answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        fake.url = f"http://127.0.0.1:{http.server_port}"
        try:
            yield fake
        finally:
            http.shutdown()
            thread.join(timeout=5)


@pytest.mark.parametrize(
    ("flags", "more"),
    [
        ([], {}),
        (["--revision", "v1"], {"revision": "v1"}),
        (["--include", "*Q4.gguf", "config.json"], {"allow_patterns": ["*Q4.gguf", "config.json"]}),
    ],
)
def test_what_is_asked_for(
    server: FakeServer, capsys: pytest.CaptureFixture[str], flags: list[str], more: dict[str, object]
) -> None:
    """Only what was said is sent; elsewhere than on a terminal only the end is told."""
    assert main(["pull", "a/b", *flags, "--url", server.url]) == ExitCode.DONE
    assert server.seen == [
        ("POST /admin/models/download", {"repo_id": "a/b"} | more),
        ("GET /admin/models/download/d1/progress", None),
    ]
    assert capsys.readouterr() == ("a/b downloaded and verified, 4.0 MiB\n", "")


def test_a_terminal_shows_a_bar(
    server: FakeServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each line takes the place of the one before, never wider than the terminal; at the end none is left."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    half = state(done=2 * 2**20, bytes_per_second=2.0**20, eta_seconds=62.9)
    server.events = [half, state("completed", 4 * 2**20)]
    assert main(["pull", "a/b", "--url", server.url]) == ExitCode.DONE
    lines = capsys.readouterr().err.split("\r\x1b[K")
    bar = "#" * 12 + "." * 12
    assert lines[1] == f"a/b [{bar}]  50%  2.0 MiB of 4.0 MiB  1.0 MiB/s  1:02 left"
    assert (lines[2].startswith(f"a/b [{'#' * 24}] 100%"), lines[3]) == (True, "")
    monkeypatch.setenv("COLUMNS", "30")
    assert main(["pull", "a/b", "--url", server.url]) == ExitCode.DONE
    assert max(map(len, capsys.readouterr().err.split("\r\x1b[K"))) == 29


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (state("failed", error={"message": "model.safetensors: expected aa, found bb."}), "expected aa, found bb."),
        (state("cancelled"), "the download of a/b was cancelled"),
        (state("downloading"), "goes on, but the server says no more of it"),
    ],
)
def test_an_end_that_is_none(
    server: FakeServer, capsys: pytest.CaptureFixture[str], last: dict[str, object], words: str
) -> None:
    """Exit 1 with the reason and how to go on; with --json the state is printed all the same."""
    server.events = [last]
    assert main(["pull", "a/b", "--url", server.url, "--json"]) == ExitCode.REFUSED
    output = capsys.readouterr()
    assert json.loads(output.out) == last
    error, hint = output.err.splitlines()
    assert words in error
    assert hint == "hint: opta-lmx pull a/b goes on with what is here"


def test_control_c_cancels_the_download(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    """The server is told before the command ends with 130."""
    server.events = [state(), None]
    assert main(["pull", "a/b", "--url", server.url]) == ExitCode.INTERRUPTED
    assert server.seen[-1] == ("DELETE /admin/models/download/d1", None)
    assert capsys.readouterr() == ("", "")
