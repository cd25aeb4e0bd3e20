"""One choice of a request: when it ends, what each token adds to its text, and what it reports."""

import math
from collections.abc import Sequence as ListOf
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opta_lmx.inference.worker.backend import Prepared
from opta_lmx.inference.worker.detokenizer import TokenTable
from opta_lmx.inference.worker.sampler_rows import Logits
from opta_lmx.inference.worker.sequence import Sequence
from opta_lmx.types import Delta, FinishReason, SamplingParams
from tests import tiny_tokenizers

pytestmark = pytest.mark.mlx

_END = 5  # a token id that ends sequences in these tests; its own text is not part of any answer


@cache
def _tokenizer() -> Any:
    return tiny_tokenizers.byte_level()


@cache
def _table() -> TokenTable:
    return TokenTable(_tokenizer())


def _ids(text: str) -> list[int]:
    """One token a byte."""
    by_byte = {_table().raw(id): id for id in range(256)}
    return [by_byte[bytes([byte])] for byte in text.encode()]


class Breaks:
    """A processor that cannot go on from its second token."""

    def __init__(self) -> None:
        self.error: str | None = None
        self._seen = 0

    def prepare(self) -> None:
        """Nothing can be done ahead."""

    def apply(self, row: Logits) -> None:
        """Leaves the row alone."""

    def accept(self, token: int) -> None:
        """Fails at the second."""
        self._seen += 1
        if self._seen == 2:
            self.error = "no way on"


def _sequence(*, max_tokens: int = 100, choice: int = 0, **params: Any) -> Sequence:
    request = Prepared(1, "r", [1, 2, 3], max_tokens, SamplingParams(**params))
    return Sequence(request, choice, _table(), frozenset([_END]))


def _deltas(sequence: Sequence, tokens: ListOf[int]) -> list[Delta]:
    """The deltas of the tokens up to the one that ends the sequence."""
    deltas = []
    for token in tokens:
        ended = sequence.take(token)
        deltas.append(sequence.delta())
        assert ended == (sequence.finish is not None) == (deltas[-1].finish is not None)
        if ended:
            break
    return deltas


