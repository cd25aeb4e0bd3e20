"""The token-by-token prefix cache, over caches whose every entry tells which tokens came before it."""

import gc
from collections.abc import Sequence as ListOf

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.cache import KVCache

from opta_lmx.inference.worker.prefix_tree import PrefixTree

pytestmark = pytest.mark.mlx

_LAYERS, _HEADS, _SIZE = 2, 2, 3
_TOKEN_BYTES = _LAYERS * 2 * _HEADS * _SIZE * 4
_AMPLE = 1 << 30
# Small vocabularies and lengths, so that prompts share, part in the middle of edges and repeat.
_TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=10)


def _fingerprints(tokens: ListOf[int]) -> list[int]:
    """One number a position that depends on every token up to there; exact in float32."""
    seen, state = [], 1
    for token in tokens:
        state = (state * 31 + token + 7) % 1_000_003
        seen.append(state)
    return seen


def _caches(tokens: ListOf[int], *, heads: int = _HEADS, spare: int = 0) -> list[KVCache]:
    """Plain caches over ``tokens``, with unused room behind them."""
    marks = mx.array([*_fingerprints(tokens), *[0] * spare], dtype=mx.float32)
    caches = []
    for layer in range(_LAYERS):
        cache = KVCache()
        shape = (1, heads, len(tokens) + spare, _SIZE)
        cache.keys = mx.broadcast_to(marks[None, None, :, None], shape) + layer
        cache.values = -cache.keys
        cache.offset = len(tokens)
        mx.eval(cache.keys, cache.values)
        caches.append(cache)
    return caches


def _store(tree: PrefixTree, tokens: ListOf[int]) -> None:
    tree.store(list(tokens), _caches(tokens, spare=5))
    tree.check()


def _fetch(tree: PrefixTree, tokens: ListOf[int]) -> tuple[int, str]:
    """Hit and cause, once the caches were seen to hold exactly the beginning that was hit."""
    known, size = tree.known(list(tokens)), tree.nbytes
    caches, report = tree.fetch(list(tokens))
    assert (known, size) == (report.hit_tokens, tree.nbytes)
    assert report.miss_at == report.hit_tokens
    assert (caches is None) == (report.hit_tokens == 0)
    marks = np.array(_fingerprints(tokens)[: report.hit_tokens], dtype=np.float32)
    for layer, cache in enumerate(caches or []):
        assert cache.offset == cache.size() == report.hit_tokens
        keys, values = cache.state
        assert np.array_equal(np.array(keys), np.broadcast_to(marks[None, None, :, None] + layer, keys.shape))
        assert np.array_equal(np.array(values), -np.array(keys))
    tree.check()
    return report.hit_tokens, report.cause


def _shared(first: ListOf[int], second: ListOf[int]) -> int:
    size = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        size += 1
    return size


@given(st.lists(_TOKENS, max_size=8), _TOKENS)
def test_the_longest_beginning_ever_stored_is_found(stored: list[list[int]], asked: list[int]) -> None:
    """With room for everything, a prompt is served up to where it parts from all that was stored, and no token more."""
    tree = PrefixTree(_AMPLE)
    for tokens in stored:
        _store(tree, tokens)
    assert _fetch(tree, asked)[0] == max((_shared(tokens, asked) for tokens in stored), default=0)


@given(st.lists(_TOKENS, max_size=8))
def test_what_is_shared_is_held_once(stored: list[list[int]]) -> None:
    """The cache takes the bytes of the different beginnings there are, however often and in what order they came."""
    tree = PrefixTree(_AMPLE)
    for tokens in stored:
        _store(tree, tokens)
    beginnings = {tuple(tokens[:end]) for tokens in stored for end in range(1, len(tokens) + 1)}
    assert tree.nbytes == len(beginnings) * _TOKEN_BYTES


@given(st.integers(0, 20), st.lists(st.tuples(st.booleans(), _TOKENS), max_size=12))
def test_the_budget_holds_and_what_is_served_is_right(room: int, actions: list[tuple[bool, list[int]]]) -> None:
    """Whatever is stored, evicted and asked for in whatever order: never a byte over, never a wrong entry."""
    tree = PrefixTree(room * _TOKEN_BYTES)
    seen: list[list[int]] = []
    for is_store, tokens in actions:
        if is_store:
            _store(tree, tokens)
            seen.append(tokens)
        else:
            hit, _ = _fetch(tree, tokens)
            assert hit <= max((_shared(other, tokens) for other in seen), default=0)


def test_decoding_on_a_fetched_cache_changes_nothing_stored() -> None:
    """Two requests that continue from the same prefix do not see each other's tokens."""
    tree = PrefixTree(_AMPLE)
    _store(tree, [1, 2, 3])
    for _ in range(2):
        caches, _ = tree.fetch([1, 2, 3, 4])
        for cache in caches or []:
            cache.update_and_fetch(mx.full((1, _HEADS, 1, _SIZE), 9.0), mx.full((1, _HEADS, 1, _SIZE), 9.0))
            mx.eval(cache.keys, cache.values)
    assert _fetch(tree, [1, 2, 3, 4]) == (3, "first_seen")


