"""Token ids to text, one token at a time, in time independent of the text's length.

A tokenizer whose decoder is a plain map of tokens to bytes (byte-level BPE, SentencePiece with byte fallback) is
decoded by that map; any other by the tokenizer's own decoder over a sliding window of tokens.
"""

import codecs
import json
from collections.abc import Callable, Sequence, Set
from typing import Any

from opta_lmx.types import TokenLogprob

_SPACE_MARK = "\u2581"  # SentencePiece's stand-in for a space

# OpenAI's floor for a token that cannot occur; -inf is not JSON.
_LEAST_LOGPROB = -9999.0


def byte_level_alphabet() -> dict[str, int]:
    """The printable stand-ins byte-level BPE uses for each byte (the published GPT-2 mapping)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(256 + rank): byte for rank, byte in enumerate(others)})
    return alphabet


class TokenTable:
    """What each token id stands for. One per loaded model; read by the owner thread only."""

    def __init__(self, tokenizer: Any, keep: Set[str] = frozenset()) -> None:
        """``tokenizer`` is a transformers fast tokenizer; ``keep`` are control tokens that are text all the same."""
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        added = tokenizer.added_tokens_decoder
        self._special = {id for id, token in added.items() if token.special and token.content not in keep}
        self._added = {id: token.content for id, token in added.items()}
        kept = {id: token.content.encode() for id, token in added.items() if token.special and token.content in keep}
        self._keeps = bool(kept)
        self._pieces: dict[int, bytes] = kept
        self._to_bytes, self.strips_first_space = _byte_rule(self._backend)

    @property
    def is_byte_map(self) -> bool:
        """False if only the tokenizer's own decoder knows how tokens join."""
        return self._to_bytes is not None

    def is_special(self, token: int) -> bool:
        """True for control tokens, whose text is not part of an answer."""
        return token in self._special

    def raw(self, token: int) -> bytes:
        """The bytes of one token on its own; special tokens give their literal text."""
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._find(token)
        return piece

    def decode(self, tokens: list[int]) -> str:
        """Text of a run of tokens by the tokenizer's own decoder, special ones left out."""
        if self._keeps:
            tokens = [token for token in tokens if token not in self._special]
        text: str = self._backend.decode(tokens, skip_special_tokens=not self._keeps)
        return text

    def literal(self, tokens: list[int]) -> str:
        """The same with the special ones, as a prompt is shown."""
        text: str = self._backend.decode(tokens, skip_special_tokens=False)
        return text

    def scored(self, token: int, logprob: float, top: Sequence[TokenLogprob] = ()) -> TokenLogprob:
        """A token on its own with its log-probability, and the alternatives to it."""
        raw = self.raw(token)
        return TokenLogprob(raw.decode("utf-8", "replace"), max(logprob, _LEAST_LOGPROB), raw, list(top))

    def _find(self, token: int) -> bytes:
        name: str | None = self._added.get(token) or self._tokenizer.convert_ids_to_tokens(token)
        if name is None:
            return b""
        if self._to_bytes is not None:
            return self._to_bytes(name)
        text: str = self._backend.decode([token], skip_special_tokens=False)
        return text.encode()


class Detokenizer:
    """Turns one sequence's tokens into text; never emits half a character."""

    def __init__(self, table: TokenTable) -> None:
        self._table = table
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_next = table.strips_first_space
        # For a tokenizer that is no byte map: the tokens that may still change how the next ones read, and how many
        # of them have been told.
        self._window: list[int] = []
        self._told = 0

    def add(self, token: int) -> str:
        """Text that became certain with this token; empty while a character is incomplete."""
        if not self._table.is_byte_map:
            self._window.append(token)
            return self._read_window(final=False)
        if self._table.is_special(token):
            return ""
        text = self._utf8.decode(self._table.raw(token))
        if self._strip_next and text:
            self._strip_next = False
            return text.removeprefix(" ")
        return text

    def flush(self) -> str:
        """The remains of an incomplete character, as U+FFFD."""
        if not self._table.is_byte_map:
            return self._read_window(final=True)
        return self._utf8.decode(b"", final=True)

    def _read_window(self, *, final: bool) -> str:
        """What the untold tokens add to the told ones; nothing while they end inside a character."""
        before = self._table.decode(self._window[: self._told])
        text = self._table.decode(self._window)
        if not final and (len(text) <= len(before) or text.endswith("\ufffd")):
            return ""
        self._window = self._window[self._told :]
        self._told = len(self._window)
        return text[len(before) :]


def _byte_rule(backend: Any) -> tuple[Callable[[str], bytes] | None, bool]:
    """How this tokenizer's vocabulary spells bytes, and whether the text's first space is dropped."""
    decoder = json.loads(backend.to_str())["decoder"] or {}
    steps = decoder.get("decoders", [decoder])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level, False
    spells_spaces = any(
        step.get("type") == "Replace" and step.get("pattern") == {"String": _SPACE_MARK} for step in steps
    )
    if spells_spaces and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        return _sentencepiece, "Strip" in kinds
    return None, False


_ALPHABET = byte_level_alphabet()


def _byte_level(name: str) -> bytes:
    try:
        return bytes(map(_ALPHABET.__getitem__, name))
    except KeyError:  # a token outside the alphabet stands for its own text
        return name.encode()


def _sentencepiece(name: str) -> bytes:
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return bytes.fromhex(name[3:5])
    return name.replace(_SPACE_MARK, " ").encode()
