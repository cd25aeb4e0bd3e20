"""Who may call: keys for the inference API and one for administration."""

from collections.abc import Callable, Iterable, Sequence
from hmac import compare_digest
from itertools import product

import msgspec
from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from opta_lmx.api.errors import error_response
from opta_lmx.config import Config, SecurityConfig
from opta_lmx.errors import AccessDenied, InvalidRequest
from opta_lmx.types import ANYBODY, Caller, Lane

LANE_HEADER = "x-lmx-lane"

# A monitor must be able to tell a live server from a dead one without a key.
_OPEN_PATH = "/admin/health"


class KeyCheck:
    """Guards /v1 and /api by ``security.api_keys``, /admin by ``security.admin_key``; no key configured means open.

    A key is taken from ``Authorization: Bearer``, ``x-api-key`` (/v1, /api) or ``X-Admin-Key`` (/admin).
    """

    def __init__(self, app: ASGIApp, current: Callable[[], Config]) -> None:
        self._app = app
        self._current = current
        # Read out once for each reading of the settings, not once a request.
        self._security: SecurityConfig | None = None
        self._callers: list[tuple[bytes, Caller]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        keys, header = self._guard(scope["path"])
        presented = _presented(Headers(scope=scope), header)
        known = _find_equal(presented, [key for key, _ in keys])
        if not keys or known is not None:
            scope.setdefault("state", {})["caller"] = ANYBODY if known is None else keys[known][1]
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await error_response(AccessDenied(presented=bool(presented)))(scope, receive, send)
        else:
            # Before the handshake is accepted, servers turn this into a 403.
            await send({"type": "websocket.close", "code": 1008})

    def _guard(self, path: str) -> tuple[list[tuple[bytes, Caller]], str]:
        """The keys that open ``path`` (none: open) and whose they are, and the header beside Authorization for one."""
        security = self._current().security
        room = path.split("/", 2)[1] if path.startswith("/") else ""
        if room in ("v1", "api"):
            if security is not self._security:
                self._security, self._callers = security, _callers(security)
            return self._callers, "x-api-key"
        if room == "admin" and path != _OPEN_PATH:
            key = security.admin_key
            return [(_encoded(key), ANYBODY)] if key else [], "x-admin-key"
        return [], ""


def _callers(security: SecurityConfig) -> list[tuple[bytes, Caller]]:
    """Every key of the inference API with its caller; those without a name have one that no name in the file can be."""
    plain = [(_encoded(key), Caller(f"api_keys[{number}]")) for number, key in enumerate(security.api_keys)]
    named = [
        (_encoded(caller.key), Caller(name, caller.weight, Lane(caller.lane)))
        for name, caller in security.callers.items()
    ]
    return plain + named


def _encoded(key: SecretStr) -> bytes:
    return key.get_secret_value().encode()


def _presented(headers: Headers, header: str) -> list[bytes]:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    found = [headers.get(header, ""), token.strip() if scheme.lower() == "bearer" else ""]
    return [key.encode("latin-1") for key in found if key]


def _find_equal(presented: Iterable[bytes], keys: Sequence[bytes]) -> int | None:
    """Which key was presented. Compares every pair, each in constant time: how long it takes tells nothing of which one
    was close."""
    found = None
    for one, (number, key) in product(presented, enumerate(keys)):
        if compare_digest(one, key):
            found = number
    return found


def caller_of(request: Request) -> Caller:
    """Who asks, in which lane; raises InvalidRequest for an ``x-lmx-lane`` that is none."""
    caller: Caller = request.state.caller
    wanted = request.headers.get(LANE_HEADER)
    if wanted is None:
        return caller
    try:
        return msgspec.structs.replace(caller, lane=Lane(wanted.strip().lower()))
    except ValueError:
        lanes = " or ".join(f"'{lane}'" for lane in Lane)
        raise InvalidRequest(f"The header '{LANE_HEADER}' should be {lanes}.", param=LANE_HEADER) from None
