"""What every request passes, as plain ASGI: wrapping a request in a task of its own would hide a leaving client."""

import re
from collections.abc import Awaitable, Callable
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Fit for a log line and a header; anything else a client sends is replaced.
_SANE_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:\-]{0,127}")


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
