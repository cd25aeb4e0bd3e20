"""What holds for any text a model may write, whatever its format and wherever its tokens end."""

import json
from typing import cast

from hypothesis import given
from hypothesis import strategies as st

from opta_lmx.api.openai.answer import AnswerHead, ChatAnswer, ChatChunks
from opta_lmx.api.openai.tools import to_tool_use
from opta_lmx.api.openai.wire import ChatRequest
from opta_lmx.api.validation import validate
from opta_lmx.inference.engine import Generation
from opta_lmx.types import Delta, FinishReason, GenerateRequest, TextPrompt
from tests.contract.answers import assembled
from tests.contract.conftest import CHAT
from tests.fakes import Script, ScriptedGeneration

FRAGMENTS = (
    "Hello ",
    "\n",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    '{"name": "f", "arguments": {"a": "b}"}}',
    '{"name": "f", "arg',
    "[TOOL_CALLS]",
    "<|channel|>analysis<|message|>",
    "<|end|>",
    "<|start|>assistant<|channel|>final<|message|>",
    " to=functions.f",
    "<",
    "{",
)
TOOL = {"type": "function", "function": {"name": "f"}}

# How a model writes calls and reasoning, and whether its prompt opens the reasoning.
formats = st.tuples(
    st.sampled_from([None, "hermes", "mistral", "llama"]),
    st.sampled_from([(None, False), ("think", False), ("think", True), ("harmony", False)]),
)
texts = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=8).map("".join)
requests = st.sampled_from(
    [
        {},
        {"tools": [TOOL]},
        {"tools": [TOOL], "parallel_tool_calls": False},
        {"tools": [TOOL], "tool_choice": "required"},
    ]
)


@given(
    text=texts,
    cuts=st.lists(st.integers(1, 9), max_size=12),
    model=formats,
    fields=requests,
    finish=st.sampled_from([FinishReason.STOP, FinishReason.LENGTH]),
)
def test_streamed_is_whole(
    text: str,
    cuts: list[int],
    model: tuple[str | None, tuple[str | None, bool]],
    fields: dict[str, object],
    finish: FinishReason,
) -> None:
    """Message, finish and usage of the whole answer are those a client puts together from the chunks."""
    pieces = []
    for size in cuts:
        pieces.append(text[:size])
        text = text[size:]
    deltas = [Delta(0, piece, 1) for piece in [*pieces, text]] + [Delta(0, "", 1, finish)]
    tool_format, (reasoning_format, in_reasoning) = model
    script = Script(tool_format=tool_format, reasoning_format=reasoning_format, in_reasoning=in_reasoning)
    generation = cast(Generation, ScriptedGeneration(GenerateRequest("r", "tiny", TextPrompt("x")), script))
    use = to_tool_use(validate(ChatRequest, CHAT | fields))
    head = AnswerHead("id", 1, choices=1, new_id=lambda: "0", use=use)
    answer = ChatAnswer(head, generation, logprobs=False)
    chunks = ChatChunks(head, generation, include_usage=True, logprobs=False)
    answer.add(deltas)
    stream = chunks.begin() + b"".join(chunks.write([delta]) for delta in deltas) + chunks.end()

    whole = answer.completion().model_dump()
    *events, _ = stream.decode().split("\n\n")
    *objects, usage = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    built = assembled([choice for piece in objects for choice in piece["choices"]])
    assert built.message == whole["choices"][0]["message"]
    assert built.finish_reason == whole["choices"][0]["finish_reason"]
    assert usage["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] == len(deltas)
    for call in whole["choices"][0]["message"].get("tool_calls", ()):
        assert isinstance(json.loads(call["function"]["arguments"]), dict)
