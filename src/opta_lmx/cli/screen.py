"""A terminal taken over for a while: drawn again and again, and given back as it was."""

import os
import select
import signal
import sys
import termios
import tty
from collections.abc import Iterable
from types import FrameType, TracebackType
from typing import Any, Final, Self

# The second screen, on which what was there before stays untouched; and no cursor.
_TAKE: Final = "\x1b[?1049h\x1b[?25l"
_GIVE_BACK: Final = "\x1b[?25h\x1b[?1049l"
_HOME: Final = "\x1b[H"
_CLEAR_LINE: Final = "\x1b[K"
_CLEAR_BELOW: Final = "\x1b[J"

# What would end the process without giving the terminal back.
_ENDS: Final = (signal.SIGTERM, signal.SIGHUP)


class Screen:
    """The terminal on standard output, for the length of a ``with``; keys come from standard input if that is one.

    SIGINT raises KeyboardInterrupt meanwhile, SIGTERM and SIGHUP SystemExit with the code the shell would show.
    """

    def __init__(self) -> None:
        self._keys: list[Any] | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._handlers = {number: signal.signal(number, _end) for number in _ENDS}
        # Whoever started us may have had it ignored.
        self._handlers[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
        if sys.stdin.isatty():
            self._keys = termios.tcgetattr(sys.stdin)
            tty.setcbreak(sys.stdin)
        _write(_TAKE)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _write(_GIVE_BACK)
        if self._keys is not None:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._keys)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def draw(self, lines: Iterable[str]) -> None:
        """Put ``lines`` in the place of those before: none wider than the terminal, and one less than it is high."""
        # Cleared before it is written: behind a line as wide as the terminal its last character would go.
        _write(_HOME + "".join(f"{_CLEAR_LINE}{line}\n" for line in lines) + _CLEAR_BELOW)

    def keys(self, seconds: float) -> str:
        """What was typed as soon as something was, or empty after so many seconds."""
        ready, _, _ = select.select([sys.stdin] if self._keys is not None else [], [], [], seconds)
        return os.read(sys.stdin.fileno(), 64).decode(errors="replace") if ready else ""


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _end(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
