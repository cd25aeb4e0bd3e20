"""Tools in a request, and calls of them in its answer: whole and streamed."""

import json
from typing import Any

import httpx
import pytest

from opta_lmx.types import ChatPrompt, Delta, Encoded, FinishReason, Structured, TokenLogprob
from tests.contract.answers import assembled, choices_of, streamed, whole
from tests.contract.conftest import CHAT
from tests.fakes import Script, World, text_deltas

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather now.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "get_time"}}
TOOLS = {"tools": [WEATHER, TIME]}
FUNCTIONS = {"functions": [WEATHER["function"], TIME["function"]]}

ARGUMENTS = '{"city": "Paris"}'
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
SECOND = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
FORCED = '{"name":"get_weather","arguments":{"city": "Paris"}}'
NAMED = {"type": "function", "function": {"name": "get_weather"}}


def says(*texts: str, finish: FinishReason = FinishReason.STOP, **facts: Any) -> Script:
    """A model of the hermes format that says these texts, one a look."""
    return Script(text_deltas(*texts, finish=finish), **{"tool_format": "hermes", **facts})


def pieces(text: str, size: int = 3) -> list[str]:
    """The text in pieces, as tokens come."""
    return [text[at : at + size] for at in range(0, len(text), size)]


async def asked(client: httpx.AsyncClient, world: World, **fields: Any) -> tuple[ChatPrompt, Structured | None]:
    """Prompt and grammar of the request, which must be answered."""
    await whole(client, **fields)
    prompt = world.request.prompt
    assert isinstance(prompt, ChatPrompt)
    assert not isinstance(world.request.structured, Encoded)
    return prompt, world.request.structured


async def test_tools_reach_the_template_as_they_were_sent(client: httpx.AsyncClient, world: World) -> None:
    """The model reads OpenAI's form; what is for the server alone and what is null is not in it."""
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}, "x": 1}
    nothing = {"type": "function", "function": {"name": "get_time", "description": None, "parameters": None}}
    prompt, structured = await asked(client, world, tools=[strict, nothing])
    assert (prompt.tools, structured) == ([WEATHER, TIME], None)


@pytest.mark.parametrize(
    ("fields", "shown", "callable_tools"),
    [
        ({**TOOLS, "tool_choice": "required"}, [WEATHER, TIME], ["get_weather", "get_time"]),
        ({**TOOLS, "tool_choice": NAMED}, [WEATHER, TIME], ["get_weather"]),
        (
            {
                **TOOLS,
                "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}},
            },
            [WEATHER],
            ["get_weather"],
        ),
        ({**FUNCTIONS, "function_call": {"name": "get_weather"}}, [WEATHER, TIME], ["get_weather"]),
        (
            {**TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
            [WEATHER, TIME],
            ["get_weather", "get_time"],
        ),
    ],
)
async def test_a_choice_that_forces_a_call_is_a_grammar(
    client: httpx.AsyncClient, world: World, fields: dict[str, Any], shown: list[Any], callable_tools: list[str]
) -> None:
    """Which tools may be called, their schemas, and where these stand in the request go to the compiler."""
    world.engine.script = says(FORCED)
    prompt, structured = await asked(client, world, **fields)
    assert prompt.tools == shown
    assert structured is not None
    assert structured.kind == "tool_call"
    assert [tool["name"] for tool in structured.spec] == callable_tools
    assert structured.spec[0]["parameters"] == WEATHER["function"]["parameters"]
    legacy = "functions" in fields
    assert structured.spec[0]["field"] == ("functions[0].parameters" if legacy else "tools[0].function.parameters")
    if len(structured.spec) > 1:
        no_arguments = {"type": "object", "properties": {}, "additionalProperties": False}
        assert (structured.spec[1]["parameters"], structured.spec[1]["field"]) == (
            no_arguments,
            "tools[1].function.parameters",
        )


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({**TOOLS, "tool_choice": "auto"}, [WEATHER, TIME]),
        ({**TOOLS, "tool_choice": "none"}, None),
        (
            {**TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [TIME]}}},
            [TIME],
        ),
        (FUNCTIONS, [WEATHER, TIME]),
        ({**FUNCTIONS, "function_call": "none"}, None),
        ({"tools": []}, None),
    ],
)
async def test_a_choice_that_forces_nothing_shows_what_may_be_called(
    client: httpx.AsyncClient, world: World, fields: dict[str, Any], shown: list[Any] | None
) -> None:
    """A model cannot call what it is not told of."""
    assert await asked(client, world, **fields) == (ChatPrompt([CHAT["messages"][0]], shown), None)


async def test_a_form_of_answer_leaves_room_for_a_call(client: httpx.AsyncClient, world: World) -> None:
    """With tools and a response_format the model may call or answer in that form."""
    _, structured = await asked(client, world, **TOOLS, response_format={"type": "json_object"})
    assert structured == Structured("json_object", or_call=True)


