"""The prefix cache of whole caches, over a recurrent and a plain layer whose entries tell what they cover."""

import gc
from collections.abc import Sequence as ListOf

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.cache import ArraysCache, KVCache

from opta_lmx.inference.worker.prefix_snapshots import PrefixSnapshots

pytestmark = pytest.mark.mlx

_AMPLE = 1 << 30
_TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=6)
_STATE = 1000  # numbers in the recurrent layer: far more than a few tokens take in the plain one


def _mark(tokens: ListOf[int]) -> float:
    """One number that depends on every token; exact in float32."""
    state = 1
    for token in tokens:
        state = (state * 31 + token + 7) % 1_000_003
    return float(state)


def _caches(tokens: ListOf[int]) -> list[ArraysCache | KVCache]:
    recurrent, plain = ArraysCache(2), KVCache()
    recurrent[0], recurrent[1] = mx.full((1, _STATE), _mark(tokens)), mx.full((1, 2, 2), -_mark(tokens))
    plain.update_and_fetch(*[mx.full((1, 1, len(tokens), 2), _mark(tokens))] * 2)
    mx.eval(recurrent.state, plain.state)
    return [recurrent, plain]


def _size(tokens: ListOf[int]) -> int:
    """Bytes of what the caches over ``tokens`` hold, without the room they have to grow."""
    return 4 * (_STATE + 4) + 2 * 2 * 4 * len(tokens)


_ONE = _size([0] * 10)  # a little more than any snapshot of these tests takes


def _store(snapshots: PrefixSnapshots, tokens: ListOf[int]) -> None:
    snapshots.store(list(tokens), _caches(tokens))
    snapshots.check()


def _fetch(snapshots: PrefixSnapshots, tokens: ListOf[int]) -> tuple[int, str]:
    """Hit and cause, once the caches were seen to be the ones stored for exactly that beginning."""
    known, size = snapshots.known(list(tokens)), snapshots.nbytes
    caches, report = snapshots.fetch(list(tokens))
    assert (known, size) == (report.hit_tokens, snapshots.nbytes)
    assert report.miss_at == report.hit_tokens
    assert (caches is None) == (report.hit_tokens == 0)
    if caches is not None:
        mark = _mark(tokens[: report.hit_tokens])
        assert caches[0][0].tolist() == [[mark] * _STATE]
        assert caches[1].offset == report.hit_tokens
        assert caches[1].state[0].tolist() == [[[[mark] * 2] * report.hit_tokens]]
    snapshots.check()
    return report.hit_tokens, report.cause


@given(st.lists(_TOKENS, max_size=8), _TOKENS)
def test_the_longest_snapshot_a_prompt_begins_with_is_found(stored: list[list[int]], asked: list[int]) -> None:
    """With room for everything, a prompt is served the longest stored beginning of it, whole and unchanged."""
    snapshots = PrefixSnapshots(_AMPLE)
    for tokens in stored:
        _store(snapshots, tokens)
    fits = [len(tokens) for tokens in stored if asked[: len(tokens)] == tokens]
    assert _fetch(snapshots, asked)[0] == max(fits, default=0)
    assert snapshots.nbytes == sum(map(_size, {tuple(tokens) for tokens in stored}))


@given(st.integers(0, 4), st.lists(st.tuples(st.booleans(), _TOKENS), max_size=12))
def test_the_budget_holds_and_what_is_served_is_right(room: int, actions: list[tuple[bool, list[int]]]) -> None:
    """Whatever is stored, evicted and asked for in whatever order: never a byte over, never a wrong cache."""
    snapshots = PrefixSnapshots(room * _ONE)
    seen: list[list[int]] = []
    for is_store, tokens in actions:
        if is_store:
            _store(snapshots, tokens)
            seen.append(tokens)
        else:
            assert _fetch(snapshots, tokens)[0] in {0, *(len(other) for other in seen)}


def test_decoding_on_a_cache_changes_nothing_stored() -> None:
    """Neither the cache that was stored nor the ones that were handed out reach what is kept."""
    snapshots = PrefixSnapshots(_AMPLE)
    mine = _caches([1, 2])
    snapshots.store([1, 2], mine)
    for caches in (mine, snapshots.fetch([1, 2, 3])[0], snapshots.fetch([1, 2, 3])[0]):
        assert caches is not None
        caches[0][0] = mx.zeros((1, _STATE))
        caches[1].update_and_fetch(*[mx.zeros((1, 1, 1, 2))] * 2)
        mx.eval(caches[0].state, caches[1].state)
    assert _fetch(snapshots, [1, 2, 3]) == (2, "diverged")


def test_the_least_recently_used_goes_first() -> None:
    """Asking for a snapshot keeps it, storing it again too, and looking does not."""
    snapshots = PrefixSnapshots(3 * _ONE)
    for token in (1, 2, 3):
        _store(snapshots, [token])
    _fetch(snapshots, [1])
    _store(snapshots, [2])
    snapshots.known([3])
    _store(snapshots, [4])
    assert [snapshots.known([token]) for token in (1, 2, 3, 4)] == [1, 1, 0, 1]


def test_what_cannot_fit_is_not_kept() -> None:
    """A cache larger than the whole budget leaves the others where they are."""
    snapshots = PrefixSnapshots(_ONE)
    _store(snapshots, [1])
    _store(snapshots, [2] * 300)
    assert (snapshots.known([2] * 300), snapshots.known([1])) == (0, 1)


def test_the_cause_says_why_a_hit_ends() -> None:
    """none: all known; first_seen: nothing began like this; diverged: known up to there; evicted: more was known."""
    snapshots = PrefixSnapshots(2 * _ONE)
    assert _fetch(snapshots, [1, 2, 3]) == (0, "first_seen")
    _store(snapshots, [1, 2])
    assert _fetch(snapshots, [1, 2]) == (2, "none")
    assert _fetch(snapshots, [1, 2, 3]) == (2, "diverged")
    assert _fetch(snapshots, [1]) == (0, "first_seen")
    _store(snapshots, [1, 2, 3])
    _fetch(snapshots, [1, 2])
    _store(snapshots, [9])
    assert _fetch(snapshots, [1, 2, 3, 4]) == (2, "evicted")
    _store(snapshots, [8])
    _store(snapshots, [7])
    assert _fetch(snapshots, [1, 2]) == (0, "evicted")
    _store(snapshots, [1, 2])
    assert _fetch(snapshots, [1, 2]) == (2, "none")


def test_no_more_memory_is_held_than_is_counted() -> None:
    """A snapshot of one row of a large batch does not keep the whole batch's buffers alive."""
    gc.collect()
    before = mx.get_active_memory()
    snapshots = PrefixSnapshots(_AMPLE)
    batch = mx.zeros((64, 1, 1024, 16))
    mx.eval(batch)
    row = KVCache()
    row.keys, row.values, row.offset = batch[3:4, :, 1000:], batch[4:5, :, 1000:], 24
    snapshots.store([5] * 24, [row])
    del batch, row
    mx.synchronize()
    assert snapshots.nbytes == 2 * 24 * 16 * 4
    # MLX lets a small array share a buffer up to 16 KiB larger than itself.
    assert mx.get_active_memory() - before <= snapshots.nbytes + 4 * 16_384
