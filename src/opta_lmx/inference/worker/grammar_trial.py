"""A grammar is first compiled in a process of its own, which may be killed; only then does the worker compile it.

Not everything is bounded by llguidance's limits (1.9.1): four numbers in ``multipleOf`` keep it busy for minutes and
take gigabytes, and a chain of a thousand references overflows the stack and ends the process. ``GrammarTrial`` is the
worker's side, called by ``structured.py``; ``main`` is the process. It knows no vocabulary: what a grammar costs beside
the model's own tokens is looked at in ``structured.py``.
"""

import os
import resource
import socket
import subprocess
import sys
import threading
import time
import weakref
from contextlib import suppress
from typing import Final, NoReturn

import msgspec
import psutil
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

# llguidance's own but for two. A state of a lexer takes 1 to 2 kB, and each running answer may have its own: 100 MB at
# most. Verbose errors hold the answer so far.
LIMITS: Final = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)

# For one grammar; schemas in use take 1 to 60 ms, an enum of 10,000 words 40 ms (one core of a shared x86 server).
MOST_SECONDS: Final = 2.0

# Of the whole process, which has 40 MiB before its first grammar. Time is the narrower bound for nearly all: what was
# seen to grow does so by 100 MB a second.
_MOST_BYTES: Final = 512 * 1024**2

# Less than the worker's threads have, where what was compiled here is compiled again.
_STACK_BYTES: Final = 4 * 1024**2

# How often the process looks at its own memory.
_LOOK_SECONDS: Final = 0.02

# To start and import llguidance: 0.15 s on the same server.
_START_SECONDS: Final = 10.0

_TOO_MUCH_MEMORY: Final = 3


class GrammarTrial:
    """One process, started for the first grammar, and anew after one that ended it. Used by one thread at a time."""

    def __init__(self, most_bytes: int = _MOST_BYTES) -> None:
        """``most_bytes`` is for the whole process."""
        self._most_bytes = most_bytes
        self._process: _Process | None = None

    def fault(self, grammar: str, most_seconds: float = MOST_SECONDS) -> str | None:
        """What is against a grammar, in the compiler's words or ours; None if it compiles within the bounds."""
        if self._process is None or not self._process.lives:
            try:
                self._process = _Process(self._most_bytes)
            except OSError:
                return "the process in which it would be compiled did not start"
        try:
            answer = self._process.ask(grammar, most_seconds)
        except TimeoutError:
            self._process.end()
            return f"it takes more than {most_seconds:.2g} s to compile"
        if answer is None:
            if self._process.end() == _TOO_MUCH_MEMORY:
                return f"it takes more than {self._most_bytes // 1024**2} MiB to compile"
            return "its parts are nested, or refer to each other, too deeply"
        return answer or None


class _Process:
    """The process and the socket it answers on, which is also its lifeline."""

    def __init__(self, most_bytes: int) -> None:
        """Returns when it has started; raises OSError if it does not."""
        self._socket, theirs = socket.socketpair()
        # Its standard error would be the worker's, where a compiler that fails may quote what it compiles.
        self._popen = subprocess.Popen(
            [sys.executable, "-m", __name__, str(most_bytes)],
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        theirs.close()
        self._lines = self._socket.makefile("rwb")
        self.end = weakref.finalize(self, _end, self._popen, self._socket)
        self.end.atexit = False
        self._socket.settimeout(_START_SECONDS)
        if not self._lines.readline():
            raise ConnectionError

    @property
    def lives(self) -> bool:
        return self.end.alive and self._popen.poll() is None

    def ask(self, grammar: str, most_seconds: float) -> str | None:
        """The fault, empty without one, or None if the process ended over it; raises TimeoutError."""
        try:
            self._socket.settimeout(most_seconds)
            self._lines.write(msgspec.json.encode(grammar) + b"\n")
            self._lines.flush()
            answer = self._lines.readline()
        except ConnectionError:
            return None
        return msgspec.json.decode(answer, type=str) if answer else None


def _end(process: subprocess.Popen[bytes], its_socket: socket.socket) -> int:
    """Kill the process unless it has ended; gives its exit code."""
    its_socket.close()
    if process.poll() is None:
        process.kill()
    return process.wait()


class _Watch:
    """Ends the process when a grammar takes too much memory, or too long for a worker that no longer waits for it."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._busy = threading.Event()
        self._since = 0.0

    def begin(self) -> None:
        self._since = time.monotonic()
        self._busy.set()

    def done(self) -> None:
        self._busy.clear()

    def run(self) -> NoReturn:
        # Not the peak that getrusage knows: on Linux that is at first the peak of the worker, model and all.
        process = psutil.Process()
        while True:
            self._busy.wait()
            if process.memory_info().rss > self._most_bytes:
                os._exit(_TOO_MUCH_MEMORY)
            if time.monotonic() - self._since > 2 * MOST_SECONDS:
                os._exit(1)
            time.sleep(_LOOK_SECONDS)


def _answer_all(watch: _Watch) -> None:
    table = LLTokenizer("byte")
    lines = socket.socket(fileno=sys.stdin.fileno()).makefile("rwb")
    with suppress(ConnectionError):
        lines.write(b"ready\n")
        lines.flush()
        for line in lines:
            watch.begin()
            fault = _try(table, msgspec.json.decode(line, type=str))
            watch.done()
            lines.write(msgspec.json.encode(fault) + b"\n")
            lines.flush()
    os._exit(0)


def _try(table: LLTokenizer, grammar: str) -> str:
    """Everything that a worker will do to the grammar: compile, copy, ask for the first mask, drop."""
    matcher = LLMatcher(table, grammar, log_level=0, limits=LIMITS)
    if not matcher.is_error():
        copy = matcher.deep_copy()
        copy.compute_bitmask()
    return matcher.get_error()


def main() -> NoReturn:
    """Entry point: ``python -m opta_lmx.inference.worker.grammar_trial BYTES``, with a socket as standard input."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    watch = _Watch(int(sys.argv[1]))
    threading.stack_size(_STACK_BYTES)
    threading.Thread(target=_answer_all, args=(watch,), name="trial", daemon=True).start()
    watch.run()


if __name__ == "__main__":
    main()
