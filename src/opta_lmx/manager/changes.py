"""What happens to models and downloads, told to whoever listens: one feed of changes of state, any number of readers.

The residency and the downloads publish, ``api/admin/events.py`` reads. A reader that is slow costs a bounded number of
changes and delays nobody; what it has missed is counted and told to it.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import anyio

from opta_lmx.manager.download_job import Download
from opta_lmx.types import ModelState

# Seconds of silence after which a reader is told that there is nothing to tell: below the minute after which proxies
# commonly cut a silent connection.
_QUIET_SECONDS = 15.0

# Changes kept for one reader. A load and its end are four, so this is minutes of a busy server; a download in it
# names all its files, so it is not thousands.
_KEPT = 256


@dataclass(frozen=True, slots=True)
class ModelChange:
    """A model has come to ``state``. ``cause`` says what a stop was decided for (evicted, expired, unloaded).

    ``reason`` says why the model is not in memory where that was not asked for.
    """

    model_id: str
    state: ModelState
    reason: str | None = None
    cause: str | None = None


@dataclass(frozen=True, slots=True)
class Lagged:
    """A reader was too slow: so many changes are missing before the next."""

    missed: int


@dataclass(frozen=True, slots=True)
class Quiet:
    """Nothing has happened for a while; who writes to a connection should say so, to notice whether it stands."""


@dataclass(frozen=True, slots=True)
class Told:
    """Something that happened, and its wall-clock second."""

    at: float
    what: ModelChange | Download | Lagged


Change: TypeAlias = ModelChange | Download


class Reader:
    """One listener's changes, in order; those it has no time for make room for newer ones."""

    def __init__(self, kept: int, quiet_seconds: float) -> None:
        self._quiet_seconds = quiet_seconds
        self._waiting: deque[Told] = deque(maxlen=kept)
        self._missed = 0
        self._closed = False
        self._changed = anyio.Event()

    def put(self, told: Told) -> None:
        """Called by the feed."""
        self._missed += len(self._waiting) == self._waiting.maxlen
        self._waiting.append(told)
        self._changed.set()

    def close(self) -> None:
        """What waits can still be read; then comes the end."""
        self._closed = True
        self._changed.set()

    async def next(self) -> Told | Quiet | None:
        """The next change, None at the end. What was missed is told of first."""
        while not self._waiting:
            if self._closed:
                return None
            self._changed = anyio.Event()
            with anyio.move_on_after(self._quiet_seconds):
                await self._changed.wait()
            if not self._changed.is_set():
                return Quiet()
        if self._missed:
            lagged, self._missed = Lagged(self._missed), 0
            return Told(self._waiting[0].at, lagged)
        return self._waiting.popleft()


class ChangeFeed:
    """Where changes are published; who reads sees those from then on."""

    def __init__(
        self, wall: Callable[[], float] = time.time, kept: int = _KEPT, quiet_seconds: float = _QUIET_SECONDS
    ) -> None:
        self._wall = wall
        self._kept = kept
        self._quiet_seconds = quiet_seconds
        self._readers: set[Reader] = set()
        self._closed = False

    @property
    def readers(self) -> int:
        """How many listen now."""
        return len(self._readers)

    def publish(self, change: Change) -> None:
        """Tells every reader; never waits."""
        told = Told(self._wall(), change)
        for reader in self._readers:
            reader.put(told)

    @contextmanager
    def reading(self) -> Iterator[Reader]:
        """A reader of what is published inside the block."""
        reader = Reader(self._kept, self._quiet_seconds)
        if self._closed:
            reader.close()
        self._readers.add(reader)
        try:
            yield reader
        finally:
            self._readers.discard(reader)

    def close(self) -> None:
        """Ends every reader, those to come included: the server stops."""
        self._closed = True
        for reader in self._readers:
            reader.close()
