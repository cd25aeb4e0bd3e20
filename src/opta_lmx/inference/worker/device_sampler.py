"""The sampling rule in MLX: the choice stays on the GPU, so that the next forward can be queued unseen."""

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from opta_lmx.inference.worker.sampler_rows import RowTable, in_single_precision


def sample_on_device(logits: mx.array, table: RowTable, draws: npt.NDArray[np.float64]) -> mx.array:
    """The rule as one kernel chain for the whole batch; greedy rows keep their argmax."""
    rows, size = logits.shape
    scale = np.ones((rows, 1), np.float32)
    top_k, top_p, min_p = np.full((rows, 1), size), np.ones((rows, 1), np.float32), np.zeros((rows, 1), np.float32)
    at = table.sampled
    for group in table.groups:
        own = at[group.at]
        scale[own], top_p[own], min_p[own] = group.scale, group.top_p, group.min_p
        top_k[own] = np.minimum(group.top_k, size)
    weights = mx.exp((logits - mx.max(logits, axis=-1, keepdims=True)) * mx.array(scale))
    if table.truncates:
        # Rows that cut nothing off keep k at the whole vocabulary, and with it every weight.
        weights = _cut_on_device(weights, mx.array(top_k), mx.array(top_p), mx.array(min_p))
    return mx.where(
        mx.array(_marks(rows, at)), _draw_on_device(weights, in_single_precision(draws)), mx.argmax(logits, axis=-1)
    )


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
