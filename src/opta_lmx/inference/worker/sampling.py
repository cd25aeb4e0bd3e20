"""Choosing the next token of every row at once.

Order: processors (bias, penalties, grammar) on the logits, then temperature, then top-k, then top-p of what top-k left;
min-p cuts what is less likely than that share of the likeliest token. Of equals at the edge the lower ids stay. A row
draws one uniform number a token from its own generator and looks it up in the distribution of what is left, in the
order of ids: its choices depend on its seed and its logits and on nothing else in the batch.

Two ways with the same rule: ``HostLaunch`` (numpy; for MLX's CPU backend, whose exp and sort are 20 to 40 times
slower than numpy's) and ``DeviceLaunch`` (MLX; the choice stays on the GPU, so that the next forward can be queued
before the tokens are known).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]

# The largest weights that are looked at first, found by a partial selection; if some row keeps all, all are sorted.
_CANDIDATES = 512
# 1 / temperature from where on only the likeliest tokens are left in float32; beyond about 1e38 it would overflow.
_STEEPEST = 1e30
# Stands for the token of a row whose logits are not numbers: damaged weights, or an overflow in the model.
NOT_A_NUMBER = -1
# Columns summed together in the first of the two passes that find a drawn token.
_BLOCK = 64


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


class RowTable:
    """The rows' parameters as arrays, rebuilt only when the batch changes."""

    def __init__(self, rows: Sequence[RowSampler]) -> None:
        self.rows = list(rows)
        self.sampled = np.array([i for i, row in enumerate(rows) if row.temperature > 0], dtype=np.intp)
        self.all_sampled = len(self.sampled) == len(self.rows)
        chosen = [self.rows[i] for i in self.sampled]
        self.scale = np.array([[min(1.0 / row.temperature, _STEEPEST)] for row in chosen], dtype=np.float32)
        self.truncated = np.array([i for i, row in enumerate(chosen) if row.truncates], dtype=np.intp)
        self.top_k = np.array([row.top_k or np.iinfo(np.int64).max for row in chosen], dtype=np.int64)
        self.top_p = np.array([row.top_p for row in chosen], dtype=np.float64)
        self.min_p = np.array([row.min_p for row in chosen], dtype=np.float64)
        self._scratch: Logits | None = None
        self.processed = [i for i, row in enumerate(self.rows) if row.processors]

    def scratch(self, shape: tuple[int, ...]) -> Logits:
        """Memory for one step's weights; its content is undefined."""
        if self._scratch is None or self._scratch.shape != shape:
            self._scratch = np.empty(shape, dtype=np.float32)
        return self._scratch

    def draws(self) -> npt.NDArray[np.float64]:
        """One uniform number in [0, 1) for each sampled row."""
        return np.array([self.rows[i].draw() for i in self.sampled], dtype=np.float64)


def prepare_processors(table: RowTable) -> None:
    """Let every processor work ahead; call it while a forward runs, once the tokens before it are accepted."""
    for i in table.processed:
        for processor in table.rows[i].processors:
            processor.prepare()


def run_processors(logits: Logits, table: RowTable) -> None:
    """Apply every row's processors to ``logits`` in place."""
    for i in table.processed:
        for processor in table.rows[i].processors:
            processor.apply(logits[i])


class Launched(Protocol):
    """One forward, and the choice that follows it. ``tokens`` are the choice where it can feed a forward unseen."""

    tokens: mx.array | None

    def start(self) -> None:
        """Queue it; what it reads must be in place by now."""
        ...

    def keep(self, rows: list[int], table: RowTable) -> None:
        """Forget every row but these; ``table`` describes the ones that stay."""
        ...

    def collect(self) -> list[int]:
        """Wait for the forward; the chosen token of each row."""
        ...

    def logits(self) -> Logits:
        """The processed logits the tokens were chosen from; call it after ``collect``."""
        ...