async def test_a_call_is_openais_to_the_key(client: httpx.AsyncClient, world: World) -> None:
    """A whole answer that only calls has no content, and says why it ended."""
    world.engine.script = says(*pieces(CALL))
    choice = (await whole(client, **TOOLS))["choices"][0]
    assert choice == {
        "index": 0,
        "message": {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "annotations": [],
            "tool_calls": [
                {
                    "id": "call_0123abcd",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": ARGUMENTS},
                }
            ],
        },
        "logprobs": None,
        "finish_reason": "tool_calls",
    }


async def test_a_streamed_call_is_openais_to_the_key(client: httpx.AsyncClient, world: World) -> None:
    """First the role, then the call by id and name, then its arguments in pieces, then the finish."""
    world.engine.script = says(CALL)
    chunks = await choices_of(client, **TOOLS)
    beginning = {"name": "get_weather", "arguments": ""}
    assert [(chunk["delta"], chunk["finish_reason"]) for chunk in chunks] == [
        ({"role": "assistant", "content": ""}, None),
        ({"tool_calls": [{"index": 0, "id": "call_0123abcd", "type": "function", "function": beginning}]}, None),
        ({"tool_calls": [{"index": 0, "function": {"arguments": ARGUMENTS}}]}, None),
        ({}, "tool_calls"),
    ]


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
@pytest.mark.parametrize(
    "text",
    ["Hello.", CALL, f"I look.\n{CALL}\n{SECOND}", SECOND + CALL, "a < b <tool_call> c", '<tool_call>{"name": 1}'],
)
async def test_streamed_is_whole(client: httpx.AsyncClient, world: World, text: str, size: int) -> None:
    """Put together, the chunks are the message of the whole answer, wherever the tokens end."""
    world.engine.script = says(*pieces(text, size))
    choice = (await whole(client, **TOOLS))["choices"][0]
    stream = assembled(await choices_of(client, **TOOLS))
    assert stream.message == choice["message"]
    assert stream.finish_reason == choice["finish_reason"]


async def test_two_calls_have_two_indices(client: httpx.AsyncClient, world: World) -> None:
    """Calls come in the order they were made, after the text before them."""
    world.engine.script = says(*pieces(f"I look.\n{CALL}\n{SECOND}"))
    message = (await whole(client, **TOOLS))["choices"][0]["message"]
    assert message["content"] == "I look."
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "get_weather", "arguments": ARGUMENTS},
        {"name": "get_time", "arguments": "{}"},
    ]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fields", [{**TOOLS, "parallel_tool_calls": False}, FUNCTIONS], ids=["single", "legacy"])
async def test_one_call_is_the_end(
    client: httpx.AsyncClient, world: World, fields: dict[str, Any], stream: bool
) -> None:
    """Where one call is asked for, the second one is not told, and the model is not left to finish it."""
    world.engine.script = says(CALL, SECOND, " and more", " of the same")
    if stream:
        chunks = await choices_of(client, **fields)
        assert chunks[-1]["finish_reason"] == ("tool_calls" if "tools" in fields else "function_call")
        assert "get_time" not in json.dumps(chunks)
    else:
        answer = await whole(client, **fields)
        assert "get_time" not in json.dumps(answer)
        assert answer["usage"]["completion_tokens"] == 2
    assert world.generation.stopped


