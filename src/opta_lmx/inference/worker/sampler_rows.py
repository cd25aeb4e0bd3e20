"""How the sequences of a batch are sampled: each one's parameters, and those of all rows as arrays."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]

# Stands for the token of a row whose logits are not numbers: damaged weights, or an overflow in the model.
NOT_A_NUMBER = -1
# Up to this top-k a row is sampled from its candidates alone, and the rest of the vocabulary is never exponentiated.
_FEW = 256
# 1 / temperature from where on only the likeliest tokens are left in float32; beyond about 1e38 it would overflow.
_STEEPEST = 1e30


# The largest number below 1 in single precision.
_BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))


def in_single_precision(draws: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """``draws`` (rows,) as a column; one that would be rounded to 1, which lies beyond every token, stays below it."""
    return np.minimum(draws, _BELOW_ONE).astype(np.float32)[:, None]


class LogitsProcessor(Protocol):
    """Changes one row of logits in place before sampling. ``error`` ends the row's request with that reason."""

    error: str | None

    def prepare(self) -> None:
        """Do what can be done before the logits are there, while the forward runs."""
        ...

    def apply(self, row: Logits) -> None:
        """``row`` has one float per vocabulary entry."""
        ...

    def accept(self, token: int) -> None:
        """Learn the token that was sampled from the row."""
        ...


@dataclass(slots=True)
class RowSampler:
    """How one sequence is sampled. ``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    generator: random.Random = field(default_factory=random.Random)
    processors: Sequence[LogitsProcessor] = ()
    _last: float = 0.0
    _returned: bool = False

    @property
    def truncates(self) -> bool:
        """True if part of the distribution is cut off."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    @property
    def is_few(self) -> bool:
        """True if the top-k is so small that the rest of the vocabulary need not be looked at closely."""
        return 0 < self.top_k <= _FEW

    @property
    def steepness(self) -> float:
        """What the logits are multiplied with."""
        return min(1.0 / self.temperature, _STEEPEST)

    def draw(self) -> float:
        """The next uniform number in [0, 1)."""
        if self._returned:
            self._returned = False
        else:
            self._last = self.generator.random()
        return self._last

    def take_back(self) -> None:
        """The last draw was for a token that will be chosen again; it is drawn again then."""
        self._returned = self.temperature > 0


class RowGroup:
    """Sampled rows that are sampled in one way, and their parameters as columns.

    ``at`` are their places among ``rows``. A row's group depends on nothing but its own parameters, so that
    company never changes what it says.
    """

    def __init__(self, rows: Sequence[RowSampler], at: Sequence[int], *, few: bool) -> None:
        chosen = [rows[i] for i in at]
        self.at = np.array(at, dtype=np.intp)
        self.few = few
        self.scale = np.array([[row.steepness] for row in chosen], dtype=np.float32)
        self.top_k = np.array([row.top_k or np.iinfo(np.int64).max for row in chosen], dtype=np.int64)[:, None]
        self.top_p = np.array([row.top_p for row in chosen], dtype=np.float64)[:, None]
        self.min_p = np.array([row.min_p for row in chosen], dtype=np.float64)[:, None]
        self.cut = np.array([i for i, row in enumerate(chosen) if row.truncates], dtype=np.intp)
        self.has_min_p = any(row.min_p > 0.0 for row in chosen)
        self.most = max((row.top_k for row in chosen), default=0)
        # Of the largest few of a row, in descending order: those that its top-k keeps.
        self.within = np.arange(self.most if few else 0) < self.top_k
        self._scratch: Logits | None = None

    def scratch(self, rows: int, columns: int) -> Logits:
        """Memory for one step's weights; what is in it is what the last user left, and 0 at first."""
        if self._scratch is None or self._scratch.shape != (rows, columns):
            self._scratch = np.zeros((rows, columns), dtype=np.float32)
        return self._scratch


class RowTable:
    """The rows' parameters as arrays, rebuilt only when the batch changes.

    Rows without processors are of four kinds: ``greedy``, ``plain`` (nothing is cut off), ``few`` (a small top-k) and
    ``hard`` (any other cut). ``greedy`` and ``sampled``, which is all others, count rows with processors too.
    """

    def __init__(self, rows: Sequence[RowSampler]) -> None:
        self.rows = list(rows)
        self.processed = [i for i, row in enumerate(self.rows) if row.processors]
        self.greedy = np.array([i for i, row in enumerate(rows) if row.temperature == 0], dtype=np.intp)
        self.sampled = np.array([i for i, row in enumerate(rows) if row.temperature > 0], dtype=np.intp)
        chosen = [self.rows[i] for i in self.sampled]
        self.truncates = any(row.truncates for row in chosen)
        few = [i for i, row in enumerate(chosen) if row.is_few]
        many = [i for i, row in enumerate(chosen) if not row.is_few]
        self.groups = [RowGroup(chosen, at, few=at is few) for at in (few, many) if at]
        free = [i for i in self.sampled.tolist() if not self.rows[i].processors]
        self.plain = [i for i in free if not self.rows[i].truncates]
        self.plain_scale = np.ones((len(self.rows), 1), dtype=np.float32)
        self.plain_scale[self.plain, 0] = [self.rows[i].steepness for i in self.plain]
        ahead = [i for i in free if self.rows[i].is_few]
        self.few = RowGroup(self.rows, ahead, few=True) if ahead else None
        self.hard = [i for i in free if self.rows[i].truncates and not self.rows[i].is_few]
        self._parts: dict[tuple[int, ...], RowTable] = {}

    def draws(self) -> npt.NDArray[np.float64]:
        """One uniform number in [0, 1) for each row, of which those of greedy rows mean nothing."""
        return np.array([row.draw() if row.temperature > 0 else 0.0 for row in self.rows], dtype=np.float64)

    def part(self, rows: Sequence[int]) -> "RowTable":
        """The table of some of the rows, the same one each time."""
        if len(rows) == len(self.rows):
            return self
        key = tuple(rows)
        if key not in self._parts:
            self._parts[key] = RowTable([self.rows[i] for i in rows])
        return self._parts[key]
