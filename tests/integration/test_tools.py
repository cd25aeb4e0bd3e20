"""Tool calls, reasoning and forms of answer from a model of random weights: what is right is the server's doing."""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, Final

import httpx
import jsonschema  # type: ignore[import-untyped]
import pytest
from tokenizers import Tokenizer

from opta_lmx.types import EchoOptions, JsonObject
from tests.contract.answers import assembled
from tests.integration.chatting import chat, check_error, connect, stream
from tests.integration.conftest import StartServer

pytestmark = [pytest.mark.mlx, pytest.mark.timeout(60)]

# A model that is told of tools in the hermes form, and whose thinking its template opens unless told not to.
TEMPLATE: Final = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<tool_call></tool_call><|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
MARKS: Final = ["<think>", "</think>", "<tool_call>", "</tool_call>"]

CITY: Final[JsonObject] = {"type": "string", "enum": ["Paris", "Rome", "東京", 'a "b"']}
WEATHER: Final[JsonObject] = {
    "type": "object",
    "properties": {
        "city": {"$ref": "#/$defs/city"},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "hourly": {"type": "boolean"},
        "places": {"type": "array", "items": {"$ref": "#/$defs/city"}, "maxItems": 2},
    },
    "required": ["city", "days"],
    "$defs": {"city": CITY},
}
TOOLS: Final = [
    {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "get_time"}},
]
SCHEMAS: Final = {"get_weather": WEATHER, "get_time": {"type": "object", "additionalProperties": False}}


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the marks of reasoning and calls among its tokens."""
    from tests.tiny_models import build_tiny_model

    path = build_tiny_model(tmp_path_factory.mktemp("thinker") / "thinker", "llama", vocab_size=520)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_special_tokens(MARKS)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    return path


async def whole(client: httpx.AsyncClient, model: str, **fields: Any) -> JsonObject:
    """The body of a whole answer."""
    response = await client.post("/v1/chat/completions", json=chat(model, "What is the weather?", **fields))
    assert response.status_code == 200, response.text
    body: JsonObject = response.json()
    return body


def check_call(choice: JsonObject) -> str:
    """The name of the only call of a choice, whose arguments must be valid against the tool's schema."""
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    [call] = choice["message"]["tool_calls"]
    name: str = call["function"]["name"]
    jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMAS[name])
    return name


def without_ids(message: JsonObject) -> JsonObject:
    """A message without the ids of its calls, which are new each time."""
    calls = [call["function"] for call in message.get("tool_calls", ())]
    return {**message, "tool_calls": calls}


async def test_a_required_call_is_always_valid(
    server: StartServer, tiny_model: Callable[..., Path], thinker: Path
) -> None:
    """Whatever the sampling, for a model that knows of tools and for one that does not, streamed as well as whole."""
    running = server({"plain": tiny_model("llama"), "thinker": thinker})
    names = set()
    async with connect(running) as client:
        for seed in range(20):
            model = "thinker" if seed % 2 else "plain"
            asked = {
                "tools": TOOLS,
                "tool_choice": "required",
                "seed": seed,
                "temperature": seed / 10,
                "thinking_budget": 4,
            }
            answer = await whole(client, model, **asked)
            names.add(check_call(answer["choices"][0]))
            streamed = await stream(
                client, chat(model, "What is the weather?", **asked, stream_options={"include_usage": True})
            )
            built = assembled([choice for event in streamed.events for choice in event["choices"]])
            assert streamed.done
            assert without_ids(built.message) == without_ids(answer["choices"][0]["message"])
            assert streamed.events[-1]["usage"]["completion_tokens"] == answer["usage"]["completion_tokens"]
        named = {"type": "function", "function": {"name": "get_time"}}
        answer = await whole(client, "plain", tools=TOOLS, tool_choice=named)
        assert check_call(answer["choices"][0]) == "get_time"
    assert names == {"get_weather", "get_time"}


async def test_thinking_ends_with_its_budget(server: StartServer, thinker: Path, subtests: pytest.Subtests) -> None:
    """The form of an answer begins after the thinking, which takes its budget and the closing mark, and no more."""
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    async with connect(server({"thinker": thinker})) as client:
        for budget in (0, 1, 7):
            with subtests.test("schema", budget=budget):
                answer = await whole(client, "thinker", response_format=form, thinking_budget=budget, seed=budget)
                message = answer["choices"][0]["message"]
                jsonschema.validate(json.loads(message["content"]), CITY)
                assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] <= budget + 1
        with subtests.test("no effort, no thinking"):
            answer = await whole(client, "thinker", response_format=form, reasoning_effort="none")
            jsonschema.validate(json.loads(answer["choices"][0]["message"]["content"]), CITY)
            assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0
        with subtests.test("all its tokens"):
            answer = await whole(client, "thinker", max_tokens=12, seed=1, min_tokens=12)
            assert answer["choices"][0]["message"]["reasoning"]
            assert answer["choices"][0]["message"]["content"] == ""
            assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 12
        with subtests.test("the form or a call"):
            call = Tokenizer.from_file(str(thinker / "tokenizer.json")).token_to_id("<tool_call>")
            body = {"tools": TOOLS, "response_format": form, "reasoning_effort": "none", "max_tokens": 60}
            answer = await whole(client, "thinker", **body, logit_bias={str(call): -100})
            jsonschema.validate(json.loads(answer["choices"][0]["message"]["content"]), CITY)
            answer = await whole(client, "thinker", **body, logit_bias={str(call): 100})
            assert answer["choices"][0]["message"]["content"].startswith("<tool_call>")