class HostLaunch:
    """Waits for the logits, then samples in numpy. ``tokens`` stays None: they are not known ahead."""

    tokens: mx.array | None = None

    def __init__(self, logits: mx.array, table: RowTable) -> None:
        """``logits`` (rows, vocabulary), not evaluated yet."""
        self._lazy = logits if logits.dtype == mx.float32 else logits.astype(mx.float32)
        self._table = table
        self._host: Logits | None = None

    def start(self) -> None:
        """Queue the forward."""
        mx.async_eval(self._lazy)

    def keep(self, rows: list[int], table: RowTable) -> None:
        """Forget every row but these; ``table`` describes the ones that stay."""
        self._lazy, self._table = self._lazy[mx.array(rows)], table

    def collect(self) -> list[int]:
        """Wait for the forward; the chosen token of each row."""
        mx.eval(self._lazy)
        table = self._table
        logits: Logits = np.array(self._lazy, copy=bool(table.processed))
        run_processors(logits, table)
        self._host = logits
        tokens = logits.argmax(axis=-1)
        # argmax finds a NaN if there is one.
        broken = np.isnan(logits[np.arange(len(tokens)), tokens])
        if len(table.sampled):
            tokens[table.sampled] = _sample(logits if table.all_sampled else logits[table.sampled], table)
        tokens[broken] = NOT_A_NUMBER
        return _as_list(tokens)

    def logits(self) -> Logits:
        """The processed logits the tokens were chosen from; call it after ``collect``."""
        assert self._host is not None
        return self._host


def _sample(logits: Logits, table: RowTable) -> npt.NDArray[np.intp]:
    """``logits`` holds the sampled rows only."""
    # In memory that is kept: a fresh array of this size would be mapped, and paged in, at every step.
    weights = np.subtract(logits, logits.max(axis=-1, keepdims=True), out=table.scratch(logits.shape))
    weights *= table.scale
    np.exp(weights, out=weights)  # unnormalised probabilities; the largest of each row is 1
    draws = table.draws()
    if not len(table.truncated):
        return _draw(weights, draws)
    cut = table.truncated
    if len(cut) == len(weights):
        _cut(weights, table.top_k, table.top_p, table.min_p)
    else:
        rows = weights[cut]
        _cut(rows, table.top_k[cut], table.top_p[cut], table.min_p[cut])
        weights[cut] = rows
    return _draw(weights, draws)


