"""Every mistake has OpenAI's status, type, code and param, in OpenAI's shape, whatever the route."""

import json
from typing import Any

import httpx
import pytest

from opta_lmx import errors as lmx
from tests.contract.conftest import CHAT, connect
from tests.fakes import Script, World, make_world

URL = "/v1/chat/completions"
USER = {"role": "user", "content": "Hi"}


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error's four parts, and an id to look for in the log."""
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) >= {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


def with_part(part: object) -> dict[str, Any]:
    """A request whose second message has this part."""
    return {"messages": [USER, {"role": "user", "content": [{"type": "text", "text": "a"}, part]}]}


TOOL = {"type": "function", "function": {"name": "f"}}
NAMED = {"type": "function", "function": {"name": "g"}}


def with_function(function: object) -> dict[str, Any]:
    """A request whose first tool is this."""
    return {"tools": [{"type": "function", "function": function}]}


def allowing(allowed: object) -> dict[str, Any]:
    """A choice of some tools."""
    return {"type": "allowed_tools", "allowed_tools": allowed}


# Fields of the request with the code, the param and a part of the message.
FIELDS: list[tuple[dict[str, Any], str | None, str | None, str]] = [
    ({"model": None}, None, None, "you must provide a model parameter"),
    ({"model": ""}, None, None, "you must provide a model parameter"),
    ({"model": 5}, "invalid_type", "model", "expected a string, but got an integer instead"),
    ({"model": "x" * 513}, "string_above_max_length", "model", "maximum length 512, but got a string with length 513"),
    ({"messages": None}, "missing_required_parameter", "messages", "Missing required parameter: 'messages'."),
    ({"messages": []}, "empty_array", "messages", "minimum length 1, but got an empty array instead"),
    ({"messages": "Hi"}, "invalid_type", "messages", "expected an array, but got a string instead"),
    ({"messages": {}}, "invalid_type", "messages", "expected an array, but got an object instead"),
    ({"messages": [None]}, "invalid_type", "messages[0]", "expected an object, but got null instead"),
    ({"messages": ["Hi"]}, "invalid_type", "messages[0]", "expected an object, but got a string instead"),
    ({"messages": [{"content": "Hi"}]}, "missing_required_parameter", "messages[0].role", "'messages[0].role'"),
    ({"messages": [{"role": None}]}, "missing_required_parameter", "messages[0].role", "'messages[0].role'"),
    ({"messages": [USER, {"role": "x"}]}, "invalid_value", "messages[1].role", "Invalid value: 'x'. Supported values"),
    ({"messages": [{"role": 5}]}, "invalid_type", "messages[0].role", "but got an integer instead"),
    ({"messages": [{"role": "user"}]}, "missing_required_parameter", "messages[0].content", "'messages[0].content'"),
    (
        {"messages": [{"role": "user", "content": 5}]},
        "invalid_type",
        "messages[0].content",
        "expected a string or an array of objects, but got an integer",
    ),
    (
        {"messages": [{"role": "tool", "content": "x"}]},
        "missing_required_parameter",
        "messages[0].tool_call_id",
        "messages[0].tool_call_id",
    ),
    (
        {"messages": [{"role": "function", "content": "x"}]},
        "missing_required_parameter",
        "messages[0].name",
        "messages[0].name",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]},
        "missing_required_parameter",
        "messages[0].tool_calls[0].function.arguments",
        "arguments",
    ),
    (with_part("b"), "invalid_type", "messages[1].content[1]", "expected an object"),
    (with_part({"text": "b"}), "missing_required_parameter", "messages[1].content[1].type", "type"),
    (with_part({"type": "text"}), "missing_required_parameter", "messages[1].content[1].text", "text"),
    (with_part({"type": "x"}), "invalid_value", "messages[1].content[1].type", "Supported values are: 'text'"),
    (
        with_part({"type": "image_url", "image_url": {"url": "data:"}}),
        "unsupported_parameter",
        "messages[1].content[1]",
        "images",
    ),
    (with_part({"type": "input_audio"}), "unsupported_parameter", "messages[1].content[1]", "audio"),
    (with_part({"type": "file"}), "unsupported_parameter", "messages[1].content[1]", "files"),
    ({"max_tokens": 0}, "integer_below_min_value", "max_tokens", "Expected a value >= 1, but got 0 instead."),
    ({"max_tokens": -2}, "integer_below_min_value", "max_tokens", "Expected a value >= 1, but got -2 instead."),
    ({"max_tokens": "5"}, "invalid_type", "max_tokens", "expected an integer, but got a string instead."),
    ({"max_tokens": 1.5}, "invalid_type", "max_tokens", "expected an integer, but got a decimal number instead."),
    ({"max_tokens": True}, "invalid_type", "max_tokens", "expected an integer, but got a boolean instead."),
    ({"max_tokens": 2**40}, "integer_above_max_value", "max_tokens", "Expected a value <= 2147483647"),
    ({"max_completion_tokens": 0}, "integer_below_min_value", "max_completion_tokens", "integer below minimum value"),
    (
        {"temperature": 200},
        "decimal_above_max_value",
        "temperature",
        "Invalid 'temperature': decimal above maximum value. Expected a value <= 2, but got 200 instead.",
    ),
    ({"temperature": -0.1}, "decimal_below_min_value", "temperature", "Expected a value >= 0, but got -0.1 instead."),
    ({"temperature": "hot"}, "invalid_type", "temperature", "expected a number, but got a string instead."),
    ({"top_p": 1.01}, "decimal_above_max_value", "top_p", "<= 1"),
    ({"min_p": -1}, "decimal_below_min_value", "min_p", ">= 0"),
    ({"top_k": -2}, "integer_below_min_value", "top_k", ">= -1"),
    ({"repetition_penalty": 0}, "decimal_below_min_value", "repetition_penalty", "> 0"),
    ({"frequency_penalty": 2.1}, "decimal_above_max_value", "frequency_penalty", "<= 2"),
    ({"presence_penalty": -2.1}, "decimal_below_min_value", "presence_penalty", ">= -2"),
    ({"n": 0}, "integer_below_min_value", "n", ">= 1"),
    ({"n": 17}, "integer_above_max_value", "n", "Invalid 'n': integer above maximum value. Expected a value <= 16"),
    ({"seed": 2**63}, "integer_above_max_value", "seed", "<= 9223372036854775807"),
    ({"stop": ""}, "string_below_min_length", "stop", "minimum length 1"),
    ({"stop": ["a", ""]}, "string_below_min_length", "stop[1]", "minimum length 1"),
    ({"stop": ["a"] * 5}, "array_above_max_length", "stop", "maximum length 4, but got an array with length 5 instead"),
    ({"stop": 5}, "invalid_type", "stop", "expected a string or an array of strings, but got an integer instead"),
    ({"stop_token_ids": [1, "2"]}, "invalid_type", "stop_token_ids[1]", "expected an integer"),
    ({"stop_token_ids": [-1]}, "integer_below_min_value", "stop_token_ids[0]", ">= 0"),
    ({"logit_bias": {"5": 101}}, "decimal_above_max_value", "logit_bias.5", "<= 100"),
    ({"logit_bias": {"five": 1}}, "invalid_value", "logit_bias", "token ids"),
    ({"logit_bias": [1]}, "invalid_type", "logit_bias", "expected an object, but got an array instead"),
    ({"logprobs": 1}, "invalid_type", "logprobs", "expected a boolean"),
    ({"logprobs": True, "top_logprobs": 21}, "integer_above_max_value", "top_logprobs", "<= 20"),
    ({"top_logprobs": 2}, "invalid_value", "top_logprobs", "only allowed when 'logprobs' is true"),
    ({"min_tokens": 3, "max_tokens": 2}, "invalid_value", "min_tokens", "at most the 2 tokens"),
    ({"stream": "yes"}, "invalid_type", "stream", "expected a boolean, but got a string instead"),
    ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options", "only allowed when 'stream'"),
    ({"stream": True, "stream_options": 1}, "invalid_type", "stream_options", "expected an object"),
    ({"chat_template_kwargs": 1}, "invalid_type", "chat_template_kwargs", "expected an object"),
    (
        {"chat_template_kwargs": {"chat_template": "x"}},
        "unsupported_parameter",
        "chat_template_kwargs.chat_template",
        "cannot be set",
    ),
    ({"reasoning_effort": "huge"}, "invalid_value", "reasoning_effort", "Supported values are: 'none', 'minimal'"),
    (
        {"response_format": {"type": "json_schema"}},
        "missing_required_parameter",
        "response_format.json_schema",
        "Missing required parameter",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}},
        "invalid_value",
        "response_format.json_schema.name",
        "does not match pattern",
    ),
    ({"structured_outputs": {"choice": []}}, "empty_array", "structured_outputs.choice", "empty array"),
    ({"response_format": {"type": "x"}}, "invalid_value", "response_format.type", "Supported values are: 'text'"),
    ({"response_format": "json"}, "invalid_type", "response_format", "expected an object"),
    ({"thinking_budget": -1}, "integer_below_min_value", "thinking_budget", ">= 0"),
    ({"parallel_tool_calls": "no"}, "invalid_type", "parallel_tool_calls", "expected a boolean"),
    ({"tools": [{}]}, "missing_required_parameter", "tools[0].type", "tools[0].type"),
    ({"tools": [5]}, "invalid_type", "tools[0]", "expected an object"),
    ({"tools": {}}, "invalid_type", "tools", "expected an array"),
    ({"tools": [{"type": "x"}]}, "invalid_value", "tools[0].type", "Supported values are: 'function' and 'custom'"),
    ({"tools": [{"type": "function"}]}, "missing_required_parameter", "tools[0].function", "tools[0].function"),
    ({"tools": [TOOL, {"type": "custom", "custom": {"name": "c"}}]}, "unsupported_parameter", "tools[1]", "Custom"),
    (
        {"tools": [TOOL] * 129},
        "array_above_max_length",
        "tools",
        "maximum length 128, but got an array with length 129",
    ),
    (with_function({"name": "a b"}), "invalid_value", "tools[0].function.name", "does not match pattern"),
    (with_function({"name": "f" * 65}), "invalid_value", "tools[0].function.name", "does not match pattern"),
    (with_function({"name": ""}), "invalid_value", "tools[0].function.name", "does not match pattern"),
    (with_function({}), "missing_required_parameter", "tools[0].function.name", "tools[0].function.name"),
    (with_function({"name": "f", "description": 1}), "invalid_type", "tools[0].function.description", "a string"),
    (
        with_function({"name": "f", "parameters": "none"}),
        "invalid_function_parameters",
        "tools[0].function.parameters",
        "Invalid schema for function 'f'",
    ),
    (
        with_function({"name": "f", "parameters": {"type": "array"}}),
        "invalid_function_parameters",
        "tools[0].function.parameters",
        "'type: \"object\"'",
    ),
    ({"tool_choice": "required"}, None, "tool_choice", "only allowed when 'tools' are specified"),
    ({"tool_choice": NAMED}, None, "tool_choice", "only allowed when 'tools' are specified"),
    ({"tool_choice": 5}, "invalid_type", "tool_choice", "expected a string or an object"),
    ({"tool_choice": "any"}, "invalid_value", "tool_choice", "Supported values are: 'none', 'auto' and 'required'"),
    ({"tools": [TOOL], "tool_choice": {"type": "x"}}, "invalid_value", "tool_choice.type", "Supported values are"),
    (
        {"tools": [TOOL], "tool_choice": {"type": "function"}},
        "missing_required_parameter",
        "tool_choice.function",
        "tool_choice.function",
    ),
    ({"tools": [TOOL], "tool_choice": {"type": "custom"}}, "unsupported_parameter", "tool_choice", "Custom tools"),
    ({"tools": [TOOL], "tool_choice": NAMED}, None, "tool_choice", "no function named 'g' was specified in 'tools'"),
    (
        {"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}},
        "missing_required_parameter",
        "tool_choice.allowed_tools",
        "allowed_tools",
    ),
    (
        {"tools": [TOOL], "tool_choice": allowing({"mode": "none", "tools": [TOOL]})},
        "invalid_value",
        "tool_choice.allowed_tools.mode",
        "Supported values are: 'auto' and 'required'",
    ),
    (
        {"tools": [TOOL], "tool_choice": allowing({"mode": "auto", "tools": [NAMED]})},
        None,
        "tool_choice",
        "no function named 'g'",
    ),
    ({"functions": [{}]}, "missing_required_parameter", "functions[0].name", "functions[0].name"),
    ({"functions": [TOOL["function"]], "tools": [TOOL]}, None, "functions", "Only one of 'tools' and 'functions'"),
    ({"function_call": {"name": "f"}}, None, "function_call", "only allowed when 'functions' are specified"),
    (
        {"functions": [{"name": "f", "parameters": []}]},
        "invalid_function_parameters",
        "functions[0].parameters",
        "Invalid schema for function 'f'",
    ),
    ({"modalities": ["text", "audio"]}, "unsupported_parameter", "modalities", "Audio"),
    ({"modalities": ["smell"]}, "invalid_value", "modalities", "Invalid value: 'smell'"),
    ({"audio": {"voice": "a"}}, "unsupported_parameter", "audio", "Audio"),
    ({"metadata": {"k": 1}}, "invalid_type", "metadata.k", "expected a string"),
    ({"metadata": {"k": "v" * 513}}, "string_above_max_length", "metadata.k", "maximum length 512"),
    ({"metadata": {"k" * 65: "v"}}, "string_above_max_length", f"metadata.{'k' * 65}", "maximum length 64"),
    ({"metadata": {str(k): "v" for k in range(17)}}, "object_above_max_length", "metadata", "maximum length 16"),
    ({"service_tier": "gold"}, "invalid_value", "service_tier", "Invalid value: 'gold'"),
]