async def test_a_schema_that_cannot_be_enforced_is_refused_by_name(server: StartServer, thinker: Path) -> None:
    """Before any byte, with the tool and the place of its schema; where nothing is enforced it does not matter."""
    bad = {"type": "function", "function": {"name": "bad", "parameters": {"properties": {"a": {"not": {}}}}}}
    async with connect(server({"thinker": thinker})) as client:
        asked = {"tools": [*TOOLS, bad], "max_tokens": 4, "stream": True}
        body = chat("thinker", "x", **asked, tool_choice="required")
        error = check_error(await client.post("/v1/chat/completions", json=body), 400, "invalid_function_parameters")
        assert error["param"] == "tools[2].function.parameters"
        assert "Invalid schema for function 'bad': " in error["message"]
        assert (await client.post("/v1/chat/completions", json=chat("thinker", "x", **asked))).status_code == 200


@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
async def test_a_form_holds_with_and_without_thinking_and_tools(
    server: StartServer, thinker: Path, kind: str, subtests: pytest.Subtests
) -> None:
    """The content is a document of that form and nothing else, whatever stands beside it; streamed as well as whole."""
    schema = {"type": "object", "properties": {"city": CITY}, "required": ["city"], "additionalProperties": False}
    form: JsonObject = {"type": kind} | (
        {"json_schema": {"name": "n", "schema": schema}} if kind != "json_object" else {}
    )
    vocabulary = Tokenizer.from_file(str(thinker / "tokenizer.json"))
    # Random weights would talk for ever: they are drawn to the end of an object, and away from a call.
    bias = {str(vocabulary.token_to_id("}")): 30, str(vocabulary.token_to_id("<tool_call>")): -100}
    ways: dict[str, JsonObject] = {"thinking": {"thinking_budget": 5}, "no thinking": {"reasoning_effort": "none"}}
    tools: dict[str, JsonObject] = {
        "no tools": {},
        "tools": {"tools": TOOLS},
        "no choice": {"tools": TOOLS, "tool_choice": "none"},
    }
    async with connect(server({"thinker": thinker})) as client:
        for way, offer in product(ways, tools):
            with subtests.test(way=way, tools=offer):
                asked = {"response_format": form, "logit_bias": bias, "max_tokens": 200, **ways[way], **tools[offer]}
                answer = await whole(client, "thinker", **asked, seed=3)
                [choice] = answer["choices"]
                assert choice["finish_reason"] == "stop"
                document = json.loads(choice["message"]["content"])
                jsonschema.validate(document, schema if kind == "json_schema" else {"type": "object"})
                thought = answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
                assert 0 < thought <= 6 if way == "thinking" else thought == 0
                body = chat("thinker", "What is the weather?", **asked, seed=3, stream_options={"include_usage": True})
                streamed = await stream(client, body)
                built = assembled([choice for event in streamed.events for choice in event["choices"]])
                assert built.message == choice["message"]
                assert streamed.events[-1]["usage"] == answer["usage"]


async def test_the_settings_say_how_a_model_writes(server: StartServer, thinker: Path) -> None:
    """A model's own formats give way to those set for it, and these to a preset's."""
    running = server(
        {"echo": EchoOptions(), "thinker": thinker},
        models={
            "per_model": {"echo": {"tool_format": "hermes"}},
            "presets": {
                "mistral": {"model": "echo", "tool_format": "mistral"},
                "plain": {"model": "echo", "tool_format": "none"},
                "open": {"model": "thinker", "reasoning_format": "none"},
            },
        },
    )
    hermes = '<tool_call>{"name": "get_time", "arguments": {}}</tool_call>'
    mistral = '[TOOL_CALLS]get_time{"a": 1}'
    async with connect(running) as client:

        async def message(model: str, text: str, **fields: Any) -> JsonObject:
            body = chat(model, text, tools=TOOLS, **fields)
            answer: JsonObject = (await client.post("/v1/chat/completions", json=body)).json()
            return without_ids(answer["choices"][0]["message"])

        assert (await message("echo", hermes))["tool_calls"] == [{"name": "get_time", "arguments": "{}"}]
        assert (await message("echo", mistral))["content"] == mistral
        assert (await message("mistral", mistral))["tool_calls"] == [{"name": "get_time", "arguments": '{"a": 1}'}]
        assert (await message("mistral", hermes))["content"] == hermes
        assert (await message("plain", hermes))["content"] == hermes
        think = {"max_tokens": 6, "min_tokens": 6, "seed": 1}
        thought = await message("thinker", "x", **think)
        assert (bool(thought["reasoning"]), thought["content"]) == (True, "")
        said = await message("open", "x", **think)
        assert said["content"]
        assert "reasoning" not in said
