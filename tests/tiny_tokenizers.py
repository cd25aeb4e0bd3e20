"""Tokenizers with a vocabulary written down here, one for each way of joining tokens to text; no MLX, no files.

Every one has a control token, a token for every byte, and some longer ones, so that random ids make valid and broken
UTF-8 alike.
"""

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from opta_lmx.inference.worker.detokenizer import byte_level_alphabet

CONTROL = "<|control|>"
# Beyond every vocabulary here: what a model with a padded vocabulary may say.
UNKNOWN_ID = 100_000

_WORDS = ("hello", " world", "naïve", "日本", "😀", "  ", "\n", "<b>")


def byte_level() -> Any:
    """GPT-2's way: every byte has a printable stand-in."""
    spell = {byte: char for char, byte in byte_level_alphabet().items()}
    words = ["".join(spell[byte] for byte in word.encode()) for word in _WORDS]
    # Halves of one character, as real merges leave them.
    halves = ["".join(spell[byte] for byte in half) for half in (b"\xf0\x9f", b"\x98\x80")]
    tokenizer = Tokenizer(models.BPE(vocab=_numbered([*spell.values(), *words, *halves]), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _finished(tokenizer, ["<tool call>"])


def sentencepiece(*, strip_first_space: bool) -> Any:
    """SentencePiece with byte fallback: Llama's strips the text's first space, Gemma's does not.

    As in Gemma, a run of spaces is an added token that is not a control token.
    """
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strip_first_space:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer = _fallback_bpe()
    tokenizer.decoder = decoders.Sequence(steps)
    return _finished(tokenizer, ["▁▁▁"])


def metaspace() -> Any:
    """Byte fallback with a decoder that is no map of tokens to bytes."""
    tokenizer = _fallback_bpe()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    return _finished(tokenizer, [])


def word_piece() -> Any:
    """BERT's way: spaces come from the decoder, not from the tokens."""
    vocab = _numbered(["[UNK]", "hello", "##lo", "wor", "##ld", ",", "'", "s"])
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return _finished(tokenizer, [])


def _fallback_bpe() -> Tokenizer:
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *(word.replace(" ", "▁") for word in _WORDS), "▁"]
    return Tokenizer(models.BPE(vocab=_numbered(pieces), merges=[], byte_fallback=True, unk_token="<unk>"))


def _numbered(pieces: list[str]) -> dict[str, int]:
    return {piece: id for id, piece in enumerate(pieces)}


def _finished(tokenizer: Tokenizer, added: list[str]) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    tokenizer.add_special_tokens([CONTROL])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
