"""``opta-lmx top`` and ``bench`` against a real server, the first on a real terminal."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from opta_lmx.cli import main
from opta_lmx.cli.failure import ExitCode
from opta_lmx.types import EchoOptions
from tests.integration.chatting import CHAT, chat, words
from tests.integration.conftest import RunningServer, StartServer

TAKE, GIVE_BACK = b"\x1b[?1049h\x1b[?25l", b"\x1b[?25h\x1b[?1049l"

# Seconds. Top draws every second.
_BOUND = 10.0


@dataclass
class Terminal:
    """A command on a terminal of 24 lines with 80 columns."""

    process: subprocess.Popen[bytes]
    fd: int
    shown: bytes = b""

    def read_until(self, words: bytes) -> None:
        """Fails if the command ends before it has shown them, or does not in time."""
        deadline = time.monotonic() + _BOUND
        while words not in self.shown:
            if time.monotonic() > deadline or not self._read():
                pytest.fail(f"not shown: {self.shown!r}")

    def read_rest(self) -> int:
        """To its end; the exit code."""
        while self._read():
            pass
        return self.process.wait(_BOUND)

    def _read(self) -> bool:
        """False at the end."""
        ready, _, _ = select.select([self.fd], [], [], _BOUND)
        assert ready, self.shown
        try:
            self.shown += (data := os.read(self.fd, 65536))
        except OSError:  # how Linux tells of the end
            return False
        return bool(data)


@contextmanager
def terminal(*arguments: str, **environ: str) -> Iterator[Terminal]:
    """``opta-lmx`` on a terminal; it is ended with the block."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OPTA_LMX")}
    process = subprocess.Popen(
        [sys.executable, "-m", "opta_lmx", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**kept, "TERM": "xterm", "NO_COLOR": "1", **environ},
        start_new_session=True,
    )
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        process.kill()
        process.wait(10)
        os.close(ours)


@contextmanager
def streaming(lmx: RunningServer, request_id: str) -> Iterator[None]:
    """A request that is under way for as long as the block."""
    body = chat("slow", words(500), stream=True)
    headers = {"x-request-id": request_id}
    with lmx.client() as client, client.stream("POST", CHAT, json=body, headers=headers) as response:
        chunks = response.iter_bytes()
        next(chunks)
        yield


def test_top_shows_a_request_and_gives_the_terminal_back(
    server: StartServer, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    """A client's id is on the screen while its answer streams; however top is ended, the terminal is as before."""
    lmx = server({"slow": EchoOptions(token_seconds=0.02)})

    def end_by_key(top: Terminal) -> None:
        os.write(top.fd, b"xq")

    def end_by_interrupt(top: Terminal) -> None:
        top.process.send_signal(signal.SIGINT)

    def end_by_signal(top: Terminal) -> None:
        top.process.terminate()

    with streaming(lmx, "my-own-id"):
        for end, code in ((end_by_key, 0), (end_by_interrupt, 0), (end_by_signal, 128 + signal.SIGTERM)):
            with subtests.test(end.__name__), terminal("top", "--url", lmx.url, HOME=str(tmp_path)) as top:
                before = termios.tcgetattr(top.fd)
                top.read_until(b"my-own-id")
                assert termios.tcgetattr(top.fd) != before
                end(top)
                assert top.read_rest() == code
                assert termios.tcgetattr(top.fd) == before
                assert top.shown.startswith(TAKE)
                assert top.shown.endswith(GIVE_BACK)
                assert b"\x1b[1m" not in top.shown, "NO_COLOR"


def test_top_watches_on_when_the_server_has_gone(server: StartServer, tmp_path: Path) -> None:
    """It says so above what it saw last, and q still ends it well."""
    lmx = server({"slow": EchoOptions()})
    with terminal("top", "--url", lmx.url, HOME=str(tmp_path)) as top:
        top.read_until(b"0 running")
        lmx.stop()
        top.read_until(b"error: no server answers")
        os.write(top.fd, b"q")
        assert top.read_rest() == 0


def test_bench_measures_a_real_server(server: StartServer, capsys: pytest.CaptureFixture[str]) -> None:
    """All tokens that were asked for are counted, at the pace the model was given."""
    lmx = server({"slow": EchoOptions(token_seconds=0.005)})
    command = ["bench", "slow", "--concurrency", "2", "--requests", "4", "--max-tokens", "20", "--json"]
    assert main([*command, "--url", lmx.url]) == ExitCode.DONE
    [turn] = json.loads(capsys.readouterr().out)["turns"]
    assert (turn["errors"], turn["completion_tokens"]) == (0, 80)
    assert turn["itl_p50_seconds"] >= 0.004
    assert turn["tokens_per_second"] <= 2 / 0.005
