"""Whether a worker that has work gets on with it. Pure but for what it is told; ``residency.py`` looks once a second.

A worker that hangs still holds its pipe and its memory, and may even answer: only steps tell that it lives.
"""

from dataclasses import dataclass

# Looks come once a second. One that comes much later (the machine slept, or the server itself was held up) says
# nothing about the time in between.
_MOST_BETWEEN_LOOKS_SECONDS = 2.0

# A worker that once took so long and went on may take this many times as long: the next prompt may be the longer one.
_PATIENCE = 3.0


@dataclass(slots=True)
class ProgressWatch:
    """Seconds without progress while there was work: those of now, and the most that ever ended by themselves."""

    silent_seconds: float = 0.0
    slowest_seconds: float = 0.0
    suspect: bool = False
    _progress: int = -1
    _looked_at: float | None = None

    def look(self, now: float, *, busy: bool, progress: int, stall_seconds: float) -> bool:
        """True once the worker has had work and made no progress for its bound; it is suspect from half of that on.

        ``progress`` is any number that changes with every step. The bound is ``stall_seconds``, or more for a worker
        whose steps were seen to take long.
        """
        since = 0.0 if self._looked_at is None else now - self._looked_at
        self._looked_at = now
        if busy and progress == self._progress:
            self.silent_seconds += min(since, _MOST_BETWEEN_LOOKS_SECONDS)
        else:
            if busy:
                self.slowest_seconds = max(self.slowest_seconds, self.silent_seconds)
            self.silent_seconds, self._progress = 0.0, progress
        bound = max(stall_seconds, _PATIENCE * self.slowest_seconds)
        self.suspect = self.silent_seconds >= bound / 2
        return self.silent_seconds >= bound
