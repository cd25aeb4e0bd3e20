"""Where reasoning and calls begin and end for a grammar and for a budget of reasoning."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest

from opta_lmx.inference.output.formats import markers
from opta_lmx.inference.worker.detokenizer import Detokenizer, TokenTable
from opta_lmx.inference.worker.marks import Gate, Marks
from tests import tiny_tokenizers

SPECIAL = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<|channel|>", "<|message|>", "<|start|>", "<|end|>")
HARMONY_FINAL = "<|end|><|start|>assistant<|channel|>final<|message|>"
VOCABULARY = 600
# DeepSeek spells spaces in its marks as SentencePiece does in texts.
SPACED = "<\uff5ctool\u2581calls\u2581begin\uff5c>"


class House:
    """A tokenizer with the marks of several families, and one model's marks in it."""

    def __init__(
        self,
        tool_format: str | None,
        reasoning_format: str | None,
        special: Sequence[str] = SPECIAL,
        tokenizer: Callable[[], Any] = tiny_tokenizers.byte_level,
    ) -> None:
        self.tokenizer: Any = tokenizer()
        self.tokenizer.add_tokens(list(special), special_tokens=True)
        self.table = TokenTable(self.tokenizer, keep=markers(tool_format, reasoning_format))
        self.marks = Marks(self.tokenizer, self.table, tool_format, reasoning_format)

    def ids(self, text: str) -> list[int]:
        """The tokens of a text."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def text(self, ids: list[int]) -> str:
        """The text of some tokens as an answer has it."""
        detokenizer = Detokenizer(self.table)
        return "".join(map(detokenizer.add, ids)) + detokenizer.flush()


def stages(gate: Gate, ids: list[int]) -> list[bool]:
    """For each token whether the grammar must not see it."""
    return [gate.keeps(token) for token in ids]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("<|start|>assistant\n<think>\n", True),
        ("<|start|>assistant\n<think>", True),
        ("<|start|>assistant\n", False),
        ("<|start|>assistant\n<think>\n\n</think>\n\n", False),
        ("Say <think><|end|>\n<|start|>assistant\n", False),
        ("", False),
    ],
)
def test_a_prompt_may_open_the_reasoning(prompt: str, expected: bool) -> None:
    """Only by its very last words: what a user wrote before them opens nothing."""
    house = House("hermes", "think")
    assert house.marks.in_reasoning(house.ids(prompt)) is expected
    assert not House("hermes", None).marks.in_reasoning(house.ids(prompt))


@pytest.mark.parametrize(
    "tokenizer",
    [
        tiny_tokenizers.byte_level,
        partial(tiny_tokenizers.sentencepiece, strip_first_space=True),
        partial(tiny_tokenizers.sentencepiece, strip_first_space=False),
        tiny_tokenizers.metaspace,
    ],
)
def test_marks_are_text_and_other_control_tokens_are_not(tokenizer: Callable[[], Any]) -> None:
    """What the parser looks for must reach it as it is spelt, for every kind of tokenizer."""
    house = House("deepseek_v3", "think", [*SPECIAL, SPACED], tokenizer)
    # A decoder that is no map of tokens to bytes reads the spaces in a mark; no model has both.
    text = f"hello<think>hello</think>{SPACED if house.table.is_byte_map else ''}hello"
    assert house.text(house.ids(f"<|start|>{text}<|end|>")) == text


@pytest.mark.parametrize("prompt", ["assistant", "assistant<think>"])
def test_a_grammar_waits_for_the_end_of_reasoning(prompt: str) -> None:
    """Whether the prompt opened it or the model did."""
    house = House(None, "think")
    gate = house.marks.gate(house.ids(prompt), or_call=False)
    opened = prompt.endswith("<think>")
    assert gate.closed is opened
    assert gate.others == ([] if opened else house.ids("<think>"))
    reasoning = house.ids("hm</think>" if opened else "<think>hm</think>")
    assert all(stages(gate, reasoning))
    assert (gate.closed, gate.others) == (False, [])
    assert stages(gate, house.ids("{}<think>")) == [False, False, False]


def test_a_mark_of_several_tokens_is_found() -> None:
    """Marks that are no tokens of their own cannot be offered, but they end reasoning all the same."""
    house = House(None, "think", special=[])
    assert house.marks.gate(house.ids("x"), or_call=False).others == []
    gate = house.marks.gate(house.ids("x<think>"), or_call=False)
    assert all(stages(gate, house.ids("a < b </think>")))
    assert not gate.closed


def test_a_call_instead_of_the_form_is_free() -> None:
    """Where tools are offered with a form of answer, the mark of a call lifts the grammar for good."""
    house = House("hermes", None)
    gate = house.marks.gate(house.ids("x"), or_call=True)
    assert gate.others == house.ids("<tool_call>")
    assert all(stages(gate, house.ids('<tool_call>{"name"}</tool_call> and more')))
    assert house.marks.gate(house.ids("x"), or_call=False).others == []


def test_a_template_told_not_to_think_is_obeyed() -> None:
    """After an empty block in the prompt the grammar offers no other."""
    house = House(None, "think")
    assert house.marks.gate(house.ids("<think>\n\n</think>\n\n"), or_call=False).others == []


@pytest.mark.parametrize(
    ("reasoning_format", "prompt", "said", "closing"),
    [
        ("think", "x<think>\n", "hm", "</think>"),
        ("think", "x", "<think>hm", "</think>"),
        ("harmony", "<|start|>assistant", "<|channel|>analysis<|message|>hm", HARMONY_FINAL),
    ],
)
def test_a_budget_ends_reasoning(reasoning_format: str, prompt: str, said: str, closing: str) -> None:
    """Two tokens of reasoning are left to the model; then come the mark's tokens, one by one, and it is free again."""
    house = House(None, reasoning_format)
    budget = house.marks.budget(2, in_reasoning=house.marks.in_reasoning(house.ids(prompt)))
    assert budget is not None
    for token in house.ids(said):
        row = np.zeros(VOCABULARY, dtype=np.float32)
        budget.apply(row)
        assert not row.any()
        budget.accept(token)
    for token in house.ids(closing):
        row = np.zeros(VOCABULARY, dtype=np.float32)
        budget.apply(row)
        assert np.flatnonzero(row == 0).tolist() == [token]
        budget.accept(token)
    row = np.zeros(VOCABULARY, dtype=np.float32)
    budget.apply(row)
    assert not row.any()


def test_a_model_that_does_not_think_has_no_budget() -> None:
    """There is nothing to end."""
    assert House("hermes", None).marks.budget(5, in_reasoning=False) is None


def test_a_grammar_on_harmony_begins_in_the_last_channel() -> None:
    """The prompt is led there, since the model could write into others."""
    house = House("harmony", "harmony")
    assert house.text(house.marks.answer_opening) == "<|channel|>final<|message|>"
    assert house.marks.gate(house.ids("x"), or_call=False).others == []
    assert House("hermes", "think").marks.answer_opening == []
