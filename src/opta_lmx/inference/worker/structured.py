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

import time
from collections import OrderedDict
from collections.abc import Iterable
from hashlib import sha256
from typing import Any, Final

import msgspec
import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer

from opta_lmx.errors import InvalidRequest
from opta_lmx.inference.worker.grammar_trial import LIMITS, MOST_SECONDS, GrammarTrial
from opta_lmx.inference.worker.marks import Gate
from opta_lmx.inference.worker.sampler_rows import Logits
from opta_lmx.inference.worker.tool_schema import call_schema
from opta_lmx.types import JsonObject, Structured

# With free white space a weak model can fill its whole allowance with it and never finish the document.
_JSON_OPTIONS = {"whitespace_flexible": False}

# Of a grammar written out, tools' descriptions included.
_MOST_CHARACTERS: Final = 1_000_000

# For one mask, of this thread's processor time: everybody's step waits for it, and may wait so long
# (``scheduling.stall_bound_seconds``).
MOST_MASK_SECONDS: Final = 0.25

# To find which of several tools is at fault, after they were tried together.
_BLAME_SECONDS: Final = 1.0

# Of an answer, chosen on trial when its grammar has been compiled: most grammars that cannot be followed show it there.
_TOKENS_AHEAD: Final = 3

# Grammars that are known to compile; agents send the same ones again and again.
_MOST_KNOWN: Final = 256

# llguidance's own words hold the answer so far, which belongs in no error and no log.
_STUCK = "its grammar allows no way to go on"
_SLOW = "its grammar takes too long to follow"


class GrammarCompiler:
    """Compiles grammars for one model. Used by one thread at a time."""

    def __init__(
        self,
        tokenizer: Any,
        vocab_size: int,
        stop_ids: Iterable[int],
        most_mask_seconds: float = MOST_MASK_SECONDS,
    ) -> None:
        """``vocab_size`` is the width of the logits. Nothing is built before the first grammar (about 0.3 s)."""
        self._most_mask_seconds = most_mask_seconds
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stop_ids = sorted(stop_ids)
        self._table: LLTokenizer | None = None
        self._trial = GrammarTrial()
        self._known: OrderedDict[bytes, None] = OrderedDict()

    def compile(self, wanted: Structured) -> LLMatcher:
        """A fresh matcher; raises InvalidRequest with the reason if the grammar cannot be used.

        Twice MOST_SECONDS at most, and _BLAME_SECONDS more to name one of several tools.
        """
        matcher, fault = self._try(wanted, MOST_SECONDS)
        if matcher is not None:
            return matcher
        if wanted.kind == "tool_call":
            self._blame(wanted.spec, fault)
        raise InvalidRequest(f"Invalid schema for {wanted.field}: {fault}", param=wanted.field)

    def _blame(self, tools: list[JsonObject], fault: str | None) -> None:
        """Raises for the first tool that cannot be used alone, if it is found in time."""
        if len(tools) == 1:
            raise _refused_tool(tools[0], fault)
        ends_at = time.monotonic() + _BLAME_SECONDS
        for tool in tools:
            left = ends_at - time.monotonic()
            # With less, the next one would be blamed for the time that those before it took.
            if left < _BLAME_SECONDS / 2:
                return
            _, own_fault = self._try(Structured("tool_call", [tool]), left)
            if own_fault is not None:
                raise _refused_tool(tool, own_fault)

    def _try(self, wanted: Structured, most_seconds: float) -> tuple[LLMatcher | None, str | None]:
        """A matcher, or the reason against it."""
        try:
            grammar = _grammar(wanted)
        except ValueError as error:
            return None, _in_short(str(error))
        key = sha256(grammar.encode()).digest()
        fault = None if key in self._known else self._tried(grammar, most_seconds)
        if fault is not None:
            return None, _in_short(fault)
        matcher, fault = self._built(grammar)
        if matcher is not None:
            self._remember(key)
        return matcher, fault

    def _tried(self, grammar: str, most_seconds: float) -> str | None:
        if len(grammar) > _MOST_CHARACTERS:
            return f"it is longer than {_MOST_CHARACTERS:,} characters"
        return self._trial.fault(grammar, most_seconds)

    def _built(self, grammar: str) -> tuple[LLMatcher | None, str | None]:
        """A matcher over the model's own vocabulary, with which some tokens were chosen to see what they cost."""
        if self._table is None:
            self._table = from_tokenizer(self._tokenizer, n_vocab=self._vocab_size, eos_token=self._stop_ids or None)
        matcher = LLMatcher(self._table, grammar, log_level=0, limits=LIMITS)
        if matcher.is_error():
            return None, _in_short(matcher.get_error())
        ahead = matcher.deep_copy()
        for _ in range(_TOKENS_AHEAD):
            if ahead.is_stopped():
                break
            again = ahead.deep_copy()
            allowed, seconds = _mask(ahead)
            # Twice: a moment in which the machine is slow must refuse nobody.
            if seconds > self._most_mask_seconds and _mask(again)[1] > self._most_mask_seconds:
                return None, f"it takes more than {self._most_mask_seconds:g} s to find what may come next"
            bits = np.unpackbits(np.frombuffer(allowed, dtype=np.uint8), bitorder="little")
            if ahead.is_error() or not ahead.consume_token(int(bits.argmax())):
                return None, "it allows no answer, or none that can be found in bounds of time and memory"
        return matcher, None

    def _remember(self, key: bytes) -> None:
        self._known[key] = None
        self._known.move_to_end(key)
        if len(self._known) > _MOST_KNOWN:
            self._known.popitem(last=False)