@pytest.mark.parametrize(("fields", "code", "param", "words"), FIELDS, ids=lambda value: str(value)[:48])
async def test_a_wrong_field_is_named(
    client: httpx.AsyncClient, world: World, fields: dict[str, Any], code: str | None, param: str | None, words: str
) -> None:
    """Status 400 with the field's path as param, and the engine hears nothing of it."""
    response = await client.post(URL, json=CHAT | fields)
    assert response.status_code == 400
    error = error_of(response)
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", code, param)
    assert words in error["message"]
    assert world.engine.requests == []


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "could not parse the JSON body"),
        (b"{", "could not parse the JSON body"),
        (b"not json", "could not parse the JSON body"),
        (b'{"model": "tiny",}', "could not parse the JSON body"),
        (b'{"model": "\xff"}', "UTF-8"),
        (b"\xff\xfe{\x00}\x00", "could not parse the JSON body"),
        (b"[]", "should be an object"),
        (b"null", "should be an object"),
        (b'"text"', "should be an object"),
        (b"5", "should be an object"),
        (b'{"temperature": NaN}', "could not parse the JSON body"),
        (b'{"temperature": Infinity}', "could not parse the JSON body"),
        (b'{"temperature": 1e999}', "out of range"),
        (b"[" * 100_000, "nested more than 128 levels"),
    ],
    ids=lambda value: str(value[:24]),
)
async def test_a_body_that_is_no_object_of_json(client: httpx.AsyncClient, body: bytes, words: str) -> None:
    """Status 400 without param or code; never a 500, however deep or broken it is."""
    response = await client.post(URL, content=body)
    error = error_of(response)
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert (error["param"], error["code"]) == (None, None)
    assert words in error["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"z": [[]], "a": ' + b"[" * 200 + b"]" * 200 + b"}", "a"),
        (b'{"z": {"b": "["}, "a":' + b'{"b":' * 100_000, "a"),
        (b'{"a[\\"{": "b", "k]":' + b"[" * 100_000, "k]"),
        (b'\n{"tools": [{}, ' + b'{"items":' * 127 + b"1" + b"}" * 127 + b'], "model": "tiny"}', "tools"),
    ],
    ids=["lists", "objects", "brackets-in-keys", "one-too-deep"],
)
async def test_a_body_that_is_nested_too_deep(client: httpx.AsyncClient, body: bytes, param: str) -> None:
    """The field in which it is too deep is named, also where the body is too deep to be read."""
    response = await client.post(URL, content=body)
    error = error_of(response)
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert f"nested more than 128 levels deep in {param!r}" in error["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"model":"tiny","messages":[{"role":"user","content":"a\\ud83d"}]}', "messages[0].content"),
        (b'{"model":"tiny","messages":[{"role":"user","content":"\\uDE00\\uD83D"}]}', "messages[0].content"),
        (b'{"model":"tiny","x":{"\\ud83d":1}}', "x.\ufffd"),
        (b'{"model":"tiny","seed":18446744073709551616}', "seed"),
        (b'{"model":"tiny","chat_template_kwargs":{"k":[-9223372036854775809]}}', "chat_template_kwargs.k[0]"),
    ],
)
async def test_json_that_no_worker_could_be_sent(client: httpx.AsyncClient, body: bytes, param: str) -> None:
    """Halves of characters and endless integers are refused by name, also in free-form fields."""
    response = await client.post(URL, content=body)
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (400, "invalid_value", param)


