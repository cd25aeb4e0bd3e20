"""How integration tests speak with a running server: chats, streams read to their end, and waits with a bound."""

import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
import httpx
import pytest

from opta_lmx.types import JsonObject
from tests.integration.conftest import RunningServer

Shown = TypeVar("Shown")

CHAT = "/v1/chat/completions"

# Seconds. What is waited for takes milliseconds, or the time the test's own model was told to take.
_BOUND = 15.0


def connect(server: RunningServer) -> httpx.AsyncClient:
    """An asynchronous client that no proxy setting of the machine can lead astray."""
    # Nothing here is encrypted, and reading the machine's certificates takes 50 ms a client.
    return httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=30, verify=False)


def words(count: int, start: str = "w") -> str:
    """A text of so many words, each one token to an echo model, all different."""
    return " ".join(f"{start}{number}" for number in range(count))


def chat(model: str, text: str, **fields: Any) -> JsonObject:
    """The body of a request."""
    return {"model": model, "messages": [{"role": "user", "content": text}], **fields}


async def ask(client: httpx.AsyncClient, model: str, text: str, **fields: Any) -> httpx.Response:
    """A whole answer, whatever its status."""
    return await client.post(CHAT, json=chat(model, text, **fields))


def content(response: httpx.Response) -> str:
    """The text of a whole answer, which must have succeeded."""
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["message"]["content"]
    return text


def check_error(response: httpx.Response, status: int, code: str | None) -> JsonObject:
    """The error of a refusal, which must have OpenAI's four keys and this status and code."""
    assert response.status_code == status, response.text
    error: JsonObject = response.json()["error"]
    assert {"message", "type", "param", "code"} <= error.keys()
    assert error["code"] == code, error
    assert error["message"]
    return error


@dataclass(slots=True)
class Stream:
    """A streamed answer, byte by byte, as far as it has been read."""

    status: int
    headers: httpx.Headers
    raw: bytes = b""

    @property
    def lines(self) -> list[str]:
        """Its lines; only a line feed ends one, whatever Unicode calls a line's end."""
        return self.raw.decode().split("\n")

    @property
    def events(self) -> list[JsonObject]:
        """Every event but [DONE]; fails for a line that is not exactly ``data: {...}`` or empty."""
        assert all(line == "" or line.startswith("data: ") for line in self.lines), self.lines
        return [json.loads(line[6:]) for line in self.lines if line and line != "data: [DONE]"]

    @property
    def done(self) -> bool:
        """True if the stream ended with [DONE]."""
        return self.raw.endswith(b"\n\ndata: [DONE]\n\n")

    @property
    def pieces(self) -> list[str]:
        """The texts of the content chunks of choice 0."""
        choices = [choice for event in self.events for choice in event.get("choices", ()) if choice["index"] == 0]
        return [choice["delta"]["content"] for choice in choices if choice["delta"].get("content")]

    @property
    def text(self) -> str:
        """All content so far."""
        return "".join(self.pieces)

    @property
    def errors(self) -> list[JsonObject]:
        """The error events."""
        return [event["error"] for event in self.events if "error" in event]

    @property
    def finish_reasons(self) -> list[str]:
        """The finish reasons told so far."""
        choices = (choice for event in self.events for choice in event.get("choices", ()))
        return [choice["finish_reason"] for choice in choices if choice["finish_reason"]]


async def stream(client: httpx.AsyncClient, body: JsonObject, begun: anyio.Event | None = None, at: int = 1) -> Stream:
    """Streams an answer to its end; sets ``begun`` when its text has come in ``at`` chunks, fails if it ends before."""
    async with client.stream("POST", CHAT, json={**body, "stream": True}) as response:
        read = Stream(response.status_code, response.headers)
        async for chunk in response.aiter_bytes():
            read.raw += chunk
            # The role chunk has its content last.
            if begun is not None and read.raw.count(b'"delta":{"content":') >= at:
                begun.set()
    assert begun is None or begun.is_set(), f"it ended before its text: {read.status} {read.raw!r}"
    return read


async def status(client: httpx.AsyncClient) -> JsonObject:
    """GET /admin/status."""
    answer: JsonObject = (await client.get("/admin/status")).json()
    return answer


async def until(look: Callable[[], Awaitable[Shown]], holds: Callable[[Shown], bool]) -> Shown:
    """What ``look`` shows once it ``holds``; fails with what it showed last when the bound passes."""
    deadline = time.monotonic() + _BOUND
    while not holds(shown := await look()):
        if time.monotonic() > deadline:
            pytest.fail(f"not reached within {_BOUND} s: {shown}")
        await anyio.sleep(0.01)
    return shown


async def until_status(client: httpx.AsyncClient, holds: Callable[[JsonObject], bool]) -> JsonObject:
    """The first GET /admin/status for which ``holds``."""
    return await until(lambda: status(client), holds)


def model_status(shown: JsonObject, model: str) -> JsonObject:
    """What a status says of one model; empty if it does not name it."""
    return next((entry for entry in shown["models"] if entry["id"] == model), {})


def depths(shown: JsonObject) -> tuple[int, int]:
    """Requests that run and requests that wait."""
    return shown["requests_running"], shown["requests_waiting"]


async def leases(client: httpx.AsyncClient) -> dict[str, int]:
    """Every model that is known to memory, with its leases."""
    models = (await client.get("/admin/models")).json()["models"]
    return {model["id"]: model["leases"] for model in models}


async def until_all_returned(client: httpx.AsyncClient) -> None:
    """Waits until nothing runs, nothing waits and no model is leased; a lease ends when its worker is done."""
    await until_status(client, lambda shown: depths(shown) == (0, 0))
    await until(lambda: leases(client), lambda held: not any(held.values()))
