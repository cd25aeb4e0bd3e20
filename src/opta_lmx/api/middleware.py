"""What every request passes, as plain ASGI: wrapping a request in a task of its own would hide a leaving client."""

import re
from collections.abc import Awaitable, Callable
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from opta_lmx.api.errors import UnknownRoute, error_response
from opta_lmx.config import Config

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")

# Fit for a log line and a header; anything else a client sends is replaced.
_SANE_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:\-]{0,127}")


class Cors:
    """Tells browsers that pages of ``server.cors_origins`` may call and read; none configured: says nothing."""

    def __init__(self, app: ASGIApp, current: Callable[[], Config]) -> None:
        self._app = app
        self._current = current
        self._origins: tuple[str, ...] = ()
        self._inner = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        origins = self._current().server.cors_origins
        if origins != self._origins:
            self._origins = origins
            self._inner = self._speaking(origins) if origins else self._app
        await self._inner(scope, receive, send)

    def _speaking(self, origins: tuple[str, ...]) -> ASGIApp:
        return CORSMiddleware(
            self._app,
            allow_origins=list(origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "x-lmx-cache", "retry-after"],
        )


class PlainPaths:
    """Knows no path with a control character in it. The router would overlook a line break at the end of a name."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and _CONTROL.search(scope["path"]):
            app = error_response(UnknownRoute(scope["method"], scope["path"]))
        await app(scope, receive, send)


class RequestIds:
    """Gives every request an id, the client's own ``x-request-id`` if it is sane, and answers with it.

    It is ``request.state.request_id`` inside. Clients may repeat theirs: it is for reading logs, not a key.
    """

    def __init__(self, app: ASGIApp, new_id: Callable[[], str]) -> None:
        self._app = app
        self._new_id = new_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = Headers(scope=scope).get("x-request-id", "")
        request_id = sent if _SANE_ID.fullmatch(sent) else f"req_{self._new_id()}"
        scope.setdefault("state", {})["request_id"] = request_id

        def send_with_id(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            return send(message)

        await self._app(scope, receive, send_with_id)
