"""Token ids to text: what is streamed is what the tokenizer itself makes of all ids together."""

from functools import cache
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from opta_lmx.inference.worker.detokenizer import Detokenizer, TokenTable
from tests import tiny_tokenizers
from tests.tiny_tokenizers import CONTROL, UNKNOWN_ID

_KINDS = ["byte_level", "llama", "gemma", "metaspace", "word_piece"]
# Where a piece of text is a run of bytes, and a decoder exists that can be asked.
_FALLBACK = ["llama", "gemma", "metaspace"]


@cache
def _tokenizer(kind: str) -> Any:
    match kind:
        case "byte_level":
            return tiny_tokenizers.byte_level()
        case "metaspace":
            return tiny_tokenizers.metaspace()
        case "word_piece":
            return tiny_tokenizers.word_piece()
        case _:
            return tiny_tokenizers.sentencepiece(strip_first_space=kind == "llama")


@cache
def _table(kind: str) -> TokenTable:
    return TokenTable(_tokenizer(kind))


def _ids(kind: str, *pieces: str) -> list[int]:
    """Ids of tokens by their names in the vocabulary."""
    vocab = _tokenizer(kind).get_vocab()
    return [vocab[piece] for piece in pieces]


def _bytes_as_ids(kind: str, text: str) -> list[int]:
    """One token a byte."""
    if kind == "byte_level":
        return [_first_byte_id(byte) for byte in text.encode()]
    return _ids(kind, *(f"<0x{byte:02X}>" for byte in text.encode()))


def _first_byte_id(byte: int) -> int:
    table = _table("byte_level")
    return next(id for id in range(256) if table.raw(id) == bytes([byte]))


def _streamed(kind: str, ids: list[int]) -> str:
    detokenizer = Detokenizer(_table(kind))
    return "".join(detokenizer.add(id) for id in ids) + detokenizer.flush()


def _whole(kind: str, ids: list[int]) -> str:
    """The reference: all ids at once."""
    text: str = _tokenizer(kind).decode(ids, skip_special_tokens=True)
    return text


@given(st.data())
def test_byte_level_tokens_stream_as_they_decode(data: st.DataObject) -> None:
    """Any ids, broken UTF-8 and unknown ids included, give the same text one by one as all together."""
    size = len(_tokenizer("byte_level"))
    ids = data.draw(st.lists(st.integers(0, size - 1) | st.just(UNKNOWN_ID), max_size=20))
    assert _streamed("byte_level", ids) == _whole("byte_level", ids)


@pytest.mark.parametrize("kind", _FALLBACK)
@given(data=st.data())
def test_byte_fallback_streams_as_it_decodes(kind: str, data: st.DataObject) -> None:
    """Words, spaces, control tokens and characters spelt in bytes come out as from the tokenizer itself."""
    names = sorted(name for name in _tokenizer(kind).get_vocab() if not name.startswith("<0x"))
    part = st.sampled_from(names).map(lambda name: _ids(kind, name)) | st.sampled_from("a é日😀").map(
        lambda char: _bytes_as_ids(kind, char)
    )
    ids = [id for ids in data.draw(st.lists(part, max_size=12)) for id in ids]
    assert _streamed(kind, ids) == _whole(kind, ids)


@pytest.mark.parametrize("kind", ["llama", "gemma"])
@given(st.lists(st.integers(0, 255), max_size=12))
@example([0xE2, 0x82, 0x41])
def test_broken_bytes_of_a_fallback_run_become_replacement_characters(kind: str, run: list[int]) -> None:
    """A run of bytes is read as UTF-8 with U+FFFD for what is broken, and what is whole in it is kept.

    The tokenizers library replaces every byte of a run with a broken character in it, even text already streamed.
    """
    ids = [*_ids(kind, "hello"), *_ids(kind, *(f"<0x{byte:02X}>" for byte in run)), *_ids(kind, "hello")]
    assert _streamed(kind, ids) == (b"hello" + bytes(run) + b"hello").decode("utf-8", "replace")


