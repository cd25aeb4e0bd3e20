"""Who may call: keys for the inference API and one for administration."""

from collections.abc import Callable, Iterable
from hmac import compare_digest
from itertools import product

from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from opta_lmx.api.errors import error_response
from opta_lmx.config import Config
from opta_lmx.errors import AccessDenied

# A monitor must be able to tell a live server from a dead one without a key.
_OPEN_PATH = "/admin/health"


class KeyCheck:
    """Guards /v1 and /api by ``security.api_keys``, /admin by ``security.admin_key``; no key configured means open.

    A key is taken from ``Authorization: Bearer``, ``x-api-key`` (/v1, /api) or ``X-Admin-Key`` (/admin).
    """

    def __init__(self, app: ASGIApp, current: Callable[[], Config]) -> None:
        self._app = app
        self._current = current

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        keys, header = self._guard(scope["path"])
        presented = _presented(Headers(scope=scope), header)
        if not keys or _any_equal(presented, keys):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await error_response(AccessDenied(presented=bool(presented)))(scope, receive, send)
        else:
            # Before the handshake is accepted, servers turn this into a 403.
            await send({"type": "websocket.close", "code": 1008})

    def _guard(self, path: str) -> tuple[list[bytes], str]:
        """The keys that open ``path`` (none: open), and the header beside Authorization that may carry one."""
        security = self._current().security
        room = path.split("/", 2)[1] if path.startswith("/") else ""
        if room in ("v1", "api"):
            return _encoded(security.api_keys), "x-api-key"
        if room == "admin" and path != _OPEN_PATH:
            return _encoded([security.admin_key] if security.admin_key else []), "x-admin-key"
        return [], ""


def _encoded(keys: Iterable[SecretStr]) -> list[bytes]:
    return [key.get_secret_value().encode() for key in keys]


def _presented(headers: Headers, header: str) -> list[bytes]:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    found = [headers.get(header, ""), token.strip() if scheme.lower() == "bearer" else ""]
    return [key.encode("latin-1") for key in found if key]


def _any_equal(presented: Iterable[bytes], keys: Iterable[bytes]) -> bool:
    """Compares every pair, each in constant time: how long it takes tells nothing about which one was close."""
    equal = False
    for one, key in product(presented, keys):
        equal |= compare_digest(one, key)
    return equal
