"""The official OpenAI client as a consumer of tool calls, over a real socket."""

from collections.abc import Iterator

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel

from opta_lmx.types import ChatPrompt
from tests.contract.conftest import Running
from tests.fakes import Script, text_deltas

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hi"}]
CALLS = (
    'I look.\n<tool_call>\n{"name": "GetWeather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "GetWeather", "arguments": {"city": "Rome"}}\n</tool_call>'
)


class GetWeather(BaseModel):
    """The weather now."""

    city: str


TOOL = openai.pydantic_function_tool(GetWeather)


@pytest.fixture
def sdk(running: Running) -> Iterator[openai.OpenAI]:
    """A client that does not retry, of a model that calls twice, three characters a token."""
    texts = [CALLS[at : at + 3] for at in range(0, len(CALLS), 3)]
    running.world.engine.script = Script(text_deltas(*texts), tool_format="hermes")
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_calls_are_parsed(sdk: openai.OpenAI) -> None:
    """``parse`` makes objects of the arguments."""
    choice = sdk.chat.completions.parse(model="tiny", messages=MESSAGES, tools=[TOOL]).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    assert choice.message.tool_calls is not None
    assert [call.function.parsed_arguments for call in choice.message.tool_calls] == [
        GetWeather(city="Paris"),
        GetWeather(city="Rome"),
    ]


def test_streamed_calls_are_parsed(sdk: openai.OpenAI) -> None:
    """``stream`` follows the arguments as they come, and ends with the same objects."""
    with sdk.chat.completions.stream(model="tiny", messages=MESSAGES, tools=[TOOL]) as stream:
        ends = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        message = stream.get_final_completion().choices[0].message
    assert [(end.index, end.parsed_arguments) for end in ends] == [
        (0, GetWeather(city="Paris")),
        (1, GetWeather(city="Rome")),
    ]
    assert message.content == "I look."
    assert message.tool_calls is not None
    assert [call.function.name for call in message.tool_calls] == ["GetWeather"] * 2


def test_an_agents_second_turn(sdk: openai.OpenAI, running: Running) -> None:
    """What the client made of an answer can be sent back with the calls' results."""
    message = sdk.chat.completions.create(model="tiny", messages=MESSAGES, tools=[TOOL]).choices[0].message
    assert message.tool_calls is not None
    history = [*MESSAGES, message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}]
    sdk.chat.completions.create(model="tiny", messages=history, tools=[TOOL])  # type: ignore[arg-type]
    prompt = running.world.engine.requests[-1].prompt
    assert isinstance(prompt, ChatPrompt)
    assert [said["role"] for said in prompt.messages] == ["user", "assistant", "tool"]
    assert prompt.messages[1]["tool_calls"][0]["function"] == {"name": "GetWeather", "arguments": '{"city": "Paris"}'}
    assert prompt.messages[1]["tool_calls"][0]["id"] == prompt.messages[2]["tool_call_id"]
