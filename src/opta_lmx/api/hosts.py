"""Who a request says it talks to, and for which site: the guard against pages that borrow the user's browser.

A page of any site may send requests to this machine. With a DNS name of its own that it points here (rebinding) it
may even read the answers; such a request still names the page's host. Without that trick it cannot read them, but what
it sends would be done; browsers then name the page in ``Origin``.
"""

import re
import socket
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from ipaddress import ip_address
from typing import Final
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from opta_lmx.api.errors import HostNotAllowed, OriginNotAllowed, UnreadableRequest, error_response
from opta_lmx.config import Config
from opta_lmx.errors import LmxError

_IS_HOST: Final = re.compile(r"[A-Za-z0-9._:\[\]-]+")

_OWN_NAMES: Final = frozenset({"localhost", "127.0.0.1", "::1"})

# What a browser may send without asking us first is harmless by these; ``OPTIONS`` is how it asks.
_SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})


class HostCheck:
    """Refuses requests for other hosts and, from pages of other sites, those that change or cost something."""

    def __init__(self, app: ASGIApp, current: Callable[[], Config]) -> None:
        self._app = app
        self._current = current

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        error = _fault(scope, self._current())
        if error is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await error_response(error)(scope, receive, send)
        else:
            # Before the handshake is accepted, servers turn this into a 403.
            await send({"type": "websocket.close", "code": 1008})


def _fault(scope: Scope, config: Config) -> LmxError | None:
    """Why a request is not served; None if it may go on."""
    hosts = _values(scope, b"host")
    if len(hosts) > 1 or (not hosts and scope.get("http_version") != "1.0"):
        return UnreadableRequest("The request should have one Host header.")
    host = hosts[0] if hosts else "localhost"
    name = _host_name(host)
    if name is None:
        return UnreadableRequest("The Host header of the request is no host.")
    if not _is_ours(name, config):
        return HostNotAllowed(name)
    origin = next(iter(_values(scope, b"origin")), "")
    changes = scope["type"] == "websocket" or scope["method"] not in _SAFE_METHODS
    if changes and _is_foreign(origin, host, config.server.cors_origins):
        return OriginNotAllowed(origin)
    return None


def _is_ours(name: str, config: Config) -> bool:
    """1. Names of this machine and those configured.  2. On loopback, nothing else.  3. Elsewhere all names where keys
    are set and none are configured: no page knows the key.  4. Without keys, what no page can have pointed here: plain
    addresses and this machine's own name."""
    server = config.server
    if name in _OWN_NAMES or name == server.host.lower() or _matches(name, server.allowed_hosts):  # 1
        return True
    if server.is_loopback or server.allowed_hosts:  # 2
        return False
    if config.security.inference_keys and config.security.admin_key:  # 3
        return True
    return _is_address(name) or name.removesuffix(".local") == socket.gethostname().lower().removesuffix(".local")  # 4


def _is_foreign(origin: str, host: str, allowed: Sequence[str]) -> bool:
    """True for the page of another site. Programs with windows (``app:``, ``vscode-webview:``) are no such pages, while
    ``null`` may be any page that hides."""
    if not origin or "*" in allowed or origin in allowed:
        return False
    scheme, _, place = origin.partition("://")
    if origin != "null" and scheme not in ("http", "https"):
        return False
    return place.lower() != host.lower()


def _values(scope: Scope, header: bytes) -> list[str]:
    return [value.decode("latin-1").strip() for name, value in scope["headers"] if name == header]


def _host_name(host: str) -> str | None:
    """``host`` without its port and brackets, in lower case; None if it is no host."""
    try:
        parts = urlsplit(f"//{host}")
        parts.port  # noqa: B018 - raises for what is no port
    except ValueError:
        return None
    if parts.netloc != host or not _IS_HOST.fullmatch(host) or not parts.hostname:
        return None
    return parts.hostname.removesuffix(".")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern.lower()) for pattern in patterns)


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
