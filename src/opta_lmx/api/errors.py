"""One table from what went wrong to what HTTP says of it; nobody else in this room names an error's status.

``to_envelope`` serves the exception handlers and the SSE writer alike, so that an error reads the same before the
first byte and after it. The shape is OpenAI's: ``{"error": {"message", "type", "param", "code"}}``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.responses import Response

from opta_lmx import errors as lmx
from opta_lmx.types import JsonObject


class BodyTooLarge(lmx.RequestRejected):
    """The request's body has more bytes than the server takes."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"The request body is larger than {limit_bytes:,} bytes.")
        self.limit_bytes = limit_bytes


class HostNotAllowed(lmx.RequestRejected):
    """The server is not called by this name: a page of another site may have been given our address under its own."""

    def __init__(self, host: str) -> None:
        super().__init__(
            f"This server does not answer to the host name {host[:200]!r}; server.allowed_hosts names those it does."
        )


class OriginNotAllowed(lmx.RequestRejected):
    """A browser sent this for a page of another site."""

    def __init__(self, origin: str) -> None:
        super().__init__(
            f"Pages of {origin[:200]!r} may not use this server; server.cors_origins names those that may."
        )


class UnreadableRequest(lmx.RequestRejected):
    """What arrived is no HTTP request, or one that names its host never or twice."""


class HeadTooLarge(lmx.RequestRejected):
    """The request line and the headers are larger, or more, than the server takes."""

    def __init__(self, limit_bytes: int, limit_fields: int) -> None:
        super().__init__(
            f"The request's headers are larger than {limit_bytes:,} bytes together, or more than {limit_fields}."
        )


class RequestTooSlow(lmx.RequestRejected):
    """The client did not send the rest of its request in time."""

    def __init__(self, limit_seconds: float) -> None:
        super().__init__(f"The request did not arrive in full within {limit_seconds:g} seconds.")


class TooManyConnections(lmx.Busy):
    """As many connections are open as the server allows."""

    def __init__(self) -> None:
        super().__init__("Too many connections are open. Try again later.")


class UnknownRoute(lmx.RequestRejected):
    """No route has this path, of which 200 characters are shown."""

    def __init__(self, method: str, path: str) -> None:
        # What cannot be seen is written out: an error is read in terminals and logs.
        seen = (char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in path[:200])
        super().__init__(f"Invalid URL ({method} {''.join(seen)})")


class WrongMethod(lmx.RequestRejected):
    """The path exists, for other methods: ``allowed``, as the Allow header lists them."""

    def __init__(self, allowed: str) -> None:
        super().__init__(f"Only {allowed} requests are accepted.", code="method_not_supported")
        self.allowed = allowed


@dataclass(frozen=True, slots=True)
class Row:
    """What HTTP says of one class of error.

    The official clients send a request again on 408, 409, 429 and every 5xx unless ``x-should-retry`` tells them
    otherwise; ``retry`` False does, for what waiting cannot cure. ``after_seconds`` is the Retry-After of an error
    that names no time itself.
    """

    status: int
    type: str
    code: str | None = None
    retry: bool | None = None
    after_seconds: float | None = None


_REQUEST = "invalid_request_error"
_SERVER = "server_error"