def _draw(weights: Logits, draws: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    """Index drawn in proportion to ``weights`` (rows, n) at the quantiles ``draws`` (rows,), in two passes."""
    rows, size = weights.shape
    spill = -size % _BLOCK
    if spill:
        weights = np.pad(weights, ((0, 0), (0, spill)))
    blocks = weights.reshape(rows, -1, _BLOCK)
    reached = np.cumsum(blocks.sum(axis=-1), axis=-1, dtype=np.float64)
    target = draws * reached[:, -1]
    each = np.arange(rows)
    block = (reached <= target[:, None]).sum(axis=-1)
    before = np.where(block > 0, reached[each, block - 1], 0.0)
    inside = np.cumsum(blocks[each, block], axis=-1, dtype=np.float64)
    offset = (inside <= (target - before)[:, None]).sum(axis=-1)
    # Rounding between the two passes can step past the block; its last likely token is the right one then.
    offset = np.minimum(offset, _BLOCK - 1 - np.argmax(blocks[each, block, ::-1] > 0, axis=-1))
    chosen: npt.NDArray[np.intp] = block * _BLOCK + offset
    return chosen


def _cut(
    weights: Logits, top_k: npt.NDArray[np.int64], top_p: npt.NDArray[np.float64], min_p: npt.NDArray[np.float64]
) -> None:
    """Set every weight outside each row's top-k, top-p and min-p set to 0, in place."""
    threshold, count = _thresholds(weights, top_k, top_p, min_p)
    kept = weights >= threshold[:, None]
    surplus = kept.sum(axis=-1) - count
    for row in np.flatnonzero(surplus):
        equals = np.flatnonzero(weights[row] == threshold[row])
        kept[row, equals[-surplus[row] :]] = False
    weights *= kept


def _thresholds(
    weights: Logits, top_k: npt.NDArray[np.int64], top_p: npt.NDArray[np.float64], min_p: npt.NDArray[np.float64]
) -> tuple[Logits, npt.NDArray[np.intp]]:
    """The smallest weight each row keeps, and how many it keeps; a set wider than the candidates is found by a sort."""
    size = weights.shape[-1]
    bounded = top_k < size
    most = int(top_k[bounded].max(initial=0)) + 1
    width = min(size, most if bounded.all() else max(_CANDIDATES, most))
    while True:
        found = weights if width == size else np.partition(weights, size - width, axis=-1)[:, size - width :]
        best = np.sort(found, axis=-1)[:, ::-1].astype(np.float64)
        within = np.arange(width) < top_k[:, None]
        mass = np.cumsum(np.where(within, best, 0.0), axis=-1)
        total = mass[:, -1] if bounded.all() else np.where(bounded, mass[:, -1], weights.sum(axis=-1, dtype=np.float64))
        keep = within & (mass - best < (top_p * total)[:, None]) & (best >= min_p[:, None] * best[:, :1]) & (best > 0)
        count = np.maximum(keep.sum(axis=-1), 1)
        if width == size or (count < width).all():
            return best[np.arange(len(best)), count - 1].astype(np.float32), count
        width = size


class DeviceLaunch:
    """Samples in MLX; ``tokens`` (rows,) can feed the next forward before anybody has waited for this one.

    For rows without processors, which are numpy's: a batch with any of them is launched with HostLaunch.
    """

    def __init__(self, logits: mx.array, table: RowTable) -> None:
        """``logits`` (rows, vocabulary), not evaluated yet."""
        self._logits = logits.astype(mx.float32)
        chosen = _sample_on_device(self._logits, table) if len(table.sampled) else mx.argmax(logits, axis=-1)
        self.tokens: mx.array | None = chosen
        # Damaged weights make every logit NaN, so one tells.
        self._chosen = mx.where(mx.isnan(self._logits[:, 0]), NOT_A_NUMBER, chosen.astype(mx.int32))

    def start(self) -> None:
        """Queue the forward and the choice."""
        mx.async_eval(self.tokens, self._chosen)

    def keep(self, rows: list[int], table: RowTable) -> None:
        """Forget every row but these; their tokens are chosen already, so the table is not asked again."""
        at = mx.array(rows)
        self._logits, self._chosen = self._logits[at], self._chosen[at]
        self.tokens = mx.maximum(self._chosen, 0)

    def collect(self) -> list[int]:
        """Wait for the forward; the chosen token of each row."""
        return _as_list(self._chosen)

    def logits(self) -> Logits:
        """The processed logits the tokens were chosen from."""
        return np.array(self._logits)


def _as_list(tokens: Any) -> list[int]:
    values: list[int] = tokens.tolist()
    return values


def _sample_on_device(logits: mx.array, table: RowTable) -> mx.array:
    """The rule of ``_sample`` as one kernel chain for the whole batch; greedy rows keep their argmax."""
    rows, size = logits.shape
    scale, draws = np.ones((rows, 1), np.float32), np.zeros((rows, 1), np.float32)
    top_k, top_p, min_p = np.full((rows, 1), size), np.ones((rows, 1), np.float32), np.zeros((rows, 1), np.float32)
    at = table.sampled
    scale[at] = table.scale
    # Rounded to float32 a draw may become 1, which lies beyond every token.
    draws[at, 0] = np.minimum(table.draws(), np.nextafter(np.float32(1), np.float32(0)))
    top_k[at, 0], top_p[at, 0], min_p[at, 0] = np.minimum(table.top_k, size), table.top_p, table.min_p
    weights = mx.exp((logits - mx.max(logits, axis=-1, keepdims=True)) * mx.array(scale))
    if len(table.truncated):
        # Rows that cut nothing off keep k at the whole vocabulary, and with it every weight.
        weights = _cut_on_device(weights, mx.array(top_k), mx.array(top_p), mx.array(min_p))
    return mx.where(mx.array(_marks(rows, at)), _draw_on_device(weights, draws), mx.argmax(logits, axis=-1))


def _cut_on_device(weights: mx.array, top_k: mx.array, top_p: mx.array, min_p: mx.array) -> mx.array:
    size = weights.shape[-1]
    best = mx.sort(weights, axis=-1)[:, ::-1]
    within = mx.arange(size) < top_k
    mass = mx.cumsum(mx.where(within, best, 0.0), axis=-1)
    keep = within & ((mass - best < top_p * mass[:, -1:]) | (top_p >= 1.0)) & (best >= min_p * best[:, :1])
    count = mx.maximum(mx.sum(keep, axis=-1, keepdims=True), 1)
    threshold = mx.take_along_axis(best, count - 1, axis=-1)
    above, equal = weights > threshold, weights == threshold
    room = count - mx.sum(above, axis=-1, keepdims=True)
    return mx.where(above | (equal & (mx.cumsum(equal, axis=-1) <= room)), weights, 0.0)


def _draw_on_device(weights: mx.array, draws: npt.NDArray[np.float32]) -> mx.array:
    reached = mx.cumsum(weights, axis=-1)
    return mx.argmax(reached > mx.array(draws) * reached[:, -1:], axis=-1)


def _marks(rows: int, at: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
    """True at the given rows."""
    marks = np.zeros(rows, dtype=bool)
    marks[at] = True
    return marks
