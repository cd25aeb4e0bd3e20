"""The sampling rule in few and cheap MLX operations, for MLX's CPU backend: the next forward is queued unseen.

MLX exponentiates and sorts 20 to 40 times slower than numpy there, so that a whole vocabulary is neither exponentiated
nor sorted here. Rows with a small top-k are cut down to the parts of the vocabulary that can hold it. Rows that cut
nothing off take the likeliest token after Gumbel noise was added to the logits, which is the same distribution; the
noise is made in numpy, from one drawn number a row, while the forward before runs. All other rows wait for the host.
"""

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from opta_lmx.inference.worker.sampler_rows import RowGroup, RowTable, in_single_precision

# Neighbouring columns that are looked at together first; the best of 8, 16 and 32 for a top-k of 40 of 4,096 columns.
_BLOCK = 8
# A draw has so many different values.
_DRAWS = 2**53


def choose_ahead(logits: mx.array, table: RowTable, draws: npt.NDArray[np.float64]) -> mx.array:
    """The tokens (rows,) of all rows of ``logits`` (rows, vocabulary); those of rows that must wait mean nothing."""
    few = table.few
    if few is not None and len(few.at) == len(table.rows):
        return _choose_few(logits, few, draws)
    tokens = mx.argmax(_with_noise(logits, table, draws) if table.plain else logits, axis=-1)
    if few is not None:
        at = mx.array(few.at)
        tokens[at] = _choose_few(logits[at], few, draws[few.at])
    return tokens


def _with_noise(logits: mx.array, table: RowTable, draws: npt.NDArray[np.float64]) -> mx.array:
    """The rows that cut nothing off, divided by their temperature, plus noise; the others as they are."""
    noise = np.zeros(logits.shape, dtype=np.float32)
    # In double precision: the smallest numbers decide, and single precision makes zeros among them.
    one = np.empty(logits.shape[-1])
    for row in table.plain:
        generator = np.random.Generator(np.random.SFC64(int(draws[row] * _DRAWS)))
        generator.standard_exponential(out=one)
        noise[row] = np.log(one, out=one)
    return logits * mx.array(table.plain_scale) - mx.array(noise)


def _choose_few(logits: mx.array, group: RowGroup, draws: npt.NDArray[np.float64]) -> mx.array:
    """Top-k, then top-p and min-p of what that left, which a draw is looked up in from the likeliest down."""
    most = min(group.most, logits.shape[-1])
    blocks, found = _candidates(logits, most)
    at, lack = _smallest(-found, most)
    order = mx.argsort(lack, axis=-1)
    lack = mx.take_along_axis(lack, order, axis=-1)
    weights = mx.exp((lack[:, :1] - lack) * mx.array(group.scale))
    if not group.within[:, :most].all():
        weights = mx.where(mx.array(group.within[:, :most]), weights, 0.0)
    mass = mx.cumsum(weights, axis=-1)
    keep = mass - weights < mx.array(group.top_p.astype(np.float32)) * mass[:, -1:]
    if group.has_min_p:
        keep = keep & (weights >= mx.array(group.min_p.astype(np.float32)))
    kept = mx.max(mx.where(keep, mass, 0.0), axis=-1, keepdims=True)
    target = mx.array(in_single_precision(draws)) * kept
    rank = mx.sum(mass <= target, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(at, mx.take_along_axis(order, rank, axis=-1), axis=-1)
    block = mx.take_along_axis(blocks, chosen // _BLOCK, axis=-1)
    return (block * _BLOCK + chosen % _BLOCK)[:, 0]


def _candidates(logits: mx.array, width: int) -> tuple[mx.array, mx.array]:
    """The blocks (rows, n), ascending, that hold each row's ``width`` largest columns, and these blocks' columns.

    A block that is not among the ``width`` with the largest best column holds none of them. Where bests are equal, as
    16-bit models often have it, the lower blocks are taken, so that the lower ids are.
    """
    rows, size = logits.shape
    spill = -size % _BLOCK
    padded = mx.pad(logits, [(0, 0), (0, spill)], constant_values=-mx.inf) if spill else logits
    blocks = padded.reshape(rows, -1, _BLOCK)
    count = blocks.shape[1]
    if count <= width:
        return mx.broadcast_to(mx.arange(count), (rows, count)), padded
    ids, _ = _smallest(-mx.max(blocks, axis=-1), width)
    return ids, mx.take_along_axis(blocks, ids[:, :, None], axis=1).reshape(rows, width * _BLOCK)


def _smallest(values: mx.array, width: int) -> tuple[mx.array, mx.array]:
    """Places, ascending, and values of each row's ``width`` smallest; MLX's CPU takes the first of equals."""
    at = mx.sort(mx.argpartition(values, width - 1, axis=-1)[:, :width], axis=-1)
    return at, mx.take_along_axis(values, at, axis=-1)
