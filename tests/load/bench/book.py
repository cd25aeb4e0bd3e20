"""The samples of a run: one a round for each subject and metric, and what is made of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import sub, truediv
from statistics import median
from typing import NamedTuple


class Key(NamedTuple):
    """What was measured, and of whom: ``raw`` mlx-lm, the ``bare`` loop, or a server by its name."""

    subject: str
    metric: str


@dataclass(slots=True)
class Book:
    """Medians over rounds. Ratios and differences are taken within a round, where both sides met the same machine."""

    round: int = 0
    samples: dict[Key, dict[int, float]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    """What could not be measured, and why."""

    def add(self, subject: str, metric: str, value: float) -> None:
        """Note this round's sample."""
        self.samples.setdefault(Key(subject, metric), {})[self.round] = value

    def median(self, subject: str, metric: str) -> float | None:
        """Of the rounds; None if it was never measured."""
        values = self.samples.get(Key(subject, metric))
        return median(values.values()) if values else None

    def total(self, subject: str, metric: str) -> float | None:
        """Over the rounds: for things that must not happen."""
        values = self.samples.get(Key(subject, metric))
        return sum(values.values()) if values else None

    def ratio(self, over: Key, under: Key) -> float | None:
        """Median over the rounds of one metric divided by another."""
        return self._paired(over, under, truediv)

    def difference(self, more: Key, less: Key) -> float | None:
        """Median over the rounds of one metric minus another."""
        return self._paired(more, less, sub)

    def _paired(self, first: Key, second: Key, join: Callable[[float, float], float]) -> float | None:
        left, right = self.samples.get(first, {}), self.samples.get(second, {})
        values = [join(left[at], right[at]) for at in left if right.get(at)]
        return median(values) if values else None


def percentile(values: Sequence[float], percent: float) -> float:
    """Between the two nearest ranks, in proportion; ``values`` must not be empty."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)
