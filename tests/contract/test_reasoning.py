"""What a model thinks before it answers: beside the content, and counted."""

import json
from typing import Any

import httpx
import pytest

from opta_lmx.types import Delta, FinishReason, TokenLogprob
from tests.contract.answers import assembled, choices_of, streamed, whole
from tests.fakes import Script, World, text_deltas

TOOL = {"type": "function", "function": {"name": "f"}}
CALL = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
HARMONY = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes."


def thinks(*texts: str, finish: FinishReason = FinishReason.STOP, **facts: Any) -> Script:
    """A thinking model that says these texts, one token each."""
    return Script(text_deltas(*texts, finish=finish), **{"reasoning_format": "think", **facts})


async def test_reasoning_stands_beside_the_content(client: httpx.AsyncClient, world: World) -> None:
    """Under both names in use, and not in the content."""
    world.engine.script = thinks("<think>", "Hm", ".", "</think>", "\n\n", "Yes", ".")
    message = (await whole(client))["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"], message["reasoning"]) == ("Yes.", "Hm.", "Hm.")


async def test_an_answer_without_reasoning_has_no_word_of_it(client: httpx.AsyncClient, world: World) -> None:
    """Keys without a value are left out, for clients with strict types."""
    world.engine.script = thinks("Yes", ".")
    message = (await whole(client))["choices"][0]["message"]
    assert message.keys() == {"role", "content", "refusal", "annotations"}


async def test_reasoning_streams_as_it_comes(client: httpx.AsyncClient, world: World) -> None:
    """One chunk a piece, under both names."""
    world.engine.script = thinks("<think>", "Hm", ".", "</think>", "Yes")
    deltas = [chunk["delta"] for chunk in await choices_of(client)]
    assert deltas == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "Hm", "reasoning": "Hm"},
        {"reasoning_content": ".", "reasoning": "."},
        {"content": "Yes"},
        {},
    ]


@pytest.mark.parametrize(
    ("script", "tokens"),
    [
        (thinks("Hm", ".", "</think>", "Yes", in_reasoning=True), 3),
        (thinks("<think>", "Hm", ".", "</think>", "Yes"), 3),
        (thinks("<", "think", ">", "Hm", ".", "</", "th", "ink>", "Yes"), 5),
        (thinks("Hm", "", ".</think>", "", "Yes", "</think>", in_reasoning=True), 3),
        (thinks("Hm", " a </", "b", "</think", "ing", "</think>", "Yes", in_reasoning=True), 6),
        (thinks("<|channel|>", "analysis", "<|message|>", "Hm", "<|end|>", "<|start|>", reasoning_format="harmony"), 2),
        (thinks("Yes"), 0),
        (thinks("Hm", ".", "", in_reasoning=True, finish=FinishReason.LENGTH), 3),
        (thinks("Yes", "</think>", reasoning_format=None), 0),
    ],
    ids=[
        "opened by the prompt",
        "opened by the model",
        "marks in pieces",
        "tokens without a text of their own",
        "what looks like a mark",
        "a channel",
        "none",
        "cut off",
        "a model that does not think",
    ],
)
async def test_tokens_of_reasoning_are_counted(
    client: httpx.AsyncClient, world: World, script: Script, tokens: int
) -> None:
    """A token that comes while the model thinks is one of reasoning, its closing mark included; both modes agree."""
    world.engine.script = script
    usage = (await whole(client))["usage"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == tokens
    assert usage["completion_tokens"] == len(script.looks)
    events = await streamed(client, stream_options={"include_usage": True})
    assert json.loads(events[-2])["usage"] == usage


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("<think>\nHm.\n</think>\n\nYes, </think> it is.", {}),
        ("Hm.\n</think>\n\nYes.", {"in_reasoning": True}),
        ("Hm, for ever", {"in_reasoning": True}),
        (HARMONY, {"reasoning_format": "harmony"}),
        (f"<think>Hm.</think>{CALL}", {"tool_format": "hermes"}),
    ],
)
async def test_streamed_is_whole(
    client: httpx.AsyncClient, world: World, text: str, facts: dict[str, Any], size: int
) -> None:
    """Put together, the chunks are the message of the whole answer, wherever the tokens end."""
    world.engine.script = thinks(*[text[at : at + size] for at in range(0, len(text), size)], **facts)
    message = (await whole(client, tools=[TOOL]))["choices"][0]["message"]
    assert message["reasoning"].startswith("Hm")
    assert assembled(await choices_of(client, tools=[TOOL])).message == message


async def test_a_forced_call_may_be_thought_over(client: httpx.AsyncClient, world: World) -> None:
    """The grammar begins where reasoning ends."""
    world.engine.script = thinks("Hm.", "</think>", '{"name":"f",', '"arguments":{}}', in_reasoning=True)
    choice = (await whole(client, tools=[TOOL], tool_choice="required"))["choices"][0]
    assert (choice["message"]["reasoning"], choice["message"]["content"]) == ("Hm.", None)
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}


async def test_choices_think_for_themselves(client: httpx.AsyncClient, world: World) -> None:
    """With n = 2 one may still think while the other answers."""
    looks = [[Delta(0, "A", 1), Delta(1, "B", 1)], [Delta(0, "</think>", 1)], [Delta(0, "a", 1), Delta(1, "b", 1)]]
    ends = [[Delta(choice, "", 1, FinishReason.STOP) for choice in (0, 1)]]
    world.engine.script = Script([*looks, *ends], reasoning_format="think", in_reasoning=True)
    answer = await whole(client, n=2)
    messages = [choice["message"] for choice in answer["choices"]]
    assert [(message["reasoning"], message["content"]) for message in messages] == [("A", "a"), ("Bb", "")]
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 5
    chunks = await choices_of(client, n=2)
    assert [assembled(chunks, index).message for index in (0, 1)] == messages


async def test_logprobs_are_those_of_the_content(client: httpx.AsyncClient, world: World) -> None:
    """Tokens of reasoning have no place in them."""
    entries = {text: TokenLogprob(text, -1.0, text.encode()) for text in ("Hm", "</think>", "Yes", ".")}
    looks = [[Delta(0, text, 1, None, [entry])] for text, entry in entries.items()]
    ends = [[Delta(0, "", 1, FinishReason.STOP)]]
    world.engine.script = Script([*looks, *ends], reasoning_format="think", in_reasoning=True)
    content = (await whole(client, logprobs=True))["choices"][0]["logprobs"]["content"]
    assert [token["token"] for token in content] == ["Yes", "."]
    chunks = await choices_of(client, logprobs=True)
    assert [token for chunk in chunks if chunk["logprobs"] for token in chunk["logprobs"]["content"]] == content