async def test_long_numbers_in_texts_are_only_text(client: httpx.AsyncClient) -> None:
    """The search for endless integers looks at integers."""
    message = {"role": "user", "content": f"{10**30} {{{{[[" * 200}
    assert (await client.post(URL, json=CHAT | {"messages": [message]})).status_code == 200


async def test_a_million_mistakes_make_one_error(client: httpx.AsyncClient) -> None:
    """An array fails at its first bad item."""
    response = await client.post(URL, json=CHAT | {"stop_token_ids": ["x"] * 1_000_000})
    assert error_of(response)["param"] == "stop_token_ids[0]"


@pytest.mark.parametrize("chunked", [False, True], ids=["declared", "chunked"])
async def test_a_body_that_is_too_large(chunked: bool) -> None:
    """Status 413, with a content length or without, and the sender may be endless."""
    sent = 0

    async def endless() -> Any:
        nonlocal sent
        while True:
            sent += 1
            yield b" " * 1000

    async with connect(make_world({"server": {"max_body_bytes": 5000}})) as client:
        response = await client.post(URL, content=endless() if chunked else b" " * 5001)
    error = error_of(response)
    assert (response.status_code, error["type"]) == (413, "invalid_request_error")
    assert "5,000 bytes" in error["message"]
    assert sent <= 7


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/chat", "/v1/chat/completions/", "/v1//models", "/admin/x", "/x?a=b"])
async def test_an_unknown_path(client: httpx.AsyncClient, path: str) -> None:
    """Status 404 in the error's shape, and no redirect."""
    response = await client.post(path, json=CHAT)
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (404, None, None)
    assert error["message"] == f"Invalid URL (POST {path.partition('?')[0]})"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", URL, "POST"), ("POST", "/v1/models", "GET"), ("DELETE", "/admin/health", "GET"), ("PUT", URL, "POST")],
)
async def test_a_wrong_method(client: httpx.AsyncClient, method: str, path: str, allowed: str) -> None:
    """Status 405 naming the right one, in words and in the Allow header."""
    response = await client.request(method, path)
    error = error_of(response)
    assert (response.status_code, error["code"]) == (405, "method_not_supported")
    assert error["message"] == f"Only {allowed} requests are accepted."
    assert response.headers["allow"] == allowed


