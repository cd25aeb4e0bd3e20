"""How many bytes a sequence's cache takes, from the shapes of the model's own caches."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, QuantizedKVCache, RotatingKVCache, make_prompt_cache

from opta_lmx.inference.worker.quantized_kv import quantize_layers


@dataclass(frozen=True, slots=True)
class CacheGeometry:
    """``per_token`` bytes for layers that keep all, ``windows`` of (tokens, bytes a token), ``fixed`` bytes of state.

    ``plain`` is True if every layer is an ordinary KV cache, which can be cut at any token. ``new_cache`` makes the
    empty cache of one prompt.
    """

    per_token: int
    windows: tuple[tuple[int, int], ...]
    fixed: int
    plain: bool
    vocab_size: int
    new_cache: Callable[[], list[Any]]

    def bytes_for(self, tokens: int) -> int:
        """Bytes of one sequence's cache once it holds ``tokens`` tokens."""
        windowed = sum(min(tokens, size) * each for size, each in self.windows)
        return self.fixed + tokens * self.per_token + windowed


def measure(model: Any, kv_bits: int | None = None) -> CacheGeometry:
    """Reads the shapes off a forward over one token that is built but never run.

    ``kv_bits`` (4, 8) quantises plain layers' caches; raises ValueError if this model's cannot be.
    """
    cache = make_prompt_cache(model)
    if kv_bits is not None:
        model(mx.array([[0]]), cache=cache)
        new_cache = _quantised(model, cache, kv_bits)
        cache = new_cache()
    else:
        new_cache = partial(make_prompt_cache, model)
    logits = model(mx.array([[0]]), cache=cache)
    layers = list(flat(cache))
    per_token = fixed = 0
    windows: list[tuple[int, int]] = []
    for layer in layers:
        if isinstance(layer, RotatingKVCache):
            windows.append((layer.max_size, _token_bytes(layer)))
        elif isinstance(layer, KVCache | QuantizedKVCache):
            per_token += _token_bytes(layer)
        elif isinstance(layer, ArraysCache):
            fixed += layer.nbytes
    plain = all(type(layer) is KVCache for layer in cache)
    return CacheGeometry(per_token, tuple(windows), fixed, plain, logits.shape[-1], new_cache)


def _quantised(model: Any, filled: list[Any], bits: int) -> Callable[[], list[Any]]:
    """How to make quantised prompt caches for a model, learnt from a cache that has seen a token."""
    head_dims = {layer.keys.shape[3] for layer in filled if type(layer) is KVCache and layer.keys is not None}
    if len(head_dims) != 1:
        raise ValueError("kv_bits needs a model with plain attention layers of one head size")
    heads = getattr(getattr(model, "args", None), "num_attention_heads", None)
    kv_heads = next(layer.keys.shape[1] for layer in filled if type(layer) is KVCache and layer.keys is not None)
    make = partial(quantize_layers, head_dim=head_dims.pop(), bits=bits, grouped=heads != kv_heads)
    make(make_prompt_cache(model))
    return lambda: make(make_prompt_cache(model))


def flat(cache: list[Any]) -> Iterator[Any]:
    """Every layer, those inside a CacheList too."""
    for layer in cache:
        if isinstance(layer, CacheList):
            yield from flat(list(layer.caches))
        else:
            yield layer


def _token_bytes(layer: Any) -> int:
    """One token's keys and values; some architectures share layers and leave their cache empty."""
    if layer.keys is None:
        return 0
    held = [layer.keys, layer.values]
    arrays = [array for part in held for array in (part if isinstance(part, tuple) else (part,))]
    return sum(array.shape[1] * array.shape[3] * array.dtype.size for array in arrays)
