"""How a model marks reasoning and calls, in its own tokens, and what in the worker heeds these marks.

A grammar begins where reasoning has ended; a budget of reasoning ends it. The marks themselves are told apart from text
on the server's side, by ``inference/output``.
"""

from enum import Enum, auto
from typing import Any

import numpy as np

from opta_lmx.inference.output.formats import REASONING_FORMATS, TOOL_FORMATS
from opta_lmx.inference.worker.detokenizer import TokenTable
from opta_lmx.inference.worker.sampler_rows import Logits

# Harmony's reasoning is a message on a channel; what follows it begins like this.
_HARMONY_START = "<|channel|>analysis<|message|>"
_HARMONY_END = "<|end|>"
_HARMONY_ANSWER = "<|channel|>final<|message|>"
_HARMONY_TURN = "<|start|>assistant"

# No template writes more after the mark that opens a block of reasoning.
_TAIL_TOKENS = 32


class Marks:
    """One model's marks. Made at load; its methods may be called from both threads."""

    def __init__(
        self, tokenizer: Any, table: TokenTable, tool_format: str | None, reasoning_format: str | None
    ) -> None:
        """``tokenizer`` is a transformers tokenizer; the formats are names in ``inference/output/formats.py``."""
        self._tokenizer = tokenizer
        self._table = table
        harmony = reasoning_format == "harmony"
        reasoning = REASONING_FORMATS.get(reasoning_format or "")
        self._start = _HARMONY_START if harmony else reasoning.start if reasoning else ""
        self._end = _HARMONY_END if harmony else reasoning.end if reasoning else ""
        closing = _HARMONY_END + _HARMONY_TURN + _HARMONY_ANSWER if harmony else self._end
        self._closing = self._ids(closing)
        # Harmony leaves a model free to write into any channel; under a grammar there is only the last.
        self.answer_opening = self._ids(_HARMONY_ANSWER) if harmony else []
        self._thinks_at = self._single_tokens(() if harmony else (self._start,))
        calls = TOOL_FORMATS.get(tool_format or "")
        self._calls_at = self._single_tokens(calls.starts if calls else ())

    def in_reasoning(self, token_ids: list[int]) -> bool:
        """True if a prompt ends with the mark that opens reasoning, white space aside."""
        return self._ends_with(token_ids, self._start)

    def gate(self, token_ids: list[int], *, or_call: bool) -> "Gate":
        """What a grammar waits behind, for one choice that follows this prompt."""
        block = ReasoningBlock(self._table, self._start, self._end, is_open=self.in_reasoning(token_ids))
        # A template told not to think writes an empty block.
        thinks_at = frozenset[int]() if self._ends_with(token_ids, self._end) else self._thinks_at
        return Gate(block, thinks_at, self._calls_at if or_call else frozenset())

    def budget(self, tokens: int, *, in_reasoning: bool) -> "ThinkingBudget | None":
        """The processor that ends reasoning after so many tokens, for one choice; None if the model has no marks."""
        if not self._closing:
            return None
        return ThinkingBudget(
            tokens, ReasoningBlock(self._table, self._start, self._end, is_open=in_reasoning), self._closing
        )

    def _ends_with(self, token_ids: list[int], mark: str) -> bool:
        if not mark:
            return False
        tail: str = self._tokenizer.decode(
            token_ids[-_TAIL_TOKENS:], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return tail.rstrip().endswith(mark)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False)) if text else []

    def _single_tokens(self, texts: tuple[str, ...]) -> frozenset[int]:
        """Only a mark of one token can be offered beside what a grammar allows."""
        return frozenset(ids[0] for text in texts if len(ids := self._ids(text)) == 1)


class ReasoningBlock:
    """Follows one choice's tokens in and out of reasoning. ``is_open`` at first if the prompt opened a block."""

    def __init__(self, table: TokenTable, start: str, end: str, *, is_open: bool) -> None:
        self.is_open = is_open
        self._table = table
        self._start, self._end = start.encode(), end.encode()
        self._tail = b""

    def accept(self, token: int) -> None:
        """Learn the next token; a mark may be spread over several."""
        mark = self._end if self.is_open else self._start
        tail = self._tail + self._table.raw(token)
        if mark and mark in tail:
            self.is_open, self._tail = not self.is_open, b""
        else:
            self._tail = tail[-max(len(self._start), len(self._end)) :]


class _Stage(Enum):
    """Where an answer stands with its grammar."""

    BEFORE = auto()
    REASONING = auto()
    CALLING = auto()
    WITHIN = auto()


class Gate:
    """Keeps a grammar waiting while the model reasons, and out of the way if it calls a tool instead."""

    def __init__(self, block: ReasoningBlock, thinks_at: frozenset[int], calls_at: frozenset[int]) -> None:
        """``thinks_at`` and ``calls_at`` are tokens that may begin the answer beside those of the grammar."""
        self._block = block
        self._thinks_at = thinks_at
        self._calls_at = calls_at
        self._stage = _Stage.REASONING if block.is_open else _Stage.BEFORE

    @property
    def closed(self) -> bool:
        """True while the grammar has no say."""
        return self._stage in (_Stage.REASONING, _Stage.CALLING)

    @property
    def others(self) -> list[int]:
        """Tokens allowed now beside those of the grammar."""
        return sorted(self._thinks_at | self._calls_at) if self._stage is _Stage.BEFORE else []

    def keeps(self, token: int) -> bool:
        """Learn the next token; True if it is none of the grammar's."""
        if self._stage is _Stage.REASONING:
            self._block.accept(token)
            if not self._block.is_open:
                # Reasoning comes once.
                self._stage, self._thinks_at = _Stage.BEFORE, frozenset()
            return True
        if self._stage is _Stage.BEFORE:
            if token in self._thinks_at:
                self._block.accept(token)
                self._stage = _Stage.REASONING
            else:
                self._stage = _Stage.CALLING if token in self._calls_at else _Stage.WITHIN
        return self.closed


class ThinkingBudget:
    """Ends reasoning that has taken its tokens, by the mark the model would have written; a LogitsProcessor.

    It must be the last of a row's processors, as it leaves the others no choice.
    """

    error: str | None = None

    def __init__(self, tokens: int, block: ReasoningBlock, closing: list[int]) -> None:
        self._left = tokens
        self._block = block
        self._closing = closing
        self._to_write: list[int] = []

    def prepare(self) -> None:
        """Nothing can be done ahead."""

    def apply(self, row: Logits) -> None:
        """Once the budget is spent, the next token of the mark and nothing else."""
        if not self._to_write and self._block.is_open and self._left <= 0:
            self._to_write = list(self._closing)
        if self._to_write:
            row[:] = -np.inf
            row[self._to_write[0]] = 0.0

    def accept(self, token: int) -> None:
        """A token of reasoning is one less that may follow."""
        if self._block.is_open:
            self._left -= 1
        self._block.accept(token)
        if self._to_write:
            del self._to_write[0]