async def test_other_choices_are_finished_first(client: httpx.AsyncClient, world: World) -> None:
    """With n = 2 a choice that has made its one call does not end the other."""
    looks = [
        [Delta(0, CALL + SECOND, 2)],
        [Delta(1, "Hello", 1)],
        [Delta(0, "!", 1, FinishReason.STOP), Delta(1, ".", 1, FinishReason.STOP)],
    ]
    world.engine.script = Script(looks, tool_format="hermes")
    choices = (await whole(client, n=2, parallel_tool_calls=False, **TOOLS))["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["tool_calls", "stop"]
    assert choices[1]["message"]["content"] == "Hello."
    chunks = await choices_of(client, n=2, parallel_tool_calls=False, **TOOLS)
    assert [assembled(chunks, index).message for index in (0, 1)] == [choice["message"] for choice in choices]


async def test_the_last_choice_to_end_ends_the_others(client: httpx.AsyncClient, world: World) -> None:
    """A choice that has made its one call is not read to its own end."""
    looks = [[Delta(0, CALL + SECOND, 2)], [Delta(1, "Hi", 1, FinishReason.STOP)], [Delta(0, "and so on", 9)]]
    world.engine.script = Script([*looks, [Delta(0, "", 1, FinishReason.STOP)]], tool_format="hermes")
    answer = await whole(client, n=2, parallel_tool_calls=False, **TOOLS)
    assert world.generation.stopped
    assert answer["usage"]["completion_tokens"] == 3


async def test_legacy_calls_come_in_the_legacy_form(client: httpx.AsyncClient, world: World) -> None:
    """Who asks with functions is answered with function_call, whole and streamed."""
    world.engine.script = says(CALL)
    choice = (await whole(client, **FUNCTIONS))["choices"][0]
    assert choice["finish_reason"] == "function_call"
    assert choice["message"]["function_call"] == {"name": "get_weather", "arguments": ARGUMENTS}
    assert (choice["message"]["content"], "tool_calls" in choice["message"]) == (None, False)
    deltas = [chunk["delta"] for chunk in await choices_of(client, **FUNCTIONS)]
    assert deltas[1:-1] == [
        {"function_call": {"name": "get_weather", "arguments": ""}},
        {"function_call": {"arguments": ARGUMENTS}},
    ]


@pytest.mark.parametrize("tool_format", ["hermes", "mistral", "harmony", None])
@pytest.mark.parametrize("reasoning_format", ["harmony", None])
async def test_a_forced_call_is_one_object(
    client: httpx.AsyncClient, world: World, tool_format: str | None, reasoning_format: str | None
) -> None:
    """Under the grammar every model writes the same form, whatever its own is."""
    world.engine.script = says(*pieces(FORCED), tool_format=tool_format, reasoning_format=reasoning_format)
    choice = (await whole(client, tool_choice="required", **TOOLS))["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": ARGUMENTS}
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")
    assert assembled(await choices_of(client, tool_choice="required", **TOOLS)).message == choice["message"]


async def test_a_call_cut_off_is_no_call(client: httpx.AsyncClient, world: World) -> None:
    """At the limit of tokens the answer says so; a whole one holds the broken call as the text it is."""
    world.engine.script = says(*pieces(CALL[:50]), finish=FinishReason.LENGTH)
    choice = (await whole(client, **TOOLS))["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] == CALL[:50]
    assert "tool_calls" not in choice["message"]
    stream = assembled(await choices_of(client, **TOOLS))
    assert (stream.finish_reason, stream.message) == ("length", choice["message"])


async def test_a_forced_call_cut_off_is_a_call_all_the_same(client: httpx.AsyncClient, world: World) -> None:
    """At whatever token: the arguments there are, never the form they are written in; streamed as whole."""
    begins = FORCED.index(ARGUMENTS)
    for end in range(1, len(FORCED) + 1):
        world.engine.script = says(*pieces(FORCED[:end]), finish=FinishReason.LENGTH)
        choice = (await whole(client, tool_choice="required", **TOOLS))["choices"][0]
        assert choice["finish_reason"] == "length"
        message = choice["message"]
        calls = [call["function"] for call in message.get("tool_calls", [])]
        if end <= begins:
            assert (calls, message["content"]) == ([], "")
        else:
            cut = FORCED[begins : min(end, begins + len(ARGUMENTS))]
            assert calls == [{"name": "get_weather", "arguments": cut}]
            assert message["content"] is None
        stream = assembled(await choices_of(client, tool_choice="required", **TOOLS))
        assert (stream.finish_reason, stream.content) == ("length", "")
        assert [call["function"] for call in stream.calls] == calls


@pytest.mark.parametrize("fields", [{}, {**TOOLS, "tool_choice": "none"}], ids=["no tools", "none"])
async def test_without_tools_everything_is_text(client: httpx.AsyncClient, world: World, fields: Any) -> None:
    """Who asked for no calls gets none, even if the model writes one."""
    world.engine.script = says(*pieces(CALL))
    choice = (await whole(client, **fields))["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")


async def test_a_model_without_a_format_answers_in_text(client: httpx.AsyncClient, world: World) -> None:
    """Its template may know tools all the same, so it is told of them."""
    world.engine.script = says(CALL, tool_format=None)
    assert (await whole(client, **TOOLS))["choices"][0]["message"]["content"] == CALL
    assert isinstance(world.request.prompt, ChatPrompt)
    assert world.request.prompt.tools == [WEATHER, TIME]


async def test_logprobs_are_those_of_the_content(client: httpx.AsyncClient, world: World) -> None:
    """Tokens of a call have no place in them."""

    def entry(text: str) -> list[TokenLogprob]:
        return [TokenLogprob(text, -1.0, text.encode())]

    texts = ["Hi", " there", *pieces(CALL, 7)]
    looks = [[Delta(0, text, 1, None, entry(text))] for text in texts]
    world.engine.script = Script([*looks, [Delta(0, "", 1, FinishReason.STOP)]], tool_format="hermes")
    content = (await whole(client, logprobs=True, **TOOLS))["choices"][0]["logprobs"]["content"]
    assert [token["token"] for token in content][:2] == ["Hi", " there"]
    assert not any("city" in token["token"] for token in content)
    chunks = await choices_of(client, logprobs=True, **TOOLS)
    told = [token for chunk in chunks if chunk["logprobs"] for token in chunk["logprobs"]["content"]]
    assert told == content
    assert all("content" in chunk["delta"] for chunk in chunks if chunk["logprobs"])


async def test_usage_counts_the_calls_tokens(client: httpx.AsyncClient, world: World) -> None:
    """Tokens are counted, not characters; both modes agree."""
    world.engine.script = says(*pieces(CALL, 10))
    usage = (await whole(client, **TOOLS))["usage"]
    assert usage["completion_tokens"] == len(pieces(CALL, 10))
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 0
    events = await streamed(client, stream_options={"include_usage": True}, **TOOLS)
    assert json.loads(events[-2])["usage"] == usage
