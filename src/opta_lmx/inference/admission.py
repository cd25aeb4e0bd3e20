"""The door of one model: how many requests run, how many wait, and who is next (``fair_queue.py``).

One writer, the event loop: no ``await`` between reading and writing. The engine enters a request before it asks
for a lease and releases its slot when the request has ended.
"""

import asyncio
import sys
import time
from collections import deque
from collections.abc import Callable

from opta_lmx.errors import QueueFull
from opta_lmx.inference.fair_queue import FairQueue
from opta_lmx.types import ANYBODY, Caller, Lane

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


class _Pace:
    """How fast places come free while there is none."""

    def __init__(self) -> None:
        self._releases: deque[float] = deque(maxlen=_RECENT_RELEASES)

    def note_release(self, when: float, was_full: bool) -> None:
        """A place has come free; what came free while others were to be had says nothing."""
        if was_full:
            self._releases.append(when)
        else:
            self._releases.clear()

    def retry_after_seconds(self) -> float:
        """The mean time between releases, within the bounds; the lower one while too few are known."""
        gaps = len(self._releases) - 1
        mean = (self._releases[-1] - self._releases[0]) / gaps if gaps > 0 else 0.0
        return min(max(mean, MIN_RETRY_SECONDS), MAX_RETRY_SECONDS)


class Admission:
    """Lets ``max_running`` requests run and ``max_waiting`` wait; ``now`` is monotonic, in seconds.

    ``house`` bounds all models together.
    """

    def __init__(
        self,
        model_id: str,
        max_running: int,
        max_waiting: int,
        now: Callable[[], float] = time.monotonic,
        house: "House | None" = None,
    ) -> None:
        self._model_id = model_id
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._now = now
        self._house = house or House(sys.maxsize, sys.maxsize)
        self._house.add(self)
        self.running = 0
        self._waiting: FairQueue[asyncio.Future[None]] = FairQueue()
        self._pace = _Pace()

    @property
    def waiting(self) -> int:
        """Requests in line."""
        return len(self._waiting)

    @property
    def _is_full(self) -> bool:
        return self.running >= self._max_running or self._house.is_full

    async def enter(self, caller: Caller = ANYBODY) -> Slot:
        """A slot, at once or when it is the caller's turn; raises QueueFull if too many wait already."""
        if not self._is_full and not self._waiting:
            self.running += 1
            return Slot(self._leave)
        if self.waiting >= self._max_waiting or self._house.line_is_full:
            raise QueueFull(self._model_id, self.waiting, self.retry_after_seconds())
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.push(turn, caller)
        try:
            await turn
        except asyncio.CancelledError:
            self._waiting.remove(turn)
            if not turn.cancelled():
                # Called up in the same turn of the loop as it was cancelled: the slot goes to the next.
                self._leave()
            raise
        return Slot(self._leave)

    def reconfigure(self, max_running: int, max_waiting: int) -> None:
        """Take changed bounds. Those who run or wait already are sent away by neither."""
        self._max_running, self._max_waiting = max_running, max_waiting
        self._house.call_up()

    def depths(self) -> tuple[int, int]:
        """Requests that run, and requests that wait."""
        return self.running, self.waiting

    def line(self) -> list[tuple[Lane, str, int]]:
        """(lane, caller, requests) of everybody in line."""
        return list(self._waiting.depths())

    def retry_after_seconds(self) -> float:
        """When a place in the queue should come free, by the pace of the bound that is in the way.

        Between MIN_RETRY_SECONDS and MAX_RETRY_SECONDS; the former while too few releases are known.
        """
        has_room = self.running < self._max_running
        return (self._house.pace if has_room and self._house.is_full else self._pace).retry_after_seconds()

    def _leave(self) -> None:
        now = self._now()
        self._pace.note_release(now, self._is_full)
        self._house.pace.note_release(now, self._house.is_full)
        self.running -= 1
        self._house.call_up()

    def call_up_one(self) -> bool:
        """The next in line runs; False if there is no room or nobody in line."""
        while self._waiting and not self._is_full:
            turn = self._waiting.pop()
            if not turn.done():
                self.running += 1
                turn.set_result(None)
                return True
        return False


class House:
    """What all models' doors share: how many requests run and wait together."""

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self._max_running = max_running
        self._max_waiting = max_waiting
        # In turn, so that no model's line is always asked first.
        self._doors: deque[Admission] = deque()
        self.pace = _Pace()

    def add(self, door: Admission) -> None:
        """One more model."""
        self._doors.append(door)

    def reconfigure(self, max_running: int, max_waiting: int) -> None:
        """Take changed bounds, as each door does."""
        self._max_running, self._max_waiting = max_running, max_waiting
        self.call_up()

    @property
    def is_full(self) -> bool:
        """True if nobody more may run, whatever the model."""
        return sum(door.running for door in self._doors) >= self._max_running

    @property
    def line_is_full(self) -> bool:
        """True if nobody more may wait, whatever the model."""
        return sum(door.waiting for door in self._doors) >= self._max_waiting

    def call_up(self) -> None:
        """Let run whoever may: one of each model's line in turn, as far as there is room."""
        called = True
        while called:
            called = False
            for _ in range(len(self._doors)):
                self._doors.rotate(-1)
                called |= self._doors[-1].call_up_one()