# Each error with its status, type, code, param and advice on retrying.
REFUSALS: list[tuple[Exception, int, str, str | None, str | None, dict[str, str]]] = [
    (lmx.RequestRejected("r"), 400, "invalid_request_error", None, None, {}),
    (lmx.InvalidRequest("r", param="p", code="c"), 400, "invalid_request_error", "c", "p", {}),
    (lmx.UnsupportedParameter("r", param="p"), 400, "invalid_request_error", "unsupported_parameter", "p", {}),
    (lmx.ModelNotFound("x", ["y"]), 404, "invalid_request_error", "model_not_found", "model", {}),
    (lmx.ContextTooLong(9, 8), 400, "invalid_request_error", "context_length_exceeded", "messages", {}),
    (lmx.AccessDenied(presented=True), 401, "invalid_request_error", "invalid_api_key", None, {}),
    (lmx.Conflict("r"), 409, "invalid_request_error", "conflict", None, {"x-should-retry": "false"}),
    (lmx.Busy("r", 2.5), 503, "server_error", "overloaded", None, {"retry-after": "3"}),
    (lmx.QueueFull("m", 9, 4), 429, "requests", "rate_limit_exceeded", None, {"retry-after": "4"}),
    (lmx.ModelLoading("r"), 503, "server_error", "model_loading", None, {"retry-after": "1"}),
    (lmx.Draining("r", 0.2), 503, "server_error", "draining", None, {"retry-after": "1"}),
    (lmx.NoRoom("r"), 507, "server_error", "insufficient_storage", None, {"x-should-retry": "false"}),
    (lmx.DiskFull(9, 8), 507, "server_error", "insufficient_disk", None, {"x-should-retry": "false"}),
    (lmx.LoadFailed("m", "bad"), 422, "invalid_request_error", "model_load_failed", None, {"x-should-retry": "false"}),
    (lmx.WorkerLost("m", "gone"), 503, "server_error", "worker_lost", None, {"retry-after": "1"}),
    (lmx.GenerationFailed("r"), 500, "server_error", None, None, {"x-should-retry": "false"}),
    (lmx.WorkerError("r"), 500, "server_error", None, None, {}),
    (lmx.LmxError("r"), 500, "server_error", None, None, {}),
    (lmx.DownloadError("r"), 502, "server_error", "download_failed", None, {}),
    (lmx.HubUnreachable("r"), 502, "server_error", "hub_unreachable", None, {}),
    (
        lmx.IntegrityMismatch("f", "a", "b"),
        422,
        "invalid_request_error",
        "integrity_mismatch",
        None,
        {"x-should-retry": "false"},
    ),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("row", REFUSALS, ids=lambda row: type(row[0]).__name__)
async def test_a_refusal_keeps_its_status(client: httpx.AsyncClient, world: World, row: Any, stream: bool) -> None:
    """What the engine refuses before the first byte is an HTTP error, streamed or not, with the headers SDKs heed."""
    refusal, status, kind, code, param, headers = row
    world.engine.script = Script(refusal=refusal)
    response = await client.post(URL, json=CHAT | {"stream": stream})
    assert response.status_code == status
    assert error_of(response) == {"message": str(refusal), "type": kind, "param": param, "code": code}
    advice = {name: response.headers[name] for name in ("retry-after", "x-should-retry") if name in response.headers}
    assert advice == headers


async def test_a_subclass_without_a_row_has_its_parents(client: httpx.AsyncClient, world: World) -> None:
    """The table is walked along the MRO."""

    class Overheated(lmx.Busy):
        """Too hot."""

    world.engine.script = Script(refusal=Overheated("r", 7))
    response = await client.post(URL, json=CHAT)
    assert (response.status_code, response.headers["retry-after"]) == (503, "7")


async def test_no_room_comes_with_the_plan(client: httpx.AsyncClient, world: World) -> None:
    """A 507 carries the arithmetic."""
    world.engine.script = Script(refusal=lmx.MemoryLimit("m", 9, 8, {"need_bytes": 9, "free_bytes": 8}))
    response = await client.post(URL, json=CHAT)
    error = error_of(response)
    assert (response.status_code, error["code"]) == (507, "insufficient_memory")
    assert error["plan"] == {"need_bytes": 9, "free_bytes": 8}
    assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_bug_tells_nothing(client: httpx.AsyncClient, world: World, stream: bool) -> None:
    """An unforeseen exception is a 500 without a detail of it, and with the id to look it up by."""
    world.engine.script = Script(refusal=RuntimeError("secret of the house"))
    response = await client.post(URL, json=CHAT | {"stream": stream}, headers={"x-request-id": "trace-2"})
    assert response.status_code == 500
    assert error_of(response) == {
        "message": "The server had an error while processing your request.",
        "type": "server_error",
        "param": None,
        "code": None,
    }
    assert response.headers.get_list("x-request-id") == ["trace-2"]


@pytest.mark.parametrize("sent", ["", " ", "a b", "x" * 129, "é", "-a", "a\tb"])
async def test_an_insane_request_id_is_replaced(client: httpx.AsyncClient, sent: str) -> None:
    """Only what is fit for a log line is taken over."""
    response = await client.get("/nope", headers={b"x-request-id": sent.encode("latin-1")})
    assert response.headers["x-request-id"] == "req_0123abcd"


async def test_values_in_messages_are_cut(client: httpx.AsyncClient) -> None:
    """An error is no copy of the request."""
    body = CHAT | {"reasoning_effort": "x" * 10_000, "y" * 10_000: 1}
    response = await client.post(URL, content=json.dumps(body).encode())
    assert len(error_of(response)["message"]) < 300
