"""The sampling rule in numpy: for rows with processors, and for cuts that MLX's CPU is 20 to 40 times slower at."""

from typing import Any

import numpy as np
import numpy.typing as npt

from opta_lmx.inference.worker.sampler_rows import NOT_A_NUMBER, Logits, RowGroup, RowTable

# The largest weights that are looked at first; if some row keeps all, so many times more, and in the end all of them.
_CANDIDATES = 512
_WIDER = 16
# Piles of columns for each candidate that is wanted: with four about a sixth more reach the bound than are wanted.
_PILES = 4
# Columns of a pile from where on piles find weights faster than a partial selection.
_HIGH = 4
# No logit that is not ruled out is below, no weight that counts.
_LOWEST = float(np.finfo(np.float32).min)
_LEAST = float(np.finfo(np.float32).tiny)
# Columns summed together in the first of the two passes that find a drawn token.
_BLOCK = 64


def choose_on_host(logits: Logits, table: RowTable, draws: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    """The token of every row of ``logits`` (rows, vocabulary), by the numbers ``table`` drew for it."""
    if not len(table.greedy):
        return _sample(logits, table.groups, draws)
    if not len(table.sampled):
        return _likeliest(logits)
    tokens = np.empty(len(logits), dtype=np.intp)
    tokens[table.greedy] = _likeliest(logits[table.greedy])
    tokens[table.sampled] = _sample(logits[table.sampled], table.groups, draws[table.sampled])
    return tokens


def _likeliest(logits: Logits) -> npt.NDArray[np.intp]:
    tokens: npt.NDArray[np.intp] = logits.argmax(axis=-1)
    # argmax finds a NaN if there is one.
    tokens[np.isnan(logits[np.arange(len(tokens)), tokens])] = NOT_A_NUMBER
    return tokens


def _sample(logits: Logits, groups: list[RowGroup], draws: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    if len(groups) == 1:
        return _sample_group(logits, groups[0], draws)
    tokens = np.empty(len(logits), dtype=np.intp)
    for group in groups:
        tokens[group.at] = _sample_group(logits[group.at], group, draws[group.at])
    return tokens


def _sample_group(logits: Logits, group: RowGroup, draws: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    return _sample_few(logits, group, draws) if group.few else _sample_many(logits, group, draws)


def _sample_few(logits: Logits, group: RowGroup, draws: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    """By the rule of _sample_many, looking at little more than the largest top-k."""
    ids, found = _candidates(logits, min(group.most, logits.shape[-1]), floor=_LOWEST)
    top = found.max(axis=-1, keepdims=True)
    weights = np.exp((found - top) * group.scale).astype(np.float64)
    best = np.sort(weights, axis=-1)[:, : -1 - group.most : -1]
    within = group.within[:, : best.shape[-1]]
    mass = (best * within).cumsum(axis=-1)
    keep = within & (mass - best < group.top_p * mass[:, -1:])
    if group.has_min_p:
        keep &= best >= group.min_p * best[:, :1]
    count = np.maximum(keep.sum(axis=-1), 1)
    each = np.arange(len(best))
    _drop_below(weights, best[each, count - 1], count)
    reached = weights.cumsum(axis=-1)
    at = (reached <= (draws * reached[:, -1])[:, None]).sum(axis=-1)
    if at.max() == reached.shape[-1]:
        # A product that was rounded up can step past the last likely candidate.
        at = np.minimum(at, reached.shape[-1] - 1 - np.argmax(weights[:, ::-1] > 0, axis=-1))
    chosen: npt.NDArray[np.intp] = ids[each, at]
    chosen[np.isnan(top[:, 0])] = NOT_A_NUMBER
    return chosen


def _candidates(values: Logits, width: int, floor: float) -> tuple[npt.NDArray[np.intp], Logits]:
    """Ids, ascending, and values of all that may be among each row's ``width`` largest and are at least ``floor``.

    Of a row's columns, dealt to four piles for each one that is wanted, the ``width``-th largest best of a pile is a
    bound that at least ``width`` columns reach, and few more do. Equals at the edge all reach it, and so does what is
    not a number. Rows are filled up with -inf.
    """
    rows, size = values.shape
    piles = _PILES * width
    height = size // piles
    if height > 1:
        best = values[:, : height * piles].reshape(rows, height, piles).max(axis=1)
        bound = np.maximum(np.partition(best, piles - width, axis=-1)[:, piles - width], np.float32(floor))
    else:
        bound = np.full(rows, floor, dtype=np.float32)
    below = values < bound[:, None]
    flat = np.flatnonzero(np.logical_not(below, out=below))
    each = np.arange(rows + 1)
    borders = flat.searchsorted(each * size)
    counts = borders[1:] - borders[:-1]
    widest = max(int(counts.max()), 1)
    place = np.arange(len(flat)) + (each * widest - borders)[:-1].repeat(counts)
    ids = np.zeros(rows * widest, dtype=np.intp)
    found = np.full(rows * widest, -np.inf, dtype=np.float32)
    ids[place] = flat % size
    found[place] = values.ravel()[flat]
    return ids.reshape(rows, widest), found.reshape(rows, widest)


def _sample_many(logits: Logits, group: RowGroup, draws: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    """Over the whole vocabulary."""
    rows, size = logits.shape
    # In memory that is kept: a fresh array of this size would be mapped, and paged in, at every step.
    blocks = group.scratch(rows, size + -size % _BLOCK)
    weights = blocks[:, :size]
    top = logits.max(axis=-1, keepdims=True)
    np.subtract(logits, top, out=weights)
    weights *= group.scale
    np.exp(weights, out=weights)  # unnormalised probabilities; the largest of each row is 1
    cut = group.cut
    if len(cut) == len(weights):
        _cut(weights, group.top_k[:, 0], group.top_p[:, 0], group.min_p[:, 0])
    elif len(cut):
        part = weights[cut]
        _cut(part, group.top_k[cut, 0], group.top_p[cut, 0], group.min_p[cut, 0])
        weights[cut] = part
    chosen = _draw(blocks.reshape(rows, -1, _BLOCK), draws)
    chosen[np.isnan(top[:, 0])] = NOT_A_NUMBER
    return chosen


def _draw(blocks: npt.NDArray[np.float32], draws: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    """Index drawn in proportion to weights (rows, n, _BLOCK) at the quantiles ``draws`` (rows,), in two passes."""
    rows, count, _ = blocks.shape
    reached = np.zeros((rows, count + 1))
    np.cumsum(blocks.sum(axis=-1), axis=-1, dtype=np.float64, out=reached[:, 1:])
    target = draws * reached[:, -1]
    each = np.arange(rows)
    block = (reached[:, 1:] <= target[:, None]).sum(axis=-1)
    likely = blocks[each, block]
    inside = likely.cumsum(axis=-1, dtype=np.float64)
    offset = (inside <= (target - reached[each, block])[:, None]).sum(axis=-1)
    if offset.max() == _BLOCK:
        # Rounding between the two passes can step past the block; its last likely token is the right one then.
        offset = np.minimum(offset, _BLOCK - 1 - np.argmax(likely[:, ::-1] > 0, axis=-1))
    chosen: npt.NDArray[np.intp] = block * _BLOCK + offset
    return chosen


def _cut(
    weights: Logits, top_k: npt.NDArray[np.int64], top_p: npt.NDArray[np.float64], min_p: npt.NDArray[np.float64]
) -> None:
    """Set every weight outside each row's top-k, top-p and min-p set to 0, in place."""
    _drop_below(weights, *_thresholds(weights, top_k, top_p, min_p))


def _drop_below(weights: npt.NDArray[Any], threshold: npt.NDArray[Any], count: npt.NDArray[np.intp]) -> None:
    """Set every weight under its row's threshold to 0, in place, and of those at it all but the first to fill up."""
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
        best = np.sort(_largest(weights, width), axis=-1)[:, ::-1].astype(np.float64)
        within = np.arange(best.shape[-1]) < top_k[:, None]
        mass = np.cumsum(np.where(within, best, 0.0), axis=-1)
        total = mass[:, -1] if bounded.all() else np.where(bounded, mass[:, -1], weights.sum(axis=-1, dtype=np.float64))
        keep = within & (mass - best < (top_p * total)[:, None]) & (best >= min_p[:, None] * best[:, :1]) & (best > 0)
        count = np.maximum(keep.sum(axis=-1), 1)
        if width == size or (count < width).all():
            return best[np.arange(len(best)), count - 1].astype(np.float32), count
        width = width * _WIDER if width * _WIDER * _PILES < size else size


def _largest(weights: Logits, width: int) -> Logits:
    """At least the ``width`` largest weights of each row, in any order; 0 fills rows up."""
    size = weights.shape[-1]
    if width == size:
        return weights
    if size < _HIGH * _PILES * width:
        return np.partition(weights, size - width, axis=-1)[:, size - width :]
    _, found = _candidates(weights, width, floor=_LEAST)
    return np.maximum(found, 0.0)
