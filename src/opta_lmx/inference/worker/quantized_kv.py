"""KV caches of 8 or 4 bits that can be batched: mlx-lm has quantised caches for one sequence only.

Keys and values are (codes, scales, biases) triples, as ``mx.quantize`` makes them along the head dimension.
"""

from functools import partial
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map, tree_reduce
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache, QuantizedKVCache

_STEP_TOKENS = 256

# The group sizes mx.quantize knows, coarsest first: fewer scales, less memory.
_GROUP_SIZES = (64, 32)

Triple = tuple[mx.array, mx.array, mx.array]


def quantize_layers(cache: list[Any], head_dim: int, bits: int, *, grouped: bool) -> list[Any]:
    """A fresh prompt cache with its plain layers quantised; the others stay as they are.

    ``grouped`` says that several query heads share a key head. Raises ValueError if ``head_dim`` cannot be grouped.
    """
    group_size = next((size for size in _GROUP_SIZES if head_dim % size == 0), None)
    if group_size is None:
        raise ValueError(f"kv_bits needs a head size divisible by {_GROUP_SIZES[-1]}, this model's is {head_dim}")
    return [RowQuantizedCache(group_size, bits, grouped) if type(layer) is KVCache else layer for layer in cache]


class RowQuantizedCache(QuantizedKVCache):  # type: ignore[misc]
    """mlx-lm's quantised cache of one sequence, which can join a batch."""

    def __init__(self, group_size: int, bits: int, grouped: bool) -> None:
        super().__init__(group_size=group_size, bits=bits)
        self.grouped = grouped

    @classmethod
    def merge(cls, caches: list["RowQuantizedCache"]) -> "BatchQuantizedCache":
        """One batch cache over several sequences, left-padded to the longest."""
        return BatchQuantizedCache.of(caches)

    def size(self) -> int:
        """Tokens held."""
        return int(self.offset)


class BatchQuantizedCache:
    """The quantised counterpart of mlx-lm's BatchKVCache: rows left-padded, one write position for all."""

    def __init__(self, like: RowQuantizedCache, left_padding: list[int]) -> None:
        self.group_size, self.bits, self.grouped = like.group_size, like.bits, like.grouped
        self.keys: Triple | None = None
        self.values: Triple | None = None
        self.left_padding = mx.array(left_padding)
        self.offset = mx.array([-padding for padding in left_padding])
        self._idx = 0

    @classmethod
    def of(cls, caches: list[RowQuantizedCache]) -> "BatchQuantizedCache":
        """See ``RowQuantizedCache.merge``."""
        longest = max(cache.size() for cache in caches)
        merged = cls(caches[0], [longest - cache.size() for cache in caches])
        if longest == 0:
            return merged
        filled = next(cache for cache in caches if cache.keys is not None)

        def pad(name: str) -> Any:
            rows = []
            for cache in caches:
                triple = getattr(cache, name)
                if triple is None:
                    triple = tree_map(partial(_cut, 0), getattr(filled, name))
                used = tree_map(partial(_cut, cache.size()), triple)
                rows.append(_pad(used, longest - cache.size(), 0))
            return _stack(rows)

        merged.keys, merged.values = pad("keys"), pad("values")
        merged.offset += longest
        merged._idx = longest
        return merged

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Append (rows, heads, tokens, head size) and return everything held, quantised."""
        start, end = self._idx, self._idx + keys.shape[2]
        new_keys = mx.quantize(keys, group_size=self.group_size, bits=self.bits)
        new_values = mx.quantize(values, group_size=self.group_size, bits=self.bits)
        if self.keys is None or self.values is None or end > self.keys[0].shape[2]:
            self.keys = _grow(self.keys, new_keys, start)
            self.values = _grow(self.values, new_values, start)
        for held, new in ((self.keys, new_keys), (self.values, new_values)):
            for whole, part in zip(held, new, strict=True):
                whole[..., start:end, :] = part
        self.offset += keys.shape[2]
        self._idx = end
        return tree_map(partial(_cut, end), (self.keys, self.values))  # type: ignore[no-any-return]

    def make_mask(self, N: int, return_array: bool = False, **kwargs: Any) -> mx.array:  # noqa: N803 - mlx-lm's name
        """Causal mask that hides the padding; one more axis where query heads are grouped, as mlx-lm's kernel wants."""
        mask: mx.array = create_causal_mask(N, offset=self._idx, left_padding=self.left_padding, **kwargs)
        return mx.expand_dims(mask, 2) if self.grouped else mask

    def filter(self, rows: list[int]) -> None:
        """Keep only these rows."""
        at = mx.array(rows)
        self.keys, self.values = tree_map(lambda x: x[at], (self.keys, self.values))
        self.offset, self.left_padding = self.offset[at], self.left_padding[at]

    def extend(self, other: "BatchQuantizedCache") -> None:
        """Add another batch's rows at the end."""
        longest = max(self._idx, other._idx)
        self.left_padding = mx.concatenate(
            [self.left_padding + (longest - self._idx), other.left_padding + (longest - other._idx)]
        )
        self.offset = mx.concatenate([self.offset, other.offset])
        for name in ("keys", "values"):
            pair = [(getattr(cache, name), cache) for cache in (self, other)]
            filled = next((triple for triple, _ in pair if triple is not None), None)
            if filled is not None:
                setattr(self, name, _stack([_padded(triple, cache, filled, longest) for triple, cache in pair]))
        self._idx = longest

    def extract(self, at: int) -> RowQuantizedCache:
        """A copy of one row."""
        row = RowQuantizedCache(self.group_size, self.bits, self.grouped)
        padding: Any = self.left_padding[at].item()
        start = int(padding)

        def cut(x: mx.array) -> mx.array:
            return mx.contiguous(x[at : at + 1, :, start : self._idx])

        row.keys, row.values = tree_map(cut, (self.keys, self.values))
        row.offset = self._idx - start
        return row

    @property
    def state(self) -> Any:
        """Every array, for mx.eval."""
        return self.keys, self.values, self.offset, self.left_padding

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and biases."""
        total: int = tree_reduce(lambda a, x: a + x.nbytes, (self.keys or (), self.values or ()), 0)
        return total


def _grow(held: Triple | None, new: Any, used: int) -> Triple:
    """Room for ``new`` behind the ``used`` tokens, in whole steps."""
    steps = -(-new[0].shape[2] // _STEP_TOKENS) * _STEP_TOKENS
    grown = []
    for at, part in enumerate(new):
        room = mx.zeros((*part.shape[:2], steps, part.shape[3]), dtype=part.dtype)
        grown.append(room if held is None else mx.concatenate([held[at][..., :used, :], room], axis=2))
    return grown[0], grown[1], grown[2]


def _cut(tokens: int, x: mx.array) -> mx.array:
    return x[..., :tokens, :]


def _pad(triple: Any, left: int, right: int) -> Any:
    return tree_map(lambda x: mx.pad(x, [(0, 0), (0, 0), (left, right), (0, 0)]), triple)


def _padded(triple: Any, cache: BatchQuantizedCache, filled: Any, longest: int) -> Any:
    """One side of ``extend``: its rows right-justified at ``longest`` tokens."""
    if triple is None:
        rows = cache.offset.shape[0]
        triple = tree_map(lambda x: mx.zeros((rows, x.shape[1], 0, x.shape[3]), dtype=x.dtype), filled)
    return _pad(tree_map(partial(_cut, cache._idx), triple), longest - cache._idx, 0)


def _stack(parts: list[Any]) -> Triple:
    joined = [mx.concatenate(list(arrays)) for arrays in zip(*parts, strict=True)]
    return joined[0], joined[1], joined[2]
