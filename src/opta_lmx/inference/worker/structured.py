"""Answers that follow a grammar: llguidance says which tokens may come next, and the row's other logits are masked."""

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer

from opta_lmx.errors import InvalidRequest
from opta_lmx.inference.worker.sampling import Logits
from opta_lmx.types import Structured

# With free white space a weak model can fill its whole allowance with it and never finish the document.
_JSON_OPTIONS = {"whitespace_flexible": False}


# llguidance's own words hold the answer so far, which belongs in no error and no log.
_STUCK = "its grammar allows no way to go on"


class GrammarCompiler:
    """Compiles grammars for one model. Used by the reader thread only."""

    def __init__(self, tokenizer: Any, vocab_size: int, stop_ids: Iterable[int]) -> None:
        """``vocab_size`` is the width of the logits. Nothing is built before the first grammar (about 0.3 s)."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stop_ids = sorted(stop_ids)
        self._table: LLTokenizer | None = None

    def compile(self, wanted: Structured) -> LLMatcher:
        """A fresh matcher; raises InvalidRequest with the compiler's reason if the grammar cannot be used."""
        if self._table is None:
            self._table = from_tokenizer(self._tokenizer, n_vocab=self._vocab_size, eos_token=self._stop_ids or None)
        try:
            matcher = LLMatcher(self._table, _grammar(wanted))
        except ValueError as error:
            raise _refusal(wanted, str(error)) from error
        if matcher.is_error():
            raise _refusal(wanted, matcher.get_error())
        return matcher


class Grammar:
    """One row's place in its grammar; a LogitsProcessor. ``error`` is set if the grammar could not go on."""

    def __init__(self, matcher: LLMatcher) -> None:
        self.error: str | None = None
        self._matcher = matcher
        self._allowed: bytes | None = None

    def prepare(self) -> None:
        """Compute the next mask while the forward runs."""
        if self._allowed is None and self.error is None:
            self._allowed = self._matcher.compute_bitmask()
            self.error = _STUCK if self._matcher.is_error() else None

    def apply(self, row: Logits) -> None:
        """Mask every token the grammar does not allow next."""
        self.prepare()
        if self._allowed is None:
            return
        bits = np.unpackbits(np.frombuffer(self._allowed, dtype=np.uint8), bitorder="little")
        known = min(len(bits), len(row))
        row[known:] = -np.inf
        row[:known][bits[:known] == 0] = -np.inf

    def accept(self, token: int) -> None:
        """Move on by the sampled token."""
        self._allowed = None
        if not self._matcher.is_stopped() and not self._matcher.consume_token(token):
            self.error = _STUCK


def _grammar(wanted: Structured) -> str:
    kind, spec = wanted.kind, wanted.spec
    if kind == "json_object":
        return LLMatcher.grammar_from_json_schema({"type": "object", "x-guidance": _JSON_OPTIONS})
    if kind == "json_schema":
        schema = {**spec, "x-guidance": _JSON_OPTIONS} if isinstance(spec, dict) else spec
        return LLMatcher.grammar_from_json_schema(json.dumps(schema))
    if kind == "regex":
        return LLMatcher.grammar_from_regex(spec)
    if kind == "choice":
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(choice) for choice in spec))
    return LLMatcher.grammar_from_lark(spec)


def _refusal(wanted: Structured, reason: str) -> InvalidRequest:
    return InvalidRequest(f"Invalid schema for {wanted.field}: {reason.strip()}", param=wanted.field)
