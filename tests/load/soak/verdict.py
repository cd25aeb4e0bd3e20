"""One request sent and judged: answered whole and in form, refused with a typed error, or a fault."""

import json
from itertools import pairwise
from time import perf_counter
from typing import Any, Final

import anyio
import httpx
import jsonschema  # type: ignore[import-untyped]

from tests.load.soak.sheet import End, Verdict
from tests.load.soak.traffic import SCHEMA, Sending

# Seconds. A load waits for a back-off of at most 30; nothing that is served takes as long.
_HANG: Final = 120.0

# For want of room, of a worker, or of a model in memory: a sound request may meet them in a soak.
_NO_PLACE: Final = frozenset({409, 429, 503, 507})
# Of broken bytes.
_MOST_BYTES: Final = 65536


async def send(client: httpx.AsyncClient, sending: Sending, host: str, port: int) -> Verdict:
    """Sends it, and judges what came back."""
    if sending.raw is not None:
        return await _send_raw(sending, host, port)
    verdict = Verdict(End.CANCELLED)
    with anyio.move_on_after(sending.leave_after if sending.leave_after is not None else _HANG) as scope:
        try:
            verdict = await (_stream(client, sending) if sending.streams else _whole(client, sending))
        except httpx.TransportError as error:
            verdict = Verdict(End.FAULT, f"no answer: {type(error).__name__} {error}")
    if scope.cancelled_caught and sending.leave_after is None:
        return Verdict(End.FAULT, f"no end within {_HANG:.0f} s: {sending.body[:200]!r}")
    return verdict


async def _whole(client: httpx.AsyncClient, sending: Sending) -> Verdict:
    response = await client.request(sending.method, sending.path, content=sending.body, headers=dict(sending.headers))
    if response.status_code != 200:
        return _refusal(sending, response.status_code, response.content)
    if not sending.is_sound:
        return Verdict(End.FAULT, f"a corrupt request was answered: {sending.body[:200]!r}")
    if response.headers["content-type"].startswith("application/json"):
        problem = _problem(sending, response.json())
        return Verdict(End.FAULT, problem) if problem else Verdict(End.ANSWERED)
    return Verdict(End.ANSWERED)


async def _stream(client: httpx.AsyncClient, sending: Sending) -> Verdict:
    began = perf_counter()
    moments: list[float] = []
    raw = b""
    async with client.stream("POST", sending.path, content=sending.body, headers=dict(sending.headers)) as response:
        async for piece in response.aiter_bytes():
            raw += piece
            if b'"delta":{"content":' in piece or b'"text":' in piece:
                moments.append(perf_counter())
    if response.status_code != 200:
        return _refusal(sending, response.status_code, raw)
    if not sending.is_sound:
        return Verdict(End.FAULT, f"a corrupt request was answered: {sending.body[:200]!r}")
    *events, last = raw.decode().split("\n\n")
    if last or not all(event.startswith("data: ") for event in events) or not events:
        return Verdict(End.FAULT, f"a stream that is cut or no stream: {raw[-200:]!r}")
    *before, end = [event.removeprefix("data: ") for event in events]
    if any("error" in json.loads(event) for event in before):
        return Verdict(End.FAULT, f"something follows an error event: {raw[-400:]!r}")
    if end == "[DONE]":
        gaps = [later - earlier for earlier, later in pairwise(moments)]
        return Verdict(End.ANSWERED, "", moments[0] - began if moments else None, gaps)
    return _typed(503, end.encode()) or Verdict(End.FAULT, f"a stream without [DONE]: {raw[-200:]!r}")


def _refusal(sending: Sending, status: int, body: bytes) -> Verdict:
    expected = status in _NO_PLACE or (not sending.is_sound and 400 <= status < 500)
    verdict = _typed(status, body)
    if verdict is None or not expected:
        return Verdict(End.FAULT, f"{sending.method} {sending.path} gave {status} {body[:300]!r}")
    return verdict


def _typed(status: int, body: bytes) -> Verdict | None:
    """A refusal, if the body is an error as OpenAI writes one."""
    try:
        error = json.loads(body)["error"]
        keys = {"message", "type", "param", "code"} <= error.keys() and bool(error["message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return Verdict(End.REFUSED, f"{status} {error['code'] or error['type']}") if keys else None


def _problem(sending: Sending, answer: dict[str, Any]) -> str | None:
    """What is wrong with a whole answer, None if nothing is."""
    for choice in answer.get("choices", ()):
        if choice["finish_reason"] not in ("stop", "length", "tool_calls"):
            return f"a finish reason of {choice['finish_reason']!r}"
    if sending.kind in ("schema", "tools"):
        for choice in answer["choices"]:
            if choice["finish_reason"] != "length" and (problem := _form_problem(sending.kind, choice["message"])):
                return problem
    return None


def _form_problem(kind: str, message: dict[str, Any]) -> str | None:
    text = message["tool_calls"][0]["function"]["arguments"] if kind == "tools" else message["content"]
    try:
        jsonschema.validate(json.loads(text), SCHEMA)
    except (ValueError, jsonschema.ValidationError) as error:
        return f"an answer out of form: {text[:200]!r} ({error})"
    return None


async def _send_raw(sending: Sending, host: str, port: int) -> Verdict:
    """Bytes that are no request: a typed error, or silence until the client leaves; the server may close too."""
    assert sending.raw is not None
    answer = b""
    with anyio.move_on_after(sending.leave_after):
        async with await anyio.connect_tcp(host, port) as stream:
            try:
                await stream.send(sending.raw)
                while len(answer) < _MOST_BYTES:
                    answer += await stream.receive()
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                pass
    if not answer:
        return Verdict(End.CANCELLED)
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    if 400 <= status < 500 and _typed(status, body) is not None:
        return Verdict(End.REFUSED, f"{status} broken bytes")
    return Verdict(End.FAULT, f"{sending.raw[:80]!r} gave {answer[:200]!r}")