@given(st.lists(st.integers(0, 255), max_size=6))
@example([0x58, 0xE2])
def test_broken_bytes_do_not_break_another_decoder(run: list[int]) -> None:
    """Where the library's own stream decodes, broken UTF-8 raises nothing, and the text goes on after it."""
    hello = _ids("metaspace", "hello")
    streamed = _streamed("metaspace", [*hello, *_ids("metaspace", *(f"<0x{byte:02X}>" for byte in run)), *hello])
    assert streamed.startswith("hello")
    assert streamed.endswith("hello")


@given(st.lists(st.integers(0, 8), max_size=12))
def test_word_pieces_stream_as_they_decode(ids: list[int]) -> None:
    """A decoder that looks at its neighbours (spaces, punctuation) gives the same text token by token."""
    assert _streamed("word_piece", ids) == _whole("word_piece", ids)


@pytest.mark.parametrize("kind", ["byte_level", *_FALLBACK])
def test_no_half_character_is_ever_shown(kind: str) -> None:
    """While a character's bytes arrive nothing is shown; with its last byte the character is."""
    detokenizer = Detokenizer(_table(kind))
    assert [detokenizer.add(id) for id in _bytes_as_ids(kind, "a😀é")] == ["a", "", "", "", "😀", "", "é"]


@pytest.mark.parametrize("kind", ["byte_level", "llama", "gemma"])
def test_a_character_cut_off_by_the_end_is_shown_as_replaced(kind: str) -> None:
    """Text that ends inside a character ends in U+FFFD, so that nothing is lost without a trace."""
    assert _streamed(kind, _bytes_as_ids(kind, "ok 😀")[:-1]) == "ok �"


@pytest.mark.parametrize("kind", _KINDS)
def test_control_tokens_have_no_text_but_a_name(kind: str) -> None:
    """A control token is no part of an answer; its literal text is known for log-probabilities."""
    [control] = _ids(kind, CONTROL)
    hello = _ids(kind, "hello")
    assert _streamed(kind, [control, *hello, control]) == "hello"
    assert _table(kind).raw(control) == CONTROL.encode()
    assert _table(kind).is_special(control)
    assert not _table(kind).is_special(hello[0])


@pytest.mark.parametrize("kind", _KINDS)
def test_an_id_without_a_token_has_no_text(kind: str) -> None:
    """What a model with a padded vocabulary may say is nothing, and does not disturb what follows."""
    assert _streamed(kind, [*_ids(kind, "hello"), UNKNOWN_ID, *_ids(kind, "hello")]) == _whole(
        kind, _ids(kind, "hello", "hello")
    )
    assert _table(kind).raw(UNKNOWN_ID) == b""


def test_only_the_first_space_of_a_text_is_dropped() -> None:
    """Llama's tokenizer drops one space where the text begins, behind control tokens too, and no other."""
    space, control, hello = _ids("llama", "▁", CONTROL, "hello")
    assert _streamed("llama", [control, space, space, hello, space, hello]) == " hello hello"


def test_an_added_run_of_spaces_is_spaces() -> None:
    """Gemma lists runs of spaces as added tokens, spelt with the space mark; they indent, and show no mark."""
    [spaces] = _ids("gemma", "▁▁▁")
    assert _streamed("gemma", [*_ids("gemma", "\n"), spaces, *_ids("gemma", "hello")]) == "\n   hello"
    assert _table("gemma").raw(spaces) == b"   "


@pytest.mark.parametrize("kind", ["byte_level", "llama", "gemma"])
def test_the_raw_bytes_of_a_text_are_its_tokens_bytes_joined(kind: str) -> None:
    """Log-probabilities carry each token's own bytes: joined they are the text, whatever falls inside a character."""
    ids = [*_ids(kind, "hello"), *_bytes_as_ids(kind, "日"), *_ids(kind, "hello")]
    assert b"".join(_table(kind).raw(id) for id in ids) == "hello日hello".encode()
