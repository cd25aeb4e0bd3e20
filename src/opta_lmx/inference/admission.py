"""The door of one model: how many requests run, how many wait, and who is next. Bounds, first come first served.

One writer, the event loop: no ``await`` between reading and writing. The engine enters a request before it asks
for a lease and releases its slot when the request has ended.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable

from opta_lmx.errors import QueueFull

# A caller who comes back within a second costs more than it gains; one told more than a minute gives up.
MIN_RETRY_SECONDS = 1.0
MAX_RETRY_SECONDS = 60.0

# Enough releases to even out long and short answers, few enough to follow a change of traffic.
_RECENT_RELEASES = 16


class Slot:
    """The right of one request to run; ``release`` hands it to the next in line."""

    __slots__ = ("_give_back",)

    def __init__(self, give_back: Callable[[], None]) -> None:
        self._give_back: Callable[[], None] | None = give_back

    def release(self) -> None:
        """Give the slot back; harmless when done before."""
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back()


class Admission:
    """Lets ``max_running`` requests run and ``max_waiting`` wait; ``now`` is monotonic, in seconds."""

    def __init__(
        self, model_id: str, max_running: int, max_waiting: int, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._model_id = model_id
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._now = now
        self._running = 0
        # A dict for its order and for leaving from the middle; the values mean nothing.
        self._waiting: dict[asyncio.Future[None], None] = {}
        # When slots came free while all were taken: the speed of the queue.
        self._releases: deque[float] = deque(maxlen=_RECENT_RELEASES)

    async def enter(self) -> Slot:
        """A slot, at once or when those who came before have theirs; raises QueueFull if too many wait already."""
        if self._running < self._max_running:
            self._running += 1
            return Slot(self._leave)
        if len(self._waiting) >= self._max_waiting:
            raise QueueFull(self._model_id, len(self._waiting), self.retry_after_seconds())
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[turn] = None
        try:
            await turn
        except asyncio.CancelledError:
            self._waiting.pop(turn, None)
            if not turn.cancelled():
                # Called up in the same turn of the loop as it was cancelled: the slot goes to the next.
                self._leave()
            raise
        return Slot(self._leave)

    def reconfigure(self, max_running: int, max_waiting: int) -> None:
        """Take changed bounds. Those who run or wait already are sent away by neither."""
        self._max_running, self._max_waiting = max_running, max_waiting
        self._call_up()

    def depths(self) -> tuple[int, int]:
        """Requests that run, and requests that wait."""
        return self._running, len(self._waiting)

    def retry_after_seconds(self) -> float:
        """When a place in the queue should come free: the mean time between releases while all slots were taken.

        Between MIN_RETRY_SECONDS and MAX_RETRY_SECONDS; the former while too few releases are known.
        """
        gaps = len(self._releases) - 1
        mean = (self._releases[-1] - self._releases[0]) / gaps if gaps > 0 else 0.0
        return min(max(mean, MIN_RETRY_SECONDS), MAX_RETRY_SECONDS)

    def _leave(self) -> None:
        if self._running >= self._max_running:
            self._releases.append(self._now())
        else:
            self._releases.clear()
        self._running -= 1
        self._call_up()

    def _call_up(self) -> None:
        """Those first in line run, as far as there is room."""
        while self._waiting and self._running < self._max_running:
            turn = next(iter(self._waiting))
            del self._waiting[turn]
            if not turn.done():
                self._running += 1
                turn.set_result(None)
