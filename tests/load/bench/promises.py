"""The numbers that are promised (the project's contracts and its plan), each held against what was measured; pure."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from tests.load.bench.book import Book, Key
from tests.load.bench.measure import Measured
from tests.load.bench.summary import RAW, Unit
from tests.load.bench.targets import OWN

# The model whose step is short enough that the server's own cost shows; all but efficiency is promised on it.
_REFERENCE: Final = "nano"

# HTTP tokens/s ÷ raw tokens/s, at every batch size.
_REFERENCE_EFFICIENCY: Final = 0.80
_EFFICIENCY: Final = 0.95


@dataclass(frozen=True, slots=True)
class Verdict:
    """One promise. ``value`` and ``bound`` are in seconds, bytes or plain; None where they were not measured."""

    what: str
    unit: Unit
    value: float | None
    bound: float | None
    at_most: bool

    @property
    def kept(self) -> bool | None:
        """None if it cannot be said."""
        if self.value is None or self.bound is None:
            return None
        return self.value <= self.bound if self.at_most else self.value >= self.bound


def verdicts(measured: Measured, subject: str = OWN) -> Iterator[Verdict]:
    """What one model's samples say of the promises made for it."""
    book, name = measured.book, measured.model
    rates = [f"tok_s@{batch}" for batch in measured.profile.batches]
    ratios = [ratio for rate in rates if (ratio := book.ratio(Key(subject, rate), Key(RAW, rate))) is not None]
    least = min(ratios, default=None)
    promised = _REFERENCE_EFFICIENCY if name == _REFERENCE else _EFFICIENCY
    yield _at_least(f"{name}: tokens/s ÷ raw, worst of all batches", "ratio", least, promised)
    if name == _REFERENCE:
        yield from _reference_verdicts(book, subject)
    for what, prefix in (("errors", "errors@"), ("wrong texts", "wrong")):
        counts = [
            sum(values.values())
            for key, values in book.samples.items()
            if key.subject == subject and key.metric.startswith(prefix)
        ]
        yield _at_most(f"{name}: {what}", "count", sum(counts) if counts else None, 0)


def _reference_verdicts(book: Book, subject: str) -> Iterator[Verdict]:
    for batch in (16, 32):
        rate = f"tok_s@{batch}"
        yield _at_least(f"tokens/s ÷ raw at {batch}", "ratio", book.ratio(Key(subject, rate), Key(RAW, rate)), 1.0)
    growth = book.ratio(Key(subject, "tok_s@32"), Key(subject, "tok_s@16"))
    yield _at_least("tokens/s at 32 ÷ at 16", "ratio", growth, 1.0)
    for word, label in (("temperature", "temperature"), ("top_p_top_k", "temperature, top-p and top-k")):
        cost = book.ratio(Key(subject, "tok_s@greedy"), Key(subject, f"tok_s@{word}"))
        yield _at_most(f"greedy tokens/s ÷ by {label}", "ratio", cost, 1.10)
    added = book.difference(Key(subject, "call_p50"), Key(RAW, "call_p50"))
    yield _at_most("added to one token, p50", "ms", added, 0.002)
    reuse = book.ratio(Key(subject, "prefix_cold"), Key(subject, "prefix_second"))
    yield _at_least("second turn after a 1,500-token prefix: cold ÷ warm TTFT", "ratio", reuse, 10.0)
    chunk, call = book.median(RAW, "chunk"), book.median(RAW, "call_p50")
    gap = _sum(chunk, _times(2, book.median(subject, "stream_itl")))
    worst = book.median(subject, "worst_gap")
    yield _at_most("worst gap while a 2,000-token prompt arrives (chunk + 2 ITL)", "ms", worst, gap)
    behind = book.median(subject, "behind_ttft")
    bound = _sum(_times(2, chunk), call)
    yield _at_most("short request behind two long, TTFT (2 chunks + its own)", "ms", behind, bound)
    idle = _sum(book.median(subject, "itl_p50@1"), 0.020)
    for metric, label in (("leave_stream", "stream"), ("leave_whole", "whole answer")):
        left = book.median(subject, metric)
        yield _at_most(f"disconnect of a {label} to idle (step + 20 ms)", "ms", left, idle)
    yield _at_most("exec to first 200 on /v1/models", "s", book.median(subject, "start_listed"), 1.0)


def _at_most(what: str, unit: Unit, value: float | None, bound: float | None) -> Verdict:
    return Verdict(what, unit, value, bound, at_most=True)


def _at_least(what: str, unit: Unit, value: float | None, bound: float | None) -> Verdict:
    return Verdict(what, unit, value, bound, at_most=False)


def _sum(*parts: float | None) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def _times(factor: float, value: float | None) -> float | None:
    return None if value is None else factor * value