def test_the_least_recently_used_goes_first() -> None:
    """Asking for a prefix keeps it; the one nobody asked for makes room."""
    tree = PrefixTree(6 * _TOKEN_BYTES)
    _store(tree, [1, 1, 1])
    _store(tree, [2, 2, 2])
    _fetch(tree, [1, 1, 1])
    _store(tree, [3, 3, 3])
    assert [tree.known([token] * 3) for token in (1, 2, 3)] == [3, 0, 3]


def test_looking_does_not_count_as_use() -> None:
    """``known`` is asked every step for prompts that wait: it must not keep their prefixes alive."""
    tree = PrefixTree(6 * _TOKEN_BYTES)
    _store(tree, [1, 1, 1])
    _store(tree, [2, 2, 2])
    tree.known([1, 1, 1])
    _store(tree, [3, 3, 3])
    assert [tree.known([token] * 3) for token in (1, 2, 3)] == [0, 3, 3]


def test_a_shared_beginning_outlives_its_continuations() -> None:
    """Leaves go before what they stand on: the system prompt stays while conversations come and go."""
    tree = PrefixTree(6 * _TOKEN_BYTES)
    for question in range(5, 10):
        _store(tree, [1, 2, 3, question, question])
    assert tree.known([1, 2, 3, 0]) == 3


def test_what_cannot_fit_is_not_kept() -> None:
    """A prompt larger than the whole budget leaves the cache as it was."""
    tree = PrefixTree(4 * _TOKEN_BYTES)
    _store(tree, [1, 2])
    _store(tree, [3] * 5)
    assert (tree.known([3] * 5), tree.known([1, 2])) == (0, 2)


def test_the_cause_says_why_a_hit_ends() -> None:
    """none: all known; first_seen: nothing ever began like this; diverged: parted from what is known; evicted: lost."""
    tree = PrefixTree(8 * _TOKEN_BYTES)
    assert _fetch(tree, [1, 2, 3]) == (0, "first_seen")
    _store(tree, [1, 2, 3, 4])
    assert _fetch(tree, [1, 2, 3, 4]) == (4, "none")
    assert _fetch(tree, [1, 2]) == (2, "none")
    assert _fetch(tree, [1, 2, 9]) == (2, "diverged")
    assert _fetch(tree, [7, 7]) == (0, "first_seen")
    _store(tree, [5] * 8)
    assert _fetch(tree, [1, 2, 3, 4]) == (0, "evicted")
    _store(tree, [1, 2, 3, 4])
    assert _fetch(tree, [1, 2, 3, 4]) == (4, "none")


def test_a_lost_continuation_is_told_from_a_new_one() -> None:
    """Behind a prefix that is still there, an evicted branch is ``evicted`` and one nobody stored is ``diverged``."""
    tree = PrefixTree(6 * _TOKEN_BYTES)
    _store(tree, [1, 2, 3, 4])
    _store(tree, [1, 2, 5, 6])
    _store(tree, [1, 2, 7, 8])
    assert _fetch(tree, [1, 2, 3, 4]) == (2, "evicted")
    assert _fetch(tree, [1, 2, 9]) == (2, "diverged")


@pytest.mark.parametrize("heads", [1, 2])
def test_no_more_memory_is_held_than_is_counted(heads: int) -> None:
    """What is kept of a cache does not pin the rest of it, neither when stored nor when an edge is split nor evicted.

    With one head, a piece of a cache lies in one run of memory: the case where a view would be the easy mistake.
    """
    gc.collect()
    before = mx.get_active_memory()
    long, piece = 20_000, 50
    token_bytes = _TOKEN_BYTES * heads // _HEADS
    tree = PrefixTree(int(1.5 * long * token_bytes))
    tokens = [1] * long
    tree.store(tokens[:piece], _caches(tokens, heads=heads))
    assert _held(before) <= tree.nbytes + _SLACK
    tree.store(tokens, _caches(tokens, heads=heads))
    tree.store([*tokens[:100], 2], _caches([*tokens[:100], 2], heads=heads))
    assert _held(before) <= tree.nbytes + _SLACK
    tree.store([3] * long, _caches([3] * long, heads=heads))
    assert tree.known(tokens) == 100
    assert _held(before) <= tree.nbytes + _SLACK
    tree.check()


# MLX lets a small array share a buffer up to 16 KiB larger than itself: as much for each of the few arrays held.
_SLACK = 16 * 16_384


def _held(before: int) -> int:
    mx.synchronize()
    return mx.get_active_memory() - before