# Found by walking a class's MRO, so a subclass without a row of its own has its parent's.
TABLE: Mapping[type[Exception], Row] = {
    Exception: Row(500, _SERVER),
    lmx.LmxError: Row(500, _SERVER),
    lmx.RequestRejected: Row(400, _REQUEST),
    lmx.InvalidRequest: Row(400, _REQUEST),
    lmx.UnsupportedParameter: Row(400, _REQUEST, "unsupported_parameter"),
    lmx.ModelNotFound: Row(404, _REQUEST, "model_not_found"),
    lmx.LeaseNotFound: Row(404, _REQUEST, "lease_not_found"),
    lmx.DownloadNotFound: Row(404, _REQUEST, "download_not_found"),
    lmx.ContextTooLong: Row(400, _REQUEST, "context_length_exceeded"),
    BodyTooLarge: Row(413, _REQUEST),
    HostNotAllowed: Row(403, _REQUEST, "host_not_allowed"),
    OriginNotAllowed: Row(403, _REQUEST, "origin_not_allowed"),
    UnreadableRequest: Row(400, _REQUEST),
    HeadTooLarge: Row(431, _REQUEST),
    RequestTooSlow: Row(408, _REQUEST, "request_timeout"),
    TooManyConnections: Row(503, _SERVER, "overloaded"),
    UnknownRoute: Row(404, _REQUEST),
    WrongMethod: Row(405, _REQUEST, "method_not_supported"),
    lmx.AccessDenied: Row(401, _REQUEST, "invalid_api_key"),
    # A model is leased or pinned until somebody lets go of it: nothing a client's own back-off would outlast.
    lmx.Conflict: Row(409, _REQUEST, "conflict", retry=False),
    lmx.Busy: Row(503, _SERVER, "overloaded"),
    lmx.QueueFull: Row(429, "requests", "rate_limit_exceeded"),
    lmx.ModelLoading: Row(503, _SERVER, "model_loading"),
    lmx.Draining: Row(503, _SERVER, "draining"),
    lmx.NoRoom: Row(507, _SERVER, "insufficient_storage", retry=False),
    lmx.MemoryLimit: Row(507, _SERVER, "insufficient_memory", retry=False),
    lmx.DiskFull: Row(507, _SERVER, "insufficient_disk", retry=False),
    lmx.WorkerError: Row(500, _SERVER),
    # 422, not 5xx: the files are bad until somebody changes them, and each retry would cost another whole load.
    lmx.LoadFailed: Row(422, _REQUEST, "model_load_failed", retry=False),
    lmx.WorkerLost: Row(503, _SERVER, "worker_lost", after_seconds=1),
    # Each retry of a client would cost a worker, and everybody's streams with it.
    lmx.LostTwice: Row(503, _SERVER, "request_lost_twice", retry=False),
    lmx.RestartsExhausted: Row(503, _SERVER, "model_failed", retry=False),
    # The same request would most likely fail in the same place again.
    lmx.GenerationFailed: Row(500, _SERVER, retry=False),
    # A client that repeats it by itself would wait as long again.
    lmx.GenerationStalled: Row(504, _SERVER, "generation_stalled", retry=False),
    lmx.DownloadError: Row(502, _SERVER, "download_failed"),
    # Met by requests too, when a file on disk has changed: as permanent as a failed load.
    lmx.IntegrityMismatch: Row(422, _REQUEST, "integrity_mismatch", retry=False),
    lmx.HubUnreachable: Row(502, _SERVER, "hub_unreachable"),
}

# The message of a bug says nothing: what there is to know is in the log, under the request's id.
_BUG_MESSAGE = "The server had an error while processing your request."


def to_envelope(exc: Exception) -> tuple[int, JsonObject, dict[str, str]]:
    """The status, JSON body and extra headers that tell a client of ``exc``; any exception is taken."""
    row = next(TABLE[cls] for cls in type(exc).__mro__ if cls in TABLE)
    error: JsonObject = {
        "message": str(exc) if isinstance(exc, lmx.LmxError) else _BUG_MESSAGE,
        "type": row.type,
        "param": None,
        "code": row.code,
    }
    headers: dict[str, str] = {}
    after_seconds = row.after_seconds
    match exc:
        case lmx.RequestRejected():
            error |= {"param": exc.param, "code": exc.code or row.code}
        case lmx.AccessDenied():
            error["code"] = row.code if exc.presented else None
            headers["www-authenticate"] = "Bearer"
        case lmx.MemoryLimit():
            error["plan"] = exc.plan
        case lmx.Busy():
            after_seconds = exc.retry_after_seconds
    if isinstance(exc, WrongMethod):
        headers["allow"] = exc.allowed
    if row.retry is not None:
        headers["x-should-retry"] = str(row.retry).lower()
    if after_seconds is not None:
        headers["retry-after"] = str(max(1, math.ceil(after_seconds)))
    return row.status, {"error": error}, headers


def error_response(exc: Exception) -> Response:
    """The whole answer to a request that ended in ``exc``."""
    status, body, headers = to_envelope(exc)
    return json_response(body, status=HTTPStatus(status), headers=headers)


def json_response(body: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """``body`` (dicts, lists, structs, scalars) as a JSON answer."""
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")
