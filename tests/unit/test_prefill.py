"""Prompts on their way into the batch, with a model that only counts and a clock that it moves."""

from collections.abc import Sequence as ListOf
from functools import cache
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opta_lmx.inference.worker.backend import Prepared
from opta_lmx.inference.worker.detokenizer import TokenTable
from opta_lmx.inference.worker.prefill import ChunkPolicy, Prefill, PrefillQueue
from opta_lmx.inference.worker.sequence import Sequence
from opta_lmx.types import SamplingParams
from tests import tiny_tokenizers

pytestmark = pytest.mark.mlx

_STALL = 0.25
_LARGEST = 512


class Layer:
    """A cache that remembers the tokens it covers."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.state = mx.zeros(1)


class CountingModel:
    """Appends what it is given to the cache; each token takes ``seconds_per_token`` on its clock."""

    def __init__(self, seconds_per_token: float = 0.001) -> None:
        self.seconds_per_token = seconds_per_token
        self.now = 0.0
        self.pieces: list[list[int]] = []

    def __call__(self, inputs: mx.array, cache: list[Layer]) -> None:
        piece: Any = inputs[0].tolist()
        self.pieces.append(piece)
        self.now += self.seconds_per_token * len(piece)
        for layer in cache:
            layer.tokens += piece


class Line:
    """A queue over a counting model, and what became complete or reached a boundary in it."""

    def __init__(self, seconds_per_token: float = 0.001, largest: int = _LARGEST) -> None:
        self.model = CountingModel(seconds_per_token)
        self.policy = ChunkPolicy(largest, _STALL)
        self.kept: list[tuple[int, int]] = []
        self.queue = PrefillQueue(self.model, self.policy, self._keep, clock=lambda: self.model.now)

    def _keep(self, prefill: Prefill) -> None:
        assert prefill.cache[0].tokens == prefill.tokens[: prefill.done]
        self.kept.append((prefill.sequences[0].request.id, prefill.done))

    def add(self, id: int, length: int, *, done: int = 0, boundaries: ListOf[int] = (), n: int = 1) -> Prefill:
        """A prompt of the tokens id * 10,000 and up, of which ``done`` are in the cache already."""
        tokens = list(range(id * 10_000, id * 10_000 + length))
        layer = Layer()
        layer.tokens = tokens[:done]
        sequences = [_sequence(id, tokens, choice) for choice in range(n)]
        prefill = Prefill(sequences, tokens, [layer], done=done, boundaries=list(boundaries))
        self.queue.add(prefill)
        return prefill

    def step(self, *, decoding: bool = True) -> tuple[list[int], float]:
        """The ids that became complete, and the seconds the step took."""
        started = self.model.now
        complete = self.queue.step(decoding=decoding)
        for prefill in complete:
            assert prefill.cache[0].tokens == prefill.tokens[:-1]
        return [prefill.sequences[0].request.id for prefill in complete], self.model.now - started

    def run(self, *, steps: int = 1000) -> list[list[int]]:
        """Steps until nothing waits: the ids each completed."""
        completed: list[list[int]] = []
        while len(self.queue):
            assert len(completed) < steps
            completed.append(self.step()[0])
        return completed

    def learn(self) -> None:
        """One prompt, so that the policy has measured the model."""
        self.add(0, 200)
        self.run()
        self.model.pieces.clear()


@cache
def _table() -> TokenTable:
    return TokenTable(tiny_tokenizers.byte_level())


def _sequence(id: int, tokens: list[int], choice: int) -> Sequence:
    return Sequence(Prepared(id, str(id), tokens, 10, SamplingParams()), choice, _table(), frozenset())


@pytest.mark.parametrize("seconds_per_token", [1e-5, 0.0007, 0.0021, 0.012, 0.08, 0.5])
def test_a_step_keeps_the_stall_bound(seconds_per_token: float) -> None:
    """Once speed is known, a step beside decoding takes the stall bound at most, and nearly all of it if it can.

    Seven eighths of the largest chunk are not passed, however fast the model is; a slow one gets a token at a time.
    """
    line = Line(seconds_per_token)
    line.learn()
    for id in range(1, 4):
        line.add(id, 3000)
    for _ in range(3):
        _, seconds = line.step()
        tokens = round(seconds / seconds_per_token)
        assert tokens == max(1, min(_LARGEST * 7 // 8, int(_STALL / seconds_per_token)))


def test_with_nobody_decoding_chunks_may_be_longer() -> None:
    """An idle batch is not stalled: a chunk may take several bounds, but is still bounded."""
    line = Line(0.002)
    line.learn()
    line.add(1, 5000)
    beside, alone = line.step(decoding=True)[1], line.step(decoding=False)[1]
    assert beside <= _STALL < alone <= 4 * _STALL


def test_the_first_chunk_is_small() -> None:
    """Before anything was measured a chunk is a careful guess."""
    line = Line(0.01)
    line.add(1, 5000)
    line.step()
    assert len(line.model.pieces[0]) <= 16


def test_the_bound_follows_the_model() -> None:
    """When the model slows down (long contexts do that), chunks shrink with it."""
    line = Line(0.001)
    line.learn()
    line.model.seconds_per_token = 0.005
    line.add(1, 20_000)
    times = [line.step()[1] for _ in range(20)]
    assert times[-1] <= _STALL * 1.01


def test_a_tiny_chunk_teaches_nothing() -> None:
    """The fixed cost of a call over two tokens is not taken for the price of a token."""
    policy = ChunkPolicy(_LARGEST, _STALL)
    policy.observe(100, 0.1)
    policy.observe(2, 0.05)
    assert policy.tokens(decoding=True) == 250


def test_a_slow_model_is_learnt_from_its_own_small_chunks() -> None:
    """Where whole chunks are tiny they are what there is to learn from: it may become faster, or slower, again."""
    line = Line(0.08)
    line.learn()
    line.add(1, 5000)
    assert line.step()[1] == pytest.approx(0.24)
    line.model.seconds_per_token = 0.01
    times = [line.step()[1] for _ in range(20)]
    assert 0.2 < times[-1] <= _STALL


def test_a_chunk_may_take_a_quarter_more_than_a_decode_step() -> None:
    """A model that reads its weights for half a second a forward, however few tokens it has, keeps chunks worth it."""
    policy = ChunkPolicy(_LARGEST, _STALL)
    policy.observe(16, 0.5)
    assert policy.tokens(decoding=True) == 8
    for _ in range(50):
        policy.observe_decode(0.5)
        tokens = policy.tokens(decoding=True)
        policy.observe(tokens, 0.5 + 0.002 * tokens)
    assert 0.5 + 0.002 * policy.tokens(decoding=True) == pytest.approx(1.25 * 0.5, rel=0.05)


def test_a_larger_chunk_tells_more_than_smaller_ones() -> None:
    """The first chunk is small and mostly overhead; the next ones are as large as the bound allows at once."""
    policy = ChunkPolicy(_LARGEST, _STALL)
    policy.observe(16, 0.03)
    second = policy.tokens(decoding=True)
    policy.observe(second, 0.03 + 0.001 * second)
    assert policy.tokens(decoding=True) == pytest.approx(_STALL / (0.03 / second + 0.001), abs=1)


def test_a_short_prompt_passes_two_long_ones() -> None:
    """A short request behind two long prefills is complete within two steps, whatever the turn."""
    for steps_before in range(8):
        line = Line()
        line.learn()
        for id in (1, 2):
            line.add(id, 4000)
        for _ in range(steps_before):
            line.step()
        line.add(3, 30)
        assert 3 in line.step()[0] + line.step()[0]


def test_the_oldest_is_not_starved() -> None:
    """Under a stream of short prompts that would fill every step, the long one still moves and completes."""
    line = Line()
    line.learn()
    line.add(1, 2000)
    for id in range(2, 60):
        line.add(id, 251)  # a whole step of its own
        if 1 in line.step()[0]:
            break
    else:
        pytest.fail("the long prompt never completed")
    assert id <= 2000 / 250 * 4 + 2


def test_equals_come_in_order_of_arrival() -> None:
    """Of prompts with as much left, the older goes first."""
    line = Line()
    line.learn()
    for id in (1, 2, 3):
        line.add(id, 251)
    assert [id for ids in line.run() for id in ids] == [1, 2, 3]


def test_a_step_is_shared_by_several_prompts() -> None:
    """The budget left by one prompt goes to the next, so that short prompts start together."""
    line = Line()
    line.learn()
    for id in (1, 2, 3):
        line.add(id, 50)
    assert line.step()[0] == [1, 2, 3]


@given(st.data())
def test_boundaries_are_hit_exactly(data: st.DataObject) -> None:
    """Every boundary between what is cached and the target is reported once, in order, with the cache covering it."""
    line = Line()
    line.learn()
    expected = []
    for id in range(1, data.draw(st.integers(1, 3)) + 1):
        length = data.draw(st.integers(1, 900))
        done = data.draw(st.integers(0, length - 1))
        boundaries = sorted(data.draw(st.sets(st.integers(0, 1000), max_size=4)))
        line.add(id, length, done=done, boundaries=boundaries)
        expected += [(id, at) for at in boundaries if done < at < length]
    line.run()
    assert sorted(line.kept) == expected


@given(st.lists(st.integers(1, 1200), min_size=1, max_size=6))
def test_every_prompt_is_processed_once_and_whole(lengths: list[int]) -> None:
    """Each token but the last is fed exactly once, in order; every prompt completes once."""
    line = Line()
    for id, length in enumerate(lengths):
        line.add(id, length)
    completed = [id for ids in line.run() for id in ids]
    assert sorted(completed) == list(range(len(lengths)))
    assert sum(map(len, line.model.pieces)) == sum(lengths) - len(lengths)


def test_what_is_cached_is_not_computed_again() -> None:
    """A prompt known but for its last token completes without a forward."""
    line = Line()
    line.add(1, 100, done=99)
    assert line.step()[0] == [1]
    assert line.model.pieces == []


def test_a_prompt_of_one_token_needs_no_prefill() -> None:
    """The last token belongs to the first decode step, so a single one completes at once."""
    line = Line()
    line.add(1, 1)
    assert line.step()[0] == [1]
    assert line.model.pieces == []


def test_dropped_prompts_are_forgotten() -> None:
    """All choices of a request leave, wherever its prefill stands; its neighbour completes as if alone."""
    line = Line()
    line.add(1, 700, n=3)
    line.add(2, 700)
    line.step()
    assert (len(line.queue), len(line.queue.sequences)) == (4, 4)
    assert [sequence.choice for sequence in line.queue.drop(1)] == [0, 1, 2]
    assert line.queue.drop(1) == []
    assert (len(line.queue), line.run()[-1]) == (1, [2])


def _waiting(line: Line, id: int, tokens: list[int], boundaries: ListOf[int] = ()) -> None:
    line.queue.add(Prefill([_sequence(id, tokens, 0)], tokens, [Layer()], boundaries=list(boundaries)))


def test_the_longest_shared_beginning_is_found() -> None:
    """Of all prompts under way, the most tokens one will leave; its last token, not prefilled, does not count."""
    line = Line()
    _waiting(line, 1, [1, 2, 3, 4, 5])
    _waiting(line, 2, [1, 2, 9])
    assert line.queue.longest_shared([1, 2, 3, 4, 5, 6], (), exact_only=False) == 4
    assert line.queue.longest_shared([1, 2, 9, 9], (), exact_only=False) == 2
    assert line.queue.longest_shared([7], (), exact_only=False) == 0


def test_whole_caches_are_shared_at_common_boundaries_only() -> None:
    """Where a cache cannot be cut, only a boundary of both prompts that lies in the common beginning counts."""
    line = Line()
    _waiting(line, 1, [1, 2, 3, 4, 5], boundaries=[2, 3, 4])
    assert line.queue.longest_shared([1, 2, 3, 9], (2, 4), exact_only=True) == 2
    assert line.queue.longest_shared([1, 2, 3, 4, 5, 6], (4,), exact_only=True) == 4
    assert line.queue.longest_shared([1, 2, 3, 4, 5, 6], (), exact_only=True) == 0


def test_an_empty_queue_does_nothing() -> None:
    """A step without prompts makes no call and completes nobody."""
    line = Line()
    result: Any = line.step()
    assert result == ([], 0.0)
    assert line.model.pieces == []
