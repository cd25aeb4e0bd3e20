"""KV caches of 8 and 4 bits: smaller, batchable, and the same text alone, in a batch and over a prefix cache."""

from collections.abc import Callable
from typing import Any

import pytest

from opta_lmx.inference.worker.geometry import measure
from opta_lmx.inference.worker.kv_books import KvBooks
from opta_lmx.inference.worker.prefix_snapshots import PrefixSnapshots
from tests.integration.engine.driver import Engine, TinyModel
from tests.tiny_models import Family

pytestmark = pytest.mark.mlx

Wide = Callable[[Family], TinyModel]

_FAMILIES = pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "qwen3_next"])
_BITS = pytest.mark.parametrize("bits", [8, 4])
_LENGTHS = (5, 300, 1, 64, 130)
_SAMPLING: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True}


def _engine(model: TinyModel, bits: int, *, cached: bool = False) -> Engine:
    shape = measure(model.model, bits)
    return Engine(model, books=KvBooks(shape, None), prefixes=PrefixSnapshots(1 << 28) if cached else None)


@_FAMILIES
@_BITS
def test_batched_is_alone(wide_heads: Wide, family: Family, bits: int) -> None:
    """Five prompts of different lengths say together what each says by itself."""
    model = wide_heads(family)
    together = _engine(model, bits)
    for id, length in enumerate(_LENGTHS):
        together.ask(id, model.prompt(length), **_SAMPLING)
    together.run().assert_empty()
    for id, length in enumerate(_LENGTHS):
        single = _engine(model, bits)
        single.ask(0, model.prompt(length), **_SAMPLING)
        assert together.said(id) == single.run().said(0)


@_FAMILIES
def test_cached_is_uncached(wide_heads: Wide, family: Family) -> None:
    """A prompt that begins with a kept one is served from it, to the same text."""
    model = wide_heads(family)
    first = model.prompt(80)
    second = first + model.prompt(30, seed=1)
    engine = _engine(model, 8, cached=True)
    engine.ask(0, first, boundaries=(70,), **_SAMPLING)
    engine.run()
    engine.ask(1, second, boundaries=(70,), **_SAMPLING)
    engine.run().assert_empty()
    fresh = _engine(model, 8)
    fresh.ask(0, second, **_SAMPLING)
    assert engine.started[1].hit_tokens == 70
    assert engine.said(1) == fresh.run().said(0)


@_BITS
def test_a_token_takes_fewer_bytes(wide_heads: Wide, bits: int) -> None:
    """float32 keys and values against codes of that many bits with a float32 scale and bias for each 32."""
    model = wide_heads("llama")
    plain, quantised = measure(model.model), measure(model.model, bits)
    assert quantised.bytes_for(100) == plain.bytes_for(100) * (bits + 2) // 32
    assert not quantised.plain


def test_a_head_size_that_cannot_be_grouped_is_refused(tiny: Wide) -> None:
    """The error names the head size."""
    with pytest.raises(ValueError, match="this model's is 16"):
        measure(tiny("llama").model, 8)
