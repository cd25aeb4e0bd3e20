"""Texts as rows of tokens, and rows in batches."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from opta_lmx.errors import ContextTooLong, InvalidRequest
from opta_lmx.inference.worker.embedding_inputs import InputReader, Row, batches
from opta_lmx.types import TextPrompt, TokenPrompt

LONGEST = 6


@pytest.fixture
def reader() -> InputReader:
    """Words of a small vocabulary between [CLS] and [SEP]; its file says to cut at 3 tokens and to pad to 9."""
    words = ("[UNK]", "[CLS]", "[SEP]", "the", "boat", "sails")
    tokenizer = Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    return InputReader(tokenizer, len(words), LONGEST, lowercase=True)


def test_texts_are_read_whole_and_as_they_are(reader: InputReader) -> None:
    """Neither cut nor padded, whatever the tokenizer's file says; token ids get nothing around them."""
    rows = reader.inputs([TextPrompt("The boat SAILS"), TokenPrompt([4, 5])], "input")
    assert rows == [Row([1, 3, 4, 5, 2], [0] * 5), Row([4, 5], [0, 0])]


def test_pairs_are_told_apart_by_their_types(reader: InputReader) -> None:
    """The query's tokens have type 0, the document's type 1."""
    assert reader.pairs("the", ["boat", "sails"]) == [
        Row([1, 3, 2, 4, 2], [0, 0, 0, 1, 1]),
        Row([1, 3, 2, 5, 2], [0, 0, 0, 1, 1]),
    ]


def test_what_is_too_long_is_refused_by_its_place(reader: InputReader) -> None:
    """The longest input is read; one token more is refused with both numbers."""
    assert len(reader.inputs([TextPrompt("the boat sails the")], "input")[0].ids) == LONGEST
    with pytest.raises(ContextTooLong) as refused:
        reader.inputs([TextPrompt("the boat sails the boat")], "input")
    assert (refused.value.prompt_tokens, refused.value.context_length, refused.value.param) == (7, 6, "input")
    with pytest.raises(ContextTooLong) as refused:
        reader.pairs("the", ["boat", "the boat sails"])
    assert refused.value.param == "documents[1]"


@pytest.mark.parametrize("token", [-1, 6])
def test_an_id_the_model_does_not_have_is_refused(reader: InputReader, token: int) -> None:
    """With the range of those it has."""
    with pytest.raises(InvalidRequest, match="from 0 to 5") as refused:
        reader.inputs([TextPrompt("the"), TokenPrompt([token])], "input")
    assert refused.value.param == "input[1]"


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 100))
def test_batches_hold_every_row_once_and_stay_small(lengths: list[int], most_tokens: int) -> None:
    """No batch, padded to its longest row, is over the limit unless that row alone is; rows of like length meet."""
    found = batches(lengths, most_tokens)
    assert sorted(place for batch in found for place in batch) == list(range(len(lengths)))
    for batch in found:
        assert len(batch) == 1 or max(lengths[place] for place in batch) * len(batch) <= most_tokens
    in_order = [lengths[place] for batch in found for place in batch]
    assert in_order == sorted(lengths, reverse=True)