class Grammar:
    """One row's place in its grammar; a LogitsProcessor. ``error`` is set if the grammar could not go on.

    While ``gate`` is closed the row is free.
    """

    def __init__(self, matcher: LLMatcher, gate: Gate, most_mask_seconds: float = MOST_MASK_SECONDS) -> None:
        self._most_mask_seconds = most_mask_seconds
        self.error: str | None = None
        self._matcher = matcher
        self._gate = gate
        self._allowed: bytes | None = None

    def prepare(self) -> None:
        """Compute the next mask while the forward runs."""
        if self._allowed is None and self.error is None and not self._gate.closed:
            self._allowed, seconds = _mask(self._matcher)
            if self._matcher.is_error():
                self.error = _STUCK
            elif seconds > self._most_mask_seconds:
                self.error = _SLOW

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


def _mask(matcher: LLMatcher) -> tuple[bytes, float]:
    """What may come next, and the seconds of this thread's processor time that it took to find."""
    since = time.thread_time()
    allowed = matcher.compute_bitmask()
    return allowed, time.thread_time() - since


def _grammar(wanted: Structured) -> str:
    kind, spec = wanted.kind, wanted.spec
    if kind == "tool_call":
        return _from_schema(call_schema(spec))
    if kind == "json_object":
        return _from_schema({"type": "object"})
    if kind == "json_schema":
        return _from_schema(spec)
    if kind == "regex":
        return LLMatcher.grammar_from_regex(spec)
    if kind == "choice":
        return LLMatcher.grammar_from_lark("start: " + " | ".join(_text(choice) for choice in spec))
    return LLMatcher.grammar_from_lark(spec)


def _from_schema(schema: JsonObject) -> str:
    return LLMatcher.grammar_from_json_schema(_text({**schema, "x-guidance": _JSON_OPTIONS}))


def _text(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _in_short(fault: str) -> str:
    """The compiler's message on one line, with its beginning and its end; not where in the compiler it arose."""
    text = " ".join(fault.partition("<backtrace>")[0].split())
    return text if len(text) <= 300 else f"{text[:150]} ... {text[-150:]}"


def _refused_tool(tool: JsonObject, fault: str | None) -> InvalidRequest:
    return InvalidRequest(
        f"Invalid schema for function {tool['name']!r}: {fault}",
        param=tool["field"],
        code="invalid_function_parameters",
    )
