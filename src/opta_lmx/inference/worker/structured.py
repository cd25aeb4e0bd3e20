"""Answers that follow a grammar: llguidance says which tokens may come next, and the row's other logits are masked.

The mask is computed while the forward runs (``Grammar.prepare``, called by ``batch.py``), so a row waits only for the
mask to be laid on and the token to be taken. Microseconds a token, median and 99th percentile, on one core of a shared
x86 server, llguidance 1.9.1, random logits, a schema with three fields / any JSON object:

==========  ===================  ===================  ===============
vocabulary  prepare              apply                accept
==========  ===================  ===================  ===============
512         11 (162) / 3 (39)    21 (171) / 12 (27)   5 (58) / 3 (9)
49,152      11 (259) / 23 (182)  52 (178) / 89 (149)  5 (27) / 9 (28)
==========  ===================  ===================  ===============
"""

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer

from opta_lmx.errors import InvalidRequest
from opta_lmx.inference.worker.marks import Gate
from opta_lmx.inference.worker.sampler_rows import Logits
from opta_lmx.inference.worker.tool_schema import call_schema
from opta_lmx.types import JsonObject, Structured

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
        matcher, fault = self._try(wanted)
        if matcher is not None:
            return matcher
        if wanted.kind == "tool_call":
            for tool in wanted.spec:
                _, own_fault = self._try(Structured("tool_call", [tool]))
                if own_fault is not None:
                    raise _refused_tool(tool, own_fault)
        raise InvalidRequest(f"Invalid schema for {wanted.field}: {fault}", param=wanted.field)

    def _try(self, wanted: Structured) -> tuple[LLMatcher | None, str | None]:
        """A matcher, or the compiler's reason against it."""
        assert self._table is not None
        try:
            matcher = LLMatcher(self._table, _grammar(wanted))
        except ValueError as error:
            return None, " ".join(str(error).split())
        return (None, " ".join(matcher.get_error().split())) if matcher.is_error() else (matcher, None)


class Grammar:
    """One row's place in its grammar; a LogitsProcessor. ``error`` is set if the grammar could not go on.

    While ``gate`` is closed the row is free.
    """

    def __init__(self, matcher: LLMatcher, gate: Gate) -> None:
        self.error: str | None = None
        self._matcher = matcher
        self._gate = gate
        self._allowed: bytes | None = None

    def prepare(self) -> None:
        """Compute the next mask while the forward runs."""
        if self._allowed is None and self.error is None and not self._gate.closed:
            self._allowed = self._matcher.compute_bitmask()
            self.error = _STUCK if self._matcher.is_error() else None

    def apply(self, row: Logits) -> None:
        """Mask every token the grammar does not allow next."""
        self.prepare()
        if self._allowed is None:
            return
        others = self._gate.others
        kept = row[others]
        bits = np.unpackbits(np.frombuffer(self._allowed, dtype=np.uint8), bitorder="little")
        known = min(len(bits), len(row))
        row[known:] = -np.inf
        row[:known][bits[:known] == 0] = -np.inf
        row[others] = kept

    def accept(self, token: int) -> None:
        """Move on by the sampled token."""
        self._allowed = None
        if self._gate.keeps(token):
            return
        if not self._matcher.is_stopped() and not self._matcher.consume_token(token):
            self.error = _STUCK


def _grammar(wanted: Structured) -> str:
    kind, spec = wanted.kind, wanted.spec
    if kind == "tool_call":
        return LLMatcher.grammar_from_json_schema(json.dumps({**call_schema(spec), "x-guidance": _JSON_OPTIONS}))
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


def _refused_tool(tool: JsonObject, fault: str) -> InvalidRequest:
    return InvalidRequest(
        f"Invalid schema for function {tool['name']!r}: {fault}",
        param=tool["field"],
        code="invalid_function_parameters",
    )
