"""What requests take: the timeline of one, and the book of all, kept by model; those under way, as they stand.

Plain numbers, written on the event loop by the engine; ``metrics.py`` shows them to Prometheus when it asks. That one
imports prometheus_client (25 to 50 ms), which a start need not pay for, so nothing of it is imported here.
"""

import asyncio
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from opta_lmx.errors import DownloadError, LmxError, WorkerError
from opta_lmx.types import ANYBODY, Caller, Delta, Lane

# Upper bounds in seconds. Every histogram spans what can happen here, finest where a promise or a default lies.

# From a queue nobody is in to the longest load a worker is given (900 s).
_WAIT_BOUNDS: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900)
# From a step of a nano model (0.6 ms) past the bound on a stall behind another's prefill (0.25 s).
_GAP_BOUNDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
# From an embedding to an answer as long as a context.
_WHOLE_BOUNDS: Final = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)


class Outcome(StrEnum):
    """How a request ended. ``refused``: as it should be, before its first token; ``error``: something failed here."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"
    REFUSED = "refused"


class Phase(StrEnum):
    """How far a request is: in line for a slot, waiting for its model, its prompt being read, or making tokens."""

    QUEUE = "queue"
    LOAD = "load"
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class LiveRequest:
    """A request that has not ended, at one moment. Times in seconds; None for what has not come yet.

    ``prompt_tokens`` and ``cached_tokens`` are known with the first token, ``completion_tokens`` are those its reader
    has taken, ``tokens_per_second`` is the rate after the first ones, all choices together. ``caller`` is empty where
    no keys are set.
    """

    request_id: str
    model_id: str | None
    caller: str
    lane: Lane
    phase: Phase
    age_seconds: float
    queue_seconds: float | None
    ttft_seconds: float | None
    prompt_tokens: int | None
    cached_tokens: int | None
    completion_tokens: int
    tokens_per_second: float | None
    choices: int


class Histogram:
    """Counts of values up to each of ``bounds`` (ascending), and their sum; the last count is of all beyond."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value that was seen so many times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    @property
    def count(self) -> int:
        """All values seen."""
        return sum(self.counts)


class ModelBook:
    """What one model and its requests have taken since the start; times in seconds."""

    __slots__ = (
        "cached_tokens",
        "completion_tokens",
        "e2e",
        "inter_token",
        "load",
        "load_failures",
        "outcomes",
        "prompt_tokens",
        "queue",
        "stops",
        "time_to_first_token",
    )

    def __init__(self) -> None:
        self.queue = Histogram(_WAIT_BOUNDS)
        self.time_to_first_token = Histogram(_WAIT_BOUNDS)
        self.inter_token = Histogram(_GAP_BOUNDS)
        self.e2e = Histogram(_WHOLE_BOUNDS)
        self.load = Histogram(_WAIT_BOUNDS)
        self.load_failures = 0
        self.outcomes: Counter[Outcome] = Counter()
        # By the residency's word for the cause.
        self.stops: Counter[str] = Counter()
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0


class RequestBook:
    """The books of all models, by id. The empty id stands for names that are no model's."""

    def __init__(self) -> None:
        self._books: dict[str, ModelBook] = {}
        # A dict for its order; the values mean nothing.
        self._under_way: dict[Timeline, None] = {}
        # Of downloads that were begun, by how they ended.
        self.downloads: Counter[str] = Counter()

    def of(self, model_id: str) -> ModelBook:
        """The book of one model, opened at its first mention."""
        book = self._books.get(model_id)
        if book is None:
            book = self._books[model_id] = ModelBook()
        return book

    def loaded(self, model_id: str, seconds: float) -> None:
        """A load has succeeded."""
        self.of(model_id).load.observe(seconds)

    def load_failed(self, model_id: str) -> None:
        """A load has not."""
        self.of(model_id).load_failures += 1

    def stopped(self, model_id: str, cause: str) -> None:
        """The residency has decided to stop a model's worker."""
        self.of(model_id).stops[cause] += 1

    def by_model(self) -> Mapping[str, ModelBook]:
        """Every book there is."""
        return self._books

    def begin(self, timeline: "Timeline") -> None:
        """A request has come."""
        self._under_way[timeline] = None

    def close(self, timeline: "Timeline") -> None:
        """It has ended."""
        self._under_way.pop(timeline, None)

    def live(self) -> list[LiveRequest]:
        """Every request that has come and not ended, the oldest first."""
        return [timeline.show() for timeline in self._under_way]