def _text(deltas: ListOf[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def test_a_stop_token_ends_the_sequence_and_is_counted_but_not_shown() -> None:
    """The end-of-sequence token costs a token and has no text."""
    deltas = _deltas(_sequence(), [*_ids("ab"), _END, *_ids("c")])
    assert [(delta.text, delta.token_count, delta.finish) for delta in deltas] == [
        ("a", 1, None),
        ("b", 1, None),
        ("", 1, FinishReason.STOP),
    ]


def test_the_last_token_allowed_ends_the_sequence() -> None:
    """At max_tokens the finish is ``length`` and the last token's text is shown."""
    deltas = _deltas(_sequence(max_tokens=2), _ids("abc"))
    assert (_text(deltas), len(deltas), deltas[-1].finish) == ("ab", 2, FinishReason.LENGTH)


def test_a_stop_token_as_the_last_allowed_is_a_stop() -> None:
    """Ending by oneself counts before running out of tokens."""
    assert _deltas(_sequence(max_tokens=1), [_END])[-1].finish is FinishReason.STOP


def test_a_stop_string_as_the_last_allowed_is_a_stop() -> None:
    """Meeting a stop string counts before running out of tokens."""
    deltas = _deltas(_sequence(max_tokens=3, stop=("bc",)), _ids("abcd"))
    assert (_text(deltas), deltas[-1].finish) == ("a", FinishReason.STOP)


@given(st.text("abc", max_size=10), st.lists(st.text("abc", min_size=1, max_size=3), max_size=2))
def test_text_ends_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    """Whatever the tokens, the text ends where the first stop string to be complete begins; else all of it is shown."""
    deltas = _deltas(_sequence(stop=tuple(stops)), [*_ids(text), _END])
    ends = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    shown, tokens = (text[: min(ends)[1]], min(ends)[0]) if ends else (text, len(text) + 1)
    assert (_text(deltas), len(deltas), deltas[-1].finish) == (shown, tokens, FinishReason.STOP)


def test_a_stop_string_may_lie_inside_one_token() -> None:
    """Of the token that holds the stop string, the text before it is shown."""
    [hello] = [_tokenizer().get_vocab()["hello"]]
    deltas = _deltas(_sequence(stop=("l",)), [hello])
    assert (_text(deltas), deltas[-1].finish) == ("he", FinishReason.STOP)


@pytest.mark.parametrize(
    ("tokens", "limit", "shown"),
    [([*_ids("xS"), _END], 10, "xS"), (_ids("xS"), 2, "xS"), ([*_ids("x"), *_ids("é")[:1]], 2, "x�")],
    ids=["stop-token", "length", "half-character"],
)
def test_what_was_held_back_is_shown_at_the_end(tokens: list[int], limit: int, shown: str) -> None:
    """The start of a stop string that never came, and a character cut off, are not lost."""
    assert _text(_deltas(_sequence(max_tokens=limit, stop=("STOP",)), tokens)) == shown


def test_half_a_character_is_held_back() -> None:
    """A delta never ends inside a character; its token is counted all the same."""
    assert [(delta.text, delta.token_count) for delta in _deltas(_sequence(), _ids("é!"))] == [
        ("", 1),
        ("é", 1),
        ("!", 1),
    ]


def test_choice_and_length_are_told() -> None:
    """A delta names its choice; the length counts prompt and answer."""
    sequence = _sequence(choice=3)
    [delta] = _deltas(sequence, _ids("a"))
    assert (delta.choice, sequence.length) == (3, 4)


def test_each_choice_draws_from_its_own_seed() -> None:
    """Choice i of seed s draws what choice 0 of seed s + i draws; without a seed two choices differ."""
    third, alone = _sequence(seed=7, choice=3), _sequence(seed=10)
    assert third.sampler.generator.random() == alone.sampler.generator.random()
    assert _sequence().sampler.generator.random() != _sequence(choice=1).sampler.generator.random()


def test_a_broken_processor_ends_its_sequence() -> None:
    """The sequence ends with the token at which a processor could not go on, and says why."""
    request = Prepared(1, "r", [1], 100, SamplingParams())
    sequence = Sequence(request, 0, _table(), frozenset([_END]), [Breaks()])
    assert (sequence.take(_ids("a")[0]), sequence.error) == (False, None)
    assert (sequence.take(_ids("b")[0]), sequence.error) == (True, "no way on")


@pytest.mark.parametrize("top", [0, 1, 5, 20])
def test_logprobs_are_natural_and_normalised(top: int) -> None:
    """The chosen token's log-softmax, then the k best, best first; each with its own bytes."""
    row: Logits = np.random.default_rng(0).normal(0, 3, len(_tokenizer())).astype(np.float32)
    exact = row - row.max() - math.log(np.exp(row.astype(np.float64) - row.max()).sum())
    sequence = _sequence(logprobs=top)
    [token] = _ids("a")
    sequence.take(token, row)
    [entry] = sequence.delta().logprobs or []
    assert (entry.token, entry.raw) == ("a", b"a")
    assert entry.logprob == pytest.approx(exact[token], abs=1e-6)
    best = np.argsort(-exact)[:top]
    assert [other.logprob for other in entry.top] == pytest.approx(exact[best].tolist(), abs=1e-6)
    assert [other.raw for other in entry.top] == [_table().raw(int(id)) for id in best]
    assert sequence.wants_logprobs


def test_more_alternatives_than_tokens_are_all_tokens() -> None:
    """Asked for 20 of a vocabulary of 4, there are 4."""
    sequence = _sequence(logprobs=20)
    sequence.take(0, np.array([0.0, 1.0, 2.0, 3.0], dtype=np.float32))
    [entry] = sequence.delta().logprobs or []
    assert len(entry.top) == 4


def test_an_impossible_token_has_the_floor_as_logprob() -> None:
    """Minus infinity is no JSON number: OpenAI's -9999 stands for it."""
    sequence = _sequence(logprobs=2)
    sequence.take(0, np.array([0.0, -math.inf], dtype=np.float32))
    [entry] = sequence.delta().logprobs or []
    assert [other.logprob for other in entry.top] == [0.0, -9999.0]


def test_logprobs_belong_to_their_own_token() -> None:
    """A delta carries its token's log-probabilities once; a row that did not ask carries none."""
    sequence = _sequence(logprobs=0)
    row: Logits = np.zeros(300, dtype=np.float32)
    sequence.take(1, row)
    first = sequence.delta().logprobs
    sequence.take(2, row)
    second = sequence.delta().logprobs
    assert first is not None
    assert second is not None
    assert [entry.raw for entry in first + second] == [_table().raw(1), _table().raw(2)]
    assert not _sequence().wants_logprobs
