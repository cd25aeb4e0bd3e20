"""POST /v1/embeddings: what the engine is asked, what is refused, and both forms of a vector."""

import base64
import struct
from collections.abc import AsyncIterator
from typing import Any

import anyio
import httpx
import pytest

from opta_lmx.errors import ContextTooLong, QueueFull, UnsupportedParameter
from opta_lmx.inference.embedding import EmbedRequest
from opta_lmx.types import TextPrompt, TokenPrompt
from tests.contract.conftest import build, connect
from tests.contract.encoders import EncoderEngine, make_encoder_world


@pytest.fixture
def engine() -> EncoderEngine:
    """The engine behind ``client``."""
    return make_encoder_world()[1]


@pytest.fixture
async def client(engine: EncoderEngine) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application over ``engine``."""
    world, _ = make_encoder_world()
    world.engine = engine
    async with connect(world) as client:
        yield client


async def post(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    """The answer to a request for the vector of "Hi", with some fields more."""
    return await client.post("/v1/embeddings", json={"model": "tiny", "input": "Hi", **fields})


async def test_an_answer_is_openais_to_the_key(client: httpx.AsyncClient) -> None:
    """No key is missing, none is strange; numbers unless asked otherwise."""
    assert (await post(client, input=["a", "b"])).json() == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [0.0, 0.5]},
            {"object": "embedding", "index": 1, "embedding": [1.0, 0.5]},
        ],
        "model": "tiny",
        "usage": {"prompt_tokens": 6, "total_tokens": 6},
    }


async def test_base64_holds_little_endian_float32(client: httpx.AsyncClient) -> None:
    """What the official clients decode."""
    data = (await post(client, input=["a", "b"], encoding_format="base64")).json()["data"]
    assert [struct.unpack("<2f", base64.b64decode(item["embedding"])) for item in data] == [(0.0, 0.5), (1.0, 0.5)]


@pytest.mark.parametrize("form", ["float", "base64"])
async def test_a_large_answer_is_written_in_turns(client: httpx.AsyncClient, engine: EncoderEngine, form: str) -> None:
    """The same JSON with its length, while others get their turns of the event loop in between."""
    engine.dimensions = 1000
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await anyio.lowlevel.checkpoint()
            turns += engine.asked is not None

    async with anyio.create_task_group() as others:
        others.start_soon(count)
        response = await post(client, input=["a"] * 200, encoding_format=form)
        others.cancel_scope.cancel()
    assert turns > 200 * 1000 // 8192
    assert int(response.headers["content-length"]) == len(response.content)
    body = response.json()
    assert [item["index"] for item in body["data"]] == list(range(200))
    for at, item in enumerate(body["data"]):
        vector = item["embedding"]
        if form == "base64":
            vector = list(struct.unpack("<1000f", base64.b64decode(vector)))
        assert vector == [float(at), *[0.5] * 999]
    assert body["usage"] == {"prompt_tokens": 600, "total_tokens": 600}


async def test_a_large_request_is_read_like_a_small_one(client: httpx.AsyncClient, engine: EncoderEngine) -> None:
    """A thousand lists of tokens; one token that is none is named by its place."""
    tokens = [[number % 500 for number in range(100)] for _ in range(1000)]
    assert (await post(client, input=tokens)).status_code == 200
    assert isinstance(engine.asked, EmbedRequest)
    assert engine.asked.inputs == tuple(map(TokenPrompt, tokens))
    tokens[777][7] = -1
    error = (await post(client, input=tokens)).json()["error"]
    assert (error["param"], error["code"]) == ("input[777][7]", "invalid_value")


@pytest.mark.parametrize(
    ("given", "inputs"),
    [
        ("Hi", [TextPrompt("Hi")]),
        (["a", "b"], [TextPrompt("a"), TextPrompt("b")]),
        ([1, 2], [TokenPrompt([1, 2])]),
        ([[1], [2, 3]], [TokenPrompt([1]), TokenPrompt([2, 3])]),
        (["a"] * 2048, [TextPrompt("a")] * 2048),
    ],
    ids=["text", "texts", "tokens", "lists-of-tokens", "2048"],
)
async def test_every_form_of_input_is_read(
    client: httpx.AsyncClient, engine: EncoderEngine, given: object, inputs: list[TextPrompt | TokenPrompt]
) -> None:
    """In one request, in order."""
    response = await client.post(
        "/v1/embeddings",
        json={"model": "tiny", "input": given, "dimensions": 8, "user": "me", "encoding_format": None},
        headers={"x-request-id": "trace"},
    )
    assert response.status_code == 200, response.text
    assert engine.asked == EmbedRequest("trace", "tiny", tuple(inputs), 8)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": None}, "input", "missing_required_parameter"),
        ({"input": ""}, "input", "string_below_min_length"),
        ({"input": ["a", ""]}, "input[1]", "string_below_min_length"),
        ({"input": []}, "input", "empty_array"),
        ({"input": [[]]}, "input[0]", "empty_array"),
        ({"input": [[1], "a", 5]}, "input[2]", "invalid_type"),
        ({"input": {"text": "a"}}, "input", "invalid_type"),
        ({"input": ["a"] * 2049}, "input", "array_above_max_length"),
        ({"encoding_format": "int8"}, "encoding_format", "invalid_value"),
        ({"dimensions": 0}, "dimensions", "integer_below_min_value"),
        ({"model": ""}, None, None),
    ],
)
async def test_what_cannot_be_honoured_is_refused_by_name(
    client: httpx.AsyncClient, engine: EncoderEngine, fields: dict[str, Any], param: str | None, code: str | None
) -> None:
    """And before anything is computed."""
    response = await post(client, **fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, code)
    assert engine.asked is None


async def test_an_input_must_be_given(client: httpx.AsyncClient) -> None:
    """An absent one is as bad as null."""
    response = await client.post("/v1/embeddings", json={"model": "tiny"})
    assert response.json()["error"]["message"] == "Missing required parameter: 'input'."


async def test_an_unknown_model_is_told_with_its_neighbours(client: httpx.AsyncClient) -> None:
    """404, as everywhere."""
    response = await post(client, model="tiney")
    assert response.status_code == 404
    assert "'tiny'" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (ContextTooLong(300, 256, param="input[1]"), 400, "context_length_exceeded"),
        (UnsupportedParameter("It writes text.", param="model"), 400, "unsupported_parameter"),
        (QueueFull("tiny", 256, 3.0), 429, "rate_limit_exceeded"),
    ],
)
async def test_the_engines_refusals_keep_their_status(
    client: httpx.AsyncClient, engine: EncoderEngine, failure: Any, status: int, code: str
) -> None:
    """And OpenAI's shape."""
    engine.failure = failure
    response = await post(client)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


async def test_a_client_who_leaves_cancels_the_work() -> None:
    """At once, also while the request waits for its model."""
    world, engine = make_encoder_world()
    engine.hangs = True
    body = b'{"model":"tiny","input":"a"}'
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        while not engine.opening.is_set():  # noqa: ASYNC110 - the engine tells of it to threads
            await anyio.sleep(0.001)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/embeddings",
        "raw_path": b"/v1/embeddings",
        "root_path": "",
        "query_string": b"",
        "headers": [(b"host", b"localhost")],
    }
    with anyio.fail_after(5):
        await build(world)(scope, receive, send)
    assert engine.cancelled
    assert sent[0]["status"] == 499
