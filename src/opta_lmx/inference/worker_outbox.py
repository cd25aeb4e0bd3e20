"""Frames on their way to one worker: in order, at the pace it reads, so many bytes in a turn of the event loop.

A transport that is given 10 MB at once joins and copies all of it there and then: 10 to 20 ms on a two-core machine, in
which nobody's stream gets on.
"""

import asyncio
from collections import deque
from collections.abc import Iterable

# Copying this much into a socket takes under a millisecond on any machine.
_TURN_BYTES = 256 * 1024


class Outbox:
    """What is still to be written to ``transport``. The protocol passes on ``pause`` and ``resume``."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._pieces: deque[memoryview] = deque()
        self._paused = False
        self._turn: asyncio.Handle | None = None

    def send(self, pieces: Iterable[bytes]) -> None:
        """One frame, in pieces that are not copied; nothing happens once the connection is closing."""
        if self._transport.is_closing():
            return
        for piece in pieces:
            view = memoryview(piece)
            self._pieces.extend(view[start : start + _TURN_BYTES] for start in range(0, len(view), _TURN_BYTES))
        if self._turn is None:
            self._write()

    def pause(self) -> None:
        """The transport has enough."""
        self._paused = True

    def resume(self) -> None:
        """The transport takes more."""
        self._paused = False
        if self._turn is None:
            self._write()

    def close(self) -> None:
        """The connection is lost: nothing more will be written."""
        self._pieces.clear()
        if self._turn is not None:
            self._turn.cancel()

    def _write(self) -> None:
        self._turn = None
        left = _TURN_BYTES
        while self._pieces and not self._paused and len(self._pieces[0]) <= left:
            piece = self._pieces.popleft()
            left -= len(piece)
            self._transport.write(piece)
        if self._pieces and not self._paused:
            self._turn = asyncio.get_running_loop().call_soon(self._write)