class Timeline:
    """The moments and counts of one request, from its arrival to the moment the worker is done with it.

    The engine calls what happened, in this order: ``resolved``, ``admitted``, ``leased`` (again for a second worker),
    ``first_token``, ``looked`` for every look at its deltas (some may come after the end), ``failed`` if an error ended
    it, ``end``. Any but the last may be missing. ``choices`` is 0 for what makes no tokens.
    """

    __slots__ = (
        "_admitted",
        "_arrived",
        "_book",
        "_books",
        "_counted",
        "_ended",
        "_error",
        "_first_token",
        "_first_tokens",
        "_last_look",
        "_leased",
        "_now",
        "_outcome",
        "cached_tokens",
        "caller",
        "choices",
        "completion_tokens",
        "model_id",
        "prompt_tokens",
        "request_id",
        "stopped",
    )

    def __init__(
        self,
        books: RequestBook,
        request_id: str,
        choices: int,
        now: Callable[[], float] = time.monotonic,
        caller: Caller = ANYBODY,
    ) -> None:
        self.request_id = request_id
        self.caller = caller
        self.choices = choices
        self.model_id: str | None = None
        # Its reader has all it wants: what the worker then calls cancelled ended as it should.
        self.stopped = False
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0
        self._books = books
        self._book: ModelBook | None = None
        self._now = now
        self._arrived = now()
        self._admitted: float | None = None
        self._leased: float | None = None
        self._first_token: float | None = None
        self._first_tokens = 0
        self._last_look: float | None = None
        self._counted = 0
        self._ended = False
        self._outcome: Outcome | None = None
        self._error: str | None = None
        books.begin(self)

    def resolved(self, model_id: str) -> None:
        """The name was that of a model."""
        self.model_id = model_id
        self._book = self._books.of(model_id)

    def admitted(self) -> None:
        """A slot of the model is its own."""
        self._admitted = self._now()

    def leased(self) -> None:
        """The model is in memory; the request goes to its worker now."""
        self._leased = self._now()

    def first_token(self, tokens: int) -> None:
        """The first tokens, so many, have come."""
        self._first_token = now = self._now()
        self._first_tokens = tokens
        if self._book is not None:
            self._book.time_to_first_token.observe(now - self._arrived)

    def looked(self, deltas: Sequence[Delta]) -> None:
        """The reader has taken these; they came since its last look, evenly as far as anybody can tell.

        One observation however many tokens it holds. Choices are made side by side, so the one with the most tokens
        tells the gap.
        """
        assert self._book is not None
        now = self._now()
        tokens, steps = _count(deltas)
        if steps and self._last_look is not None:
            self._book.inter_token.observe((now - self._last_look) / steps, steps)
        self._last_look = now
        if not self._ended:
            self._counted += tokens
            self._book.completion_tokens += tokens

    def failed(self, error: BaseException) -> None:
        """An error ended it, or its caller left; the first word counts."""
        if self._outcome is None:
            self._outcome = _outcome(error)
            self._error = None if self._outcome is Outcome.CANCELLED else type(error).__name__

    def end(self, outcome: Outcome) -> dict[str, object]:
        """Close the books on it; returns its canonical log line. ``outcome`` counts unless it ``failed``.

        Seconds are rounded to the microsecond. ``tok_s`` is the rate after the first tokens, all choices together.
        """
        outcome = self._outcome or outcome
        now = self._now()
        duration = now - self._arrived
        book = self._book or self._books.of("")
        book.outcomes[outcome] += 1
        book.prompt_tokens += self.prompt_tokens
        book.cached_tokens += self.cached_tokens
        # What its reader has not looked at yet, or never will.
        self._ended = True
        self._books.close(self)
        book.completion_tokens += self.completion_tokens - self._counted
        if self._leased is not None:
            book.queue.observe(self._leased - self._arrived)
            book.e2e.observe(duration)
        return {
            "request_id": self.request_id,
            "model": self.model_id,
            "caller": self.caller.name,
            "lane": self.caller.lane.value,
            "outcome": outcome.value,
            "queue_s": _between(self._arrived, self._leased),
            "load_s": _between(self._admitted, self._leased),
            "ttft_s": _between(self._arrived, self._first_token),
            "duration_s": round(duration, 6),
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
            "tok_s": self._rate(now, self.completion_tokens),
            "choices": self.choices,
            "error": self._error,
        }

    def show(self) -> LiveRequest:
        """How far it is now."""
        now = self._now()
        begun = self._first_token is not None
        made = max(self._counted, self._first_tokens)
        return LiveRequest(
            request_id=self.request_id,
            model_id=self.model_id,
            caller=self.caller.name,
            lane=self.caller.lane,
            phase=self._phase(),
            age_seconds=round(now - self._arrived, 6),
            queue_seconds=_between(self._arrived, self._leased),
            ttft_seconds=_between(self._arrived, self._first_token),
            prompt_tokens=self.prompt_tokens if begun else None,
            cached_tokens=self.cached_tokens if begun else None,
            completion_tokens=made,
            tokens_per_second=self._rate(now, made),
            choices=self.choices,
        )

    def _phase(self) -> Phase:
        if self._first_token is not None:
            return Phase.DECODE
        if self._leased is not None:
            return Phase.PREFILL
        return Phase.QUEUE if self._admitted is None else Phase.LOAD

    def _rate(self, now: float, made: int) -> float | None:
        tokens = made - self._first_tokens
        if self._first_token is None or tokens <= 0 or now <= self._first_token:
            return None
        return round(tokens / (now - self._first_token), 1)


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else round(end - start, 6)


def _count(deltas: Sequence[Delta]) -> tuple[int, int]:
    """All tokens, and those of the choice with the most."""
    if len(deltas) == 1:
        return deltas[0].token_count, deltas[0].token_count
    by_choice: dict[int, int] = {}
    for delta in deltas:
        by_choice[delta.choice] = by_choice.get(delta.choice, 0) + delta.token_count
    return sum(by_choice.values()), max(by_choice.values(), default=0)


def _outcome(error: BaseException) -> Outcome:
    if isinstance(error, asyncio.CancelledError):
        return Outcome.CANCELLED
    ours_to_mend = not isinstance(error, LmxError) or isinstance(error, WorkerError | DownloadError)
    return Outcome.ERROR if ours_to_mend else Outcome.REFUSED
