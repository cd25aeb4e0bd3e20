"""Grammars made to hurt, against a real server: who sent them is refused, and nobody else notices."""

import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio
import httpx
import pytest

from opta_lmx.types import JsonObject
from tests.integration.chatting import (
    CHAT,
    ask,
    chat,
    check_error,
    connect,
    content,
    model_status,
    status,
    until,
    until_all_returned,
)
from tests.integration.conftest import RunningServer, StartServer

if TYPE_CHECKING:
    from tests.tiny_models import Family

pytestmark = pytest.mark.mlx

# Would keep llguidance 1.9.1 busy for minutes.
ENDLESS: Final[JsonObject] = {
    "type": "object",
    "properties": {"x": {"allOf": [{"type": "integer", "multipleOf": prime} for prime in (9973, 9967, 9949, 9941)]}},
}

# Overflows its stack, which ends the process it runs in.
CHAIN: Final[JsonObject] = {
    "type": "object",
    "properties": {"x": {"$ref": "#/$defs/d3000"}},
    "$defs": {
        "d0": {"type": "string"},
        **{
            f"d{at}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{at - 1}"}}, "required": ["a"]}
            for at in range(1, 3001)
        },
    },
}


def as_format(schema: JsonObject) -> JsonObject:
    """Fields that ask for an answer of this form."""
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def as_tool(schema: JsonObject) -> JsonObject:
    """Fields that ask for a call with these arguments."""
    return {"tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}], "tool_choice": "required"}


# Fields, and what the refusal names.
HOSTILE: Final[list[tuple[JsonObject, str, str | None]]] = [
    (as_format(ENDLESS), "response_format", None),
    (as_format(CHAIN), "response_format", None),
    (as_tool(CHAIN), "tools[0].function.parameters", "invalid_function_parameters"),
    ({"structured_outputs": {"json": CHAIN}}, "structured_outputs.json", None),
    ({"structured_outputs": {"regex": "(" * 9000 + "a" + ")" * 9000}}, "structured_outputs.regex", None),
]


@pytest.fixture
def running(server: StartServer, tiny_model: "Callable[[Family], Path]") -> RunningServer:
    """One tiny model."""
    return server({"tiny": tiny_model("llama")})


async def talk(client: httpx.AsyncClient, begun: anyio.Event, arrivals: list[float]) -> None:
    """A stream that goes on until it is cancelled; tells when each piece of it came."""
    body: dict[str, Any] = chat("tiny", "Hello", max_tokens=8000, ignore_eos=True, stream=True)
    async with client.stream("POST", CHAT, json=body) as response:
        async for _ in response.aiter_bytes():
            arrivals.append(time.monotonic())
            begun.set()


async def test_a_stream_goes_on_while_hostile_grammars_are_refused(running: RunningServer) -> None:
    """Each refusal names its field and comes within 5 s, the worker lives, and the stream never rests for long."""
    arrivals: list[float] = []
    begun = anyio.Event()
    async with connect(running) as client, anyio.create_task_group() as tasks:
        tasks.start_soon(talk, client, begun, arrivals)
        await begun.wait()
        pid = model_status(await status(client), "tiny")["pid"]
        began = time.monotonic()
        for fields, param, code in HOSTILE:
            sent = time.monotonic()
            assert check_error(await ask(client, "tiny", "Hi", **fields), 400, code)["param"] == param
            assert time.monotonic() - sent < 5
        ended = time.monotonic()
        shown = await until(lambda: status(client), lambda _: arrivals[-1] > ended)
        assert model_status(shown, "tiny")["pid"] == pid
        tasks.cancel_scope.cancel()
    heard = [began, *(at for at in arrivals if began < at < ended), ended]
    # A stall on a busy machine is some tenths of a second; a compile in the stream's way would be one of seconds.
    assert max(later - earlier for earlier, later in pairwise(heard)) < 1


async def test_others_do_not_wait_for_a_grammar(running: RunningServer) -> None:
    """A request that comes while a grammar is compiled is answered before it; one whose client leaves gives way."""
    async with connect(running) as client, anyio.create_task_group() as tasks:
        content(await ask(client, "tiny", "Hi", max_tokens=2))
        refused: list[httpx.Response] = []
        sent = anyio.Event()

        async def send_hostile() -> None:
            sent.set()
            refused.append(await ask(client, "tiny", "Hi", **as_format(ENDLESS)))

        tasks.start_soon(send_hostile)
        await sent.wait()
        with anyio.move_on_after(0.3):
            await ask(client, "tiny", "Hi", **as_format(ENDLESS))
        content(await ask(client, "tiny", "Hi", max_tokens=2))
        assert refused == []
    check_error(refused[0], 400, None)
    async with connect(running) as client:
        assert content(await ask(client, "tiny", "Hi", structured_outputs={"choice": ["yes"]})) == "yes"
        await until_all_returned(client)
