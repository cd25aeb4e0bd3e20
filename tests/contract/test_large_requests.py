"""Requests so large that another process understands them: the same asked of the model, the same read of its answer."""

from typing import Any, TypeVar

import httpx
import msgspec

from opta_lmx.types import ChatPrompt, Encoded, Structured
from tests.contract.answers import assembled, choices_of, whole
from tests.contract.test_tools import FORCED, says
from tests.fakes import World

Part = TypeVar("Part")

# More objects, and more bytes, than are understood on the event loop.
PROPERTIES = {f"field_{at}": {"type": "integer", "description": "x" * 100} for at in range(60)}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, **PROPERTIES}},
        },
    }
    for name in ("get_weather", *(f"tool_{at}" for at in range(12)))
]
TYPED = """<tool_call>
<function=get_weather>
<parameter=city>
12
</parameter>
<parameter=field_7>
12
</parameter>
</function>
</tool_call>"""


def decoded(part: object, kind: type[Part]) -> Part:
    """A part of a request that went round the server's process."""
    assert isinstance(part, Encoded)
    return msgspec.msgpack.decode(b"".join(part.pieces), type=kind)


async def test_arguments_are_typed_by_the_schemas(client: httpx.AsyncClient, world: World) -> None:
    """The server keeps of the tools what reading a call takes, whole and streamed."""
    world.engine.script = says(TYPED)
    [choice] = (await whole(client, tools=TOOLS))["choices"]
    [call] = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "12", "field_7": 12}'}
    assert decoded(world.request.prompt, ChatPrompt).tools == TOOLS
    assert decoded(world.request.structured, type(None)) is None
    answer = assembled(await choices_of(client, tools=TOOLS))
    assert answer.calls[0]["function"] == call["function"]


async def test_a_forced_call_has_its_grammar(client: httpx.AsyncClient, world: World) -> None:
    """Every tool with its own schema reaches the worker."""
    world.engine.script = says(FORCED)
    [choice] = (await whole(client, tools=TOOLS, tool_choice="required"))["choices"]
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    structured = decoded(world.request.structured, Structured)
    assert (structured.kind, structured.field) == ("tool_call", "tools")
    assert [(tool["name"], tool["parameters"]) for tool in structured.spec] == [
        (tool["function"]["name"], tool["function"]["parameters"]) for tool in TOOLS
    ]


async def test_a_schema_arrives_and_the_request_is_echoed(client: httpx.AsyncClient, world: World) -> None:
    """What the answer is written from comes back from the other process."""
    schema = {"type": "object", "properties": {f"k{at}": PROPERTIES for at in range(12)}}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    fields = {"response_format": form, "metadata": {"a": "b"}, "service_tier": "auto", "n": 2}
    answer = await whole(client, **fields)
    assert decoded(world.request.structured, Structured) == Structured("json_schema", schema)
    assert (answer["metadata"], answer["service_tier"], len(answer["choices"])) == ({"a": "b"}, "default", 2)
