"""From the bytes of a request to a JSON object that the rest of the server can take: bounded, plain, encodable.

FastAPI's own reading of bodies is not used: its limits, messages and status codes are not ours. What is wrong with the
values of single fields is found next, in ``validation.py``.
"""

import json
import re
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any, Final, TypeVar

import msgspec
from anyio import to_thread
from starlette.requests import Request

from opta_lmx.api.errors import BodyTooLarge
from opta_lmx.errors import InvalidRequest
from opta_lmx.types import JsonObject

# Deeper than any schema in use, and far below where recursive readers and writers of JSON give up (about 1,000).
MAX_DEPTH: Final = 128

# Understanding a chat of this size takes about 2 ms (measured: 38 ms a megabyte of short messages); larger ones would
# hold up everybody's streams if it were done on the event loop. What takes the time are the objects: a larger body of
# few, such as an agent's long instructions and files, takes no longer.
_QUICK_BYTES: Final = 64 * 1024
_QUICK_OBJECTS: Final = 400
_QUICK_BYTES_OF_FEW_OBJECTS: Final = 512 * 1024

# The integers that a frame to the worker can carry.
_MIN_INTEGER: Final = -(2**63)
_MAX_INTEGER: Final = 2**64 - 1

_MAYBE_TOO_BIG: Final = re.compile(rb"\d{19}")
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_BRACKETS_AND_STRINGS: Final = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]')
_ESCAPED_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")

Path = tuple[str | int, ...]

Result = TypeVar("Result")


async def read_object(request: Request) -> JsonObject:
    """The JSON object in the request's body.

    Raises BodyTooLarge past ``server.max_body_bytes`` (without reading further), InvalidRequest for anything but an
    object of JSON in UTF-8, and starlette's ClientDisconnect if the client leaves meanwhile.
    """
    return await understand(request, lambda body: body)


async def understand(request: Request, work: Callable[[JsonObject], Result]) -> Result:
    """What ``work`` makes of the object in the body; a body that is not small is left to a thread, with all that.

    A thread gives the interpreter's lock back every few milliseconds, but for single calls into C: so nobody's streams
    wait for a thousand prompts. Raises what ``read_object`` and ``work`` raise.
    """
    body = b"".join(await read_pieces(request))
    if len(body) <= _QUICK_BYTES:
        return work(parse_object(body))
    return await to_thread.run_sync(lambda: work(parse_object(body)))


async def read_pieces(request: Request) -> list[bytes]:
    """The request's body as it came; raises BodyTooLarge past ``server.max_body_bytes``, without reading further."""
    limit_bytes: int = request.app.state.services.config.server.max_body_bytes
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit_bytes:
        raise BodyTooLarge(limit_bytes)
    pieces: list[bytes] = []
    size_bytes = 0
    async for piece in request.stream():
        pieces.append(piece)
        size_bytes += len(piece)
        if size_bytes > limit_bytes:
            raise BodyTooLarge(limit_bytes)
    return pieces


def is_quick(*pieces: bytes) -> bool:
    """True if a body of these pieces is so small that nobody waits long while it is understood."""
    size = sum(map(len, pieces))
    if size <= _QUICK_BYTES:
        return True
    return size <= _QUICK_BYTES_OF_FEW_OBJECTS and sum(piece.count(b"{") for piece in pieces) <= _QUICK_OBJECTS


def parse_object(body: bytes) -> JsonObject:
    """The JSON object ``body`` holds; at most MAX_DEPTH deep, integers of 64 bits, text without lone surrogates.

    Raises InvalidRequest, with the field's path as ``param`` where one field is at fault.
    """
    try:
        value = msgspec.json.decode(body)
    except RecursionError:
        raise _too_deep(body) from None
    except UnicodeDecodeError:
        raise _unreadable("it is not UTF-8") from None
    except msgspec.DecodeError as error:
        _refuse_lone_surrogate(body)
        raise _unreadable(str(error)) from None
    if not isinstance(value, dict):
        raise _unreadable("it should be an object")
    if body.count(b"{") + body.count(b"[") > MAX_DEPTH and _is_too_deep(value):
        raise _too_deep(body)
    if _MAYBE_TOO_BIG.search(body):
        _check_integers(value)
    return value


def _is_too_deep(value: JsonObject) -> bool:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for item in level
            for child in (item.values() if type(item) is dict else item)
            if type(child) is dict or type(child) is list
        ]
        if not level:
            return False
    return True


def _too_deep(body: bytes) -> InvalidRequest:
    """Names the field of the object in which the body goes past MAX_DEPTH; the body may be too deep to be read."""
    depth, key = 0, b""
    for token in map(itemgetter(0), _BRACKETS_AND_STRINGS.finditer(body)):
        if token in (b"{", b"["):
            depth += 1
        elif token in (b"}", b"]"):
            depth -= 1
        elif depth == 1:
            # Of strings at this depth, the last before a bracket opens is the key of what opens.
            key = token[1:-1]
        if depth > MAX_DEPTH:
            break
    param = show_path((key.decode(errors="replace"),)) if body.lstrip().startswith(b"{") else None
    place = "" if param is None else f" in {param!r}"
    return _unreadable(f"it is nested more than {MAX_DEPTH} levels deep{place}", param)


def _check_integers(value: JsonObject) -> None:
    for path, leaf in _walk(value):
        if isinstance(leaf, int) and not _MIN_INTEGER <= leaf <= _MAX_INTEGER:
            param = show_path(path)
            raise InvalidRequest(
                f"Invalid value for {param!r}: an integer of more than 64 bits.", param=param, code="invalid_value"
            )


def _refuse_lone_surrogate(body: bytes) -> None:
    """Half of a character (``"\\ud83d"`` alone) is valid JSON but no text: name the field it is in."""
    if not _ESCAPED_SURROGATE.search(body):
        return
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return
    for path, leaf in _walk(value):
        if any(isinstance(text, str) and _SURROGATE.search(text) for text in (*path, leaf)):
            param = _SURROGATE.sub("\ufffd", show_path(path))
            raise InvalidRequest(
                f"Invalid value for {param!r}: the text contains half of a UTF-16 surrogate pair.",
                param=param,
                code="invalid_value",
            )


def _walk(value: Any) -> Iterator[tuple[Path, Any]]:
    """Every value below ``value``, containers included, with its path; in memory that grows with the depth only."""
    pending: list[tuple[Path, Iterator[tuple[str | int, Any]]]] = [((), _entries(value))]
    while pending:
        parent, entries = pending[-1]
        for key, child in entries:
            path: Path = (*parent, key)
            yield path, child
            if isinstance(child, dict | list):
                pending.append((path, _entries(child)))
                break
        else:
            pending.pop()


def _entries(container: Any) -> Iterator[tuple[str | int, Any]]:
    return iter(container.items()) if isinstance(container, dict) else enumerate(container)


def show_path(path: Path) -> str:
    """A path as OpenAI writes it in ``param``: ``messages[0].content``; at most 200 characters."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")[:200]


def _unreadable(reason: str, param: str | None = None) -> InvalidRequest:
    return InvalidRequest(f"We could not parse the JSON body of your request: {reason}.", param=param)
