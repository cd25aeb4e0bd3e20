"""How many bytes a sequence's cache takes, from the shapes of the model's own caches."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache, make_prompt_cache


@dataclass(frozen=True, slots=True)
class CacheGeometry:
    """``per_token`` bytes for layers that keep all, ``windows`` of (tokens, bytes a token), ``fixed`` bytes of state.

    ``plain`` is True if every layer is an ordinary KV cache, which can be cut at any token.
    """

    per_token: int
    windows: tuple[tuple[int, int], ...]
    fixed: int
    plain: bool
    vocab_size: int

    def bytes_for(self, tokens: int) -> int:
        """Bytes of one sequence's cache once it holds ``tokens`` tokens."""
        windowed = sum(min(tokens, size) * each for size, each in self.windows)
        return self.fixed + tokens * self.per_token + windowed


def measure(model: Any) -> CacheGeometry:
    """Reads the shapes off a forward over one token that is built but never run."""
    cache = make_prompt_cache(model)
    logits = model(mx.array([[0]]), cache=cache)
    layers = list(_flat(cache))
    per_token = fixed = 0
    windows: list[tuple[int, int]] = []
    for layer in layers:
        if isinstance(layer, RotatingKVCache):
            windows.append((layer.max_size, _token_bytes(layer)))
        elif isinstance(layer, KVCache):
            per_token += _token_bytes(layer)
        elif isinstance(layer, ArraysCache):
            fixed += layer.nbytes
    plain = all(type(layer) is KVCache for layer in cache)
    return CacheGeometry(per_token, tuple(windows), fixed, plain, logits.shape[-1])


def _flat(cache: list[Any]) -> Any:
    for layer in cache:
        if isinstance(layer, CacheList):
            yield from _flat(list(layer.caches))
        else:
            yield layer


def _token_bytes(layer: Any) -> int:
    """One token's keys and values; some architectures share layers and leave their cache empty."""
    if layer.keys is None:
        return 0
    return sum(array.shape[1] * array.shape[3] * array.dtype.size for array in (layer.keys, layer.values))
