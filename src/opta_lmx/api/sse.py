"""Server-sent events: one answer that is written while it is made.

The events themselves are a dialect's (``openai/answer.py``); this module knows HTTP, clients who leave, and how a
stream that fails ends: with one error event and without the dialect's own last word.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from opta_lmx.api.disconnect import generating
from opta_lmx.api.errors import to_envelope
from opta_lmx.errors import LmxError
from opta_lmx.inference.engine import Generation, InferenceEngine
from opta_lmx.types import CacheReport, Delta, GenerateRequest


class EventWriter(Protocol):
    """Turns one generation into the bytes of a dialect's events, each ending with an empty line."""

    def begin(self) -> bytes:
        """The events before the first token."""
        ...

    def write(self, deltas: Sequence[Delta]) -> bytes:
        """The events of one look at the generation; may be empty."""
        ...

    def end(self) -> bytes:
        """The events after the last token."""
        ...


class EventStream(Response):
    """Opens a generation and writes its events; refusals raised by ``engine.open`` come before any byte is sent.

    Plain ASGI: one ``send`` for each look at the generation, nothing in between.
    """

    def __init__(
        self, engine: InferenceEngine, wanted: GenerateRequest, make_writer: Callable[[Generation], EventWriter]
    ) -> None:
        # Response.__init__ is for bodies that are known now.
        self.status_code = 200
        self.background = None
        self._engine = engine
        self._wanted = wanted
        self._make_writer = make_writer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises what ``engine.open`` raises; later failures of the generation end the stream instead."""
        with suppress(ClientDisconnect):
            async with generating(self._engine, self._wanted, receive) as generation:
                await self._stream(generation, send)

    async def _stream(self, generation: Generation, send: Send) -> None:
        writer = self._make_writer(generation)
        headers = {
            "content-type": "text/event-stream",
            "cache-control": "no-cache",
            # nginx would hold the events back otherwise.
            "x-accel-buffering": "no",
        } | cache_header(generation.cache)
        raw_headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": self.status_code, "headers": raw_headers})
        await send({"type": "http.response.body", "body": writer.begin(), "more_body": True})
        try:
            async for deltas in generation:
                if events := writer.write(deltas):
                    await send({"type": "http.response.body", "body": events, "more_body": True})
            last = writer.end()
        except LmxError as error:
            last = error_event(error)
        await send({"type": "http.response.body", "body": last, "more_body": False})


def error_event(error: LmxError) -> bytes:
    """The event that ends a failed stream."""
    return b"data: " + msgspec.json.encode(to_envelope(error)[1]) + b"\n\n"


def cache_header(cache: CacheReport) -> dict[str, str]:
    """How much of the prompt came from the prefix cache, in tokens, for people who tune it."""
    return {"x-lmx-cache": f"hit={cache.hit_tokens}; miss_at={cache.miss_at}; cause={cache.cause}"}
