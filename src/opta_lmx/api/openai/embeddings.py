"""POST /v1/embeddings: vectors of texts, as numbers or as base64."""

from array import array
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import msgspec
from anyio import CancelScope, create_task_group
from anyio.lowlevel import checkpoint
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive

from opta_lmx.api.auth import caller_of
from opta_lmx.api.openai.wire_text import EmbeddingList, EmbeddingsRequest, read_inputs
from opta_lmx.api.openapi import MODEL_ERRORS, errors, request_body
from opta_lmx.api.parsing import understand
from opta_lmx.api.routing import Router
from opta_lmx.api.services import Services
from opta_lmx.api.validation import missing, validate_request
from opta_lmx.errors import InvalidRequest
from opta_lmx.inference.embedding import EmbedRequest
from opta_lmx.types import JsonObject, TextPrompt

Result = TypeVar("Result")

router = Router()

_FLOAT_BYTES = 4

# Writing so many as text takes about a millisecond; a body of 2,048 vectors would take a hundred at once.
_TURN_NUMBERS = 8192
# An answer of one turn, with its frame.
_FEWEST_PIECES = 5


@router.post(
    "/v1/embeddings",
    tags=["OpenAI"],
    responses={**errors(*MODEL_ERRORS), 200: {"model": EmbeddingList}},
    openapi_extra=request_body(
        EmbeddingsRequest, two_texts={"model": "all-minilm-l6-v2", "input": ["What is the capital of France?", "Paris"]}
    ),
)
async def create_embeddings(request: Request) -> Response:
    """One vector for each input."""
    asked, write = await understand(request, partial(_understand, request.state.request_id))
    services: Services = request.app.state.services
    wanted = replace(asked, caller=caller_of(request))
    model_id = services.engine.resolve(wanted.model)
    answer = await while_connected(request.receive, lambda: services.engine.embed(wanted))
    usage = {"prompt_tokens": answer.prompt_tokens, "total_tokens": answer.prompt_tokens}
    head, tail = msgspec.json.encode({"object": "list", "data": [], "model": model_id, "usage": usage}).split(b"[]", 1)
    pieces = [head, b"[", *[piece async for piece in _write(answer.vectors, answer.dimensions, write)], b"]", tail]
    if len(pieces) <= _FEWEST_PIECES:
        return Response(b"".join(pieces), media_type="application/json")
    size = str(sum(map(len, pieces)))
    return StreamingResponse(_each(pieces), headers={"content-length": size}, media_type="application/json")


def _understand(request_id: str, body: JsonObject) -> tuple[EmbedRequest, Callable[[bytes], Any]]:
    """The request, and how a vector is written."""
    embeddings = validate_request(EmbeddingsRequest, body)
    write = _to_base64 if embeddings.encoding_format == "base64" else _to_numbers
    return to_embed_request(embeddings, request_id), write


async def _write(vectors: bytes, dimensions: int, write: Callable[[bytes], Any]) -> AsyncIterator[bytes]:
    """The vectors as items of a JSON array, a little in each turn of the event loop."""
    size = dimensions * _FLOAT_BYTES
    at_once = max(1, _TURN_NUMBERS // dimensions)
    for first in range(0, len(vectors) // size, at_once):
        some = _parts(vectors[first * size : (first + at_once) * size], size)
        items = [
            {"object": "embedding", "index": index, "embedding": write(vector)}
            for index, vector in enumerate(some, first)
        ]
        yield (b"," if first else b"") + msgspec.json.encode(items)[1:-1]
        await checkpoint()


async def _each(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def to_embed_request(embeddings: EmbeddingsRequest, request_id: str) -> EmbedRequest:
    """The request without OpenAI; raises InvalidRequest naming the input at fault."""
    if embeddings.input is None:
        raise missing("input")
    inputs = read_inputs(embeddings.input, "input")
    for at, given in enumerate(inputs):
        if isinstance(given, TextPrompt) and not given.text:
            param = "input" if isinstance(embeddings.input, str) else f"input[{at}]"
            raise InvalidRequest(
                f"Invalid {param!r}: string too short. Expected a string with minimum length 1, "
                "but got a string with length 0 instead.",
                param=param,
                code="string_below_min_length",
            )
    return EmbedRequest(request_id, embeddings.model, tuple(inputs), embeddings.dimensions, embeddings.ttl)


def _parts(vectors: bytes, size: int) -> list[bytes]:
    return [vectors[start : start + size] for start in range(0, len(vectors), size)]


def _to_base64(vector: bytes) -> str:
    return b64encode(vector).decode("ascii")


def _to_numbers(vector: bytes) -> list[float]:
    # Every machine this runs on is little-endian, as the bytes are.
    return array("f", vector).tolist()


async def while_connected(receive: Receive, work: Callable[[], Awaitable[Result]]) -> Result:
    """What ``work`` gives; a client who leaves cancels it at once, and ClientDisconnect is raised then.

    ``receive`` must be the request's own, its body already read. Raises what ``work`` raises.
    """
    done: list[Result] = []

    async def watch(scope: CancelScope) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        scope.cancel()

    try:
        async with create_task_group() as tasks:
            tasks.start_soon(watch, tasks.cancel_scope)
            done.append(await work())
            tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        # The group's wrapping is an accident of the watcher; callers want the error itself.
        if len(group.exceptions) > 1:
            raise
        raise group.exceptions[0] from None
    if not done:
        raise ClientDisconnect
    return done[0]
