"""Requests with something wrong in them, made from good ones by chance, and a strict reading of what comes back.

The same ``random.Random`` makes the same request. Nothing here talks to a server; ``test_http_fuzz.py`` does.
"""

import json
import random
import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final, TypeAlias

from opta_lmx.types import JsonObject

Field: TypeAlias = tuple[bytes, bytes]

_OFFER: Final[list[Field]] = [
    (b"Connection", b"Upgrade, HTTP2-Settings"),
    (b"Upgrade", b"h2c"),
    (b"HTTP2-Settings", b"AAEAAEAAAAIAAAABAAMAAABk"),
]

_METHODS: Final = (
    *(b"GET", b"HEAD", b"OPTIONS", b"PUT", b"PATCH", b"DELETE", b"TRACE", b"CONNECT", b"PRI", b"M-SEARCH", b"SOURCE"),
    *(b"", b"post", b"POST ", b" POST", b"PO\0ST", b"P\xc3\x96ST", b"POSTPOST", b"\r\nPOST", b"A" * 20_000),
)

_TARGETS: Final = (
    *(b"", b"*", b"/", b"//", b"/..", b"/../../etc/passwd", b"/%", b"/%00", b"/%zz", b"/v1/models/%ff%fe", b"?", b"#"),
    *(b"/v1/models/%2e%2e%2f", b"/v1/models/a%0a", b"/v1/chat/completions?" + b"a=b&" * 200, b"/" + b"a" * 40_000),
    *(b"http://localhost/v1/models", b"http://localhost", b"http://[::1", b"localhost:80", b"/v1/\xc3\xa9", b"/\xff"),
    *(b"/v1 /models", b"/v1/models\tx", b"/admin/models/" + b"%F0%9F%98%80" * 50, b"/admin/leases/x", b"/docs", b"/\0"),
)

_VERSIONS: Final = (
    *(b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/1.2", b"HTTP/11", b"HTTP/1.1 ", b"http/1.1", b"HTTPS/1.1"),
    *(b"", b"HTTP/1.", b"HTTP/999.999", b"RTSP/1.0", b"ICE/1.0"),
)

# What a server may be told beside, or instead of, what is true.
_FIELDS: Final[tuple[Field, ...]] = (
    *((b"Content-Length", value) for value in (b"0", b"1", b"-1", b"+5", b"5, 5", b"0x5", b"", b"five", b"1" * 30)),
    *((b"Content-Length", value) for value in (b"18446744073709551615", b"99999999", b" 5 5", b"5\0")),
    *((b"Transfer-Encoding", value) for value in (b"chunked", b"identity", b"gzip", b"chunked, chunked", b"xchunked")),
    *((b"Transfer-Encoding", value) for value in (b"gzip, chunked", b"chunked, gzip", b"", b"\x0bchunked", b"CHUNKED")),
    *((b"Host", value) for value in (b"", b"evil.example", b"localhost:x", b"[", b"a b", b"\xff", b"localhost, b")),
    *((b"Expect", value) for value in (b"100-continue", b"200-ok", b"")),
    *((b"Connection", value) for value in (b"close", b"keep-alive", b"upgrade", b"close, upgrade", b"\xff", b",,,")),
    *((b"Upgrade", value) for value in (b"h2c", b"websocket", b"TLS/1.0", b"")),
    *((b"Content-Type", value) for value in (b"", b"text/plain", b"application/x-www-form-urlencoded", b"\xff/\xfe")),
    *((b"Content-Type", value) for value in (b"application/json; charset=utf-16", b"multipart/form-data")),
    *((b"Authorization", value) for value in (b"Bearer", b"Bearer \xff", b"Basic Og==", b"Bearer " + b"k" * 9_000)),
    *((b"Accept-Encoding", b"gzip"), (b"Content-Encoding", b"gzip"), (b"Accept", b"\xff"), (b"Range", b"bytes=0-1")),
    *((b"Origin", value) for value in (b"null", b"http://evil.example", b"://", b"\xff")),
    *((b"X-Request-Id", value) for value in (b"ok-1", b"a" * 300, b"\xc3\xa9", b"a b", b"")),
    *((b"X-LMX-Lane", value) for value in (b"batch", b"fast", b"\xff")),
    *((b"Cookie", b"a=b; " * 100), (b"X-Huge", b"h" * 40_000), (b"X-Nul", b"a\0b"), (b"X-Bare", b"a\rb"), (b"", b"")),
    *((b"X Space", b"v"), (b"X-Tab\t", b"v"), (b"X-\xc3\xa9", b"v"), (b"X:Colon", b"v"), (b"X-Fold", b"a\r\n b")),
    *((b"X-Line", b"a\nX-More: b"), (b"TE", b"trailers"), (b"Trailer", b"Host"), (b"Forwarded", b"for=\xff")),
)

_LIES_ABOUT_CHUNKS: Final = (b"", b"-1", b"0", b"g", b"0x4", b"F" * 15, b"F" * 17, b"7fffffff", b"4 ", b"1")
_EXTENSIONS: Final = (b"", b"", b";a=b", b';a="\xff"', b";" * 500, b";" + b"e" * 40_000, b" ;x")
_TRAILERS: Final = (
    b"",
    b"X-T: v\r\n",
    b"Host: evil\r\n",
    b"Content-Length: 9\r\n",
    b"X: " + b"t" * 40_000,
    b"\xff\r\n",
)


@dataclass(slots=True)
class Written:
    """One request, in parts that can be spoilt one by one."""

    method: bytes
    target: bytes
    body: bytes = b""
    version: bytes = b"HTTP/1.1"
    fields: list[Field] = field(default_factory=list)
    line_end: bytes = b"\r\n"

    def encode(self) -> bytes:
        """Its bytes, whatever they are worth."""
        lines = [b" ".join((self.method, self.target, self.version)), *(b": ".join(each) for each in self.fields)]
        return self.line_end.join([*lines, b"", self.body])


def written(rng: random.Random, method: str, path: str, body: bytes | None) -> Written:
    """A request in good form: its body of a told size or in chunks, now and then with an offer of HTTP/2."""
    request = Written(method.encode(), path.encode(), fields=[(b"Host", b"localhost")])
    if rng.random() < 0.2:
        request.fields += _OFFER
    if body is not None:
        request.fields.append((b"Content-Type", b"application/json"))
        if rng.random() < 0.5:
            request.fields.append((b"Content-Length", str(len(body)).encode()))
            request.body = body
        else:
            request.fields.append((b"Transfer-Encoding", b"chunked"))
            places = sorted(rng.sample(range(1, len(body)), min(2, len(body) - 1))) if body else []
            request.body = b"".join(_chunk(piece) for piece in cut(body, places) if piece) + b"0\r\n\r\n"
    return request


def _chunk(data: bytes, size: bytes | None = None, extension: bytes = b"") -> bytes:
    return b"%b%b\r\n%b\r\n" % (f"{len(data):x}".encode() if size is None else size, extension, data)


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    """``data`` in pieces that end at these places."""
    return [data[start:end] for start, end in pairwise([0, *places, len(data)])]


# -- what goes wrong with a request ----------------------------------------------------------------


def _with_a_method(rng: random.Random, request: Written) -> None:
    request.method = rng.choice(_METHODS)


def _with_a_target(rng: random.Random, request: Written) -> None:
    request.target = rng.choice(_TARGETS)


def _with_a_version(rng: random.Random, request: Written) -> None:
    request.version = rng.choice(_VERSIONS)


def _with_a_field(rng: random.Random, request: Written) -> None:
    request.fields.insert(rng.randint(0, len(request.fields)), rng.choice(_FIELDS))


def _with_another_value(rng: random.Random, request: Written) -> None:
    if request.fields:
        at = rng.randrange(len(request.fields))
        name = request.fields[at][0]
        values = [value for other, value in _FIELDS if other == name] or [rng.randbytes(rng.randint(0, 20))]
        request.fields[at] = (name, rng.choice(values))


def _without_a_field(rng: random.Random, request: Written) -> None:
    if request.fields:
        del request.fields[rng.randrange(len(request.fields))]


def _with_a_field_twice(rng: random.Random, request: Written) -> None:
    if request.fields:
        request.fields.append(rng.choice(request.fields))


def _with_many_fields(rng: random.Random, request: Written) -> None:
    request.fields += [(b"X-%d" % number, b"v") for number in range(rng.choice([90, 99, 100, 500]))]


def _with_other_line_ends(rng: random.Random, request: Written) -> None:
    request.line_end = rng.choice([b"\n", b"\r", b"\r\r\n", b"\n\r", b"\r\n\r\n", b"\r\n "])


def _with_odd_chunks(rng: random.Random, request: Written) -> None:
    """As a chunked body, whether the head says so or not."""
    lie = rng.choice([None, None, *_LIES_ABOUT_CHUNKS])
    chunks = _chunk(request.body[:50] or b"{}", lie, rng.choice(_EXTENSIONS))
    request.body = chunks + rng.choice([b"", b"0\r\n", b"0\r\n" + rng.choice(_TRAILERS) + b"\r\n"])
    if rng.random() < 0.8:
        framing = (b"content-length", b"transfer-encoding")
        request.fields = [each for each in request.fields if each[0].lower() not in framing]
        request.fields.append((b"Transfer-Encoding", b"chunked"))


def _with_another_body(rng: random.Random, request: Written) -> None:
    request.body = rng.choice([b"", request.body[:-1], request.body * 2, request.body + b"GET / HTTP/1.1\r\n\r\n"])


_FAULTS: Final[tuple[Callable[[random.Random, Written], None], ...]] = (
    _with_a_method,
    _with_a_target,
    _with_a_version,
    _with_a_field,
    _with_a_field,
    _with_another_value,
    _without_a_field,
    _with_a_field_twice,
    _with_many_fields,
    _with_other_line_ends,
    _with_odd_chunks,
    _with_odd_chunks,
    _with_another_body,
)


def spoil(rng: random.Random, request: Written) -> bytes:
    """The bytes of a request with a fault or two, of its parts or of its bytes; now and then with none."""
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        rng.choice(_FAULTS)(rng, request)
    data = request.encode()
    at = rng.randrange(len(data))
    spoilt = [data[:at], data[at:], data[:at] + rng.randbytes(rng.randint(1, 9)) + data[at:], rng.randbytes(200)]
    spoilt.append(data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :])
    spoilt.append(data[:at] + data[at + rng.randint(1, 9) :])
    return rng.choice(spoilt) if rng.random() < 0.35 else data


# -- what goes wrong with JSON ---------------------------------------------------------------------

_ODD_VALUES: Final[tuple[Any, ...]] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63) - 1, 0.5, -0.0, 1e308, 5e-324),
    *("", " ", "\0", "a" * 5_000, "\u202e\u0000\ufeff", "\U0001f600", "../../x", "true", "1", "smollm2-135m-instruct"),
    *([], [[]], [None], [1, "a", {}], {}, {"": {}}, {"type": "text"}, {"type": "function"}, [{"role": "user"}]),
)

# What no Python value writes; put where a marker stands.
_ODD_TEXTS: Final = (
    *("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 400, "1." + "1" * 400, "01", "1.", "+1", "0x1", "'a'"),
    *('"\\ud83d"', '"\\ude00\\ud83d"', '"\\u0000"', '"\\x"', '"', "undefined", "[1,]", '{"a":1,}', "/**/1", "\t\t1"),
    *("[" * 100 + "]" * 100, "[" * 200 + "]" * 200, '{"a":' * 300 + "1" + "}" * 300, "[" * 50_000, '{"":' * 20_000),
)
_MARKER: Final = "put the text here"


def spoil_json(rng: random.Random, body: JsonObject) -> bytes:
    """The text of a JSON object with a fault or two, of its values, its keys or its text."""
    copy = deepcopy(body)
    for _ in range(rng.choice([1, 1, 2, 3])):
        _spoil_a_value(rng, copy)
    text = json.dumps(copy, ensure_ascii=rng.random() < 0.5)
    text = text.replace(f'"{_MARKER}"', rng.choice(_ODD_TEXTS))
    if rng.random() < 0.15:
        key = rng.choice([*body, "model", "__proto__"])
        text = text[:-1] + f', "{key}": {json.dumps(rng.choice(_ODD_VALUES))}' + text[-1:]
    data = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.15:
        at = rng.randrange(len(data))
        spoilt = [data[:at], data[at:], data + data, b"\xef\xbb\xbf" + data, text.encode("utf-16", "surrogatepass")]
        data = rng.choice([*spoilt, data[:at] + rng.randbytes(3) + data[at:]])
    return data


def _spoil_a_value(rng: random.Random, body: JsonObject) -> None:
    """Somewhere in it: another value, none, another key, or itself again inside."""
    places = list(_places(body))
    if not places:
        return
    container, key = rng.choice(places)
    match rng.randrange(6):
        case 0 | 1:
            container[key] = _odd_value(rng)
        case 2:
            container[key] = _MARKER
        case 3:
            del container[key]
        case 4:
            container[key] = rng.choice([[container[key]], {"value": container[key]}, [container[key]] * 50])
        case _ if isinstance(container, dict):
            container[rng.choice(["", "a", key.upper(), f"{key}\0", "stream", "n", "\ud83d"])] = container.pop(key)
        case _:
            container.insert(0, _odd_value(rng))


def _odd_value(rng: random.Random) -> Any:
    # A copy: what one case spoils must not be in the next one.
    return deepcopy(rng.choice(_ODD_VALUES))


def _places(value: Any) -> Any:
    """Every container in ``value`` with each of its keys or indices."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


# -- what comes back -------------------------------------------------------------------------------

_STATUS_LINE: Final = re.compile(rb"HTTP/1\.1 (\d{3}) [ -~]*")
_FIELD_LINE: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+): ?([\t -~\x80-\xff]*)")


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer; ``fields`` have names in lower case. One to HEAD has no body."""

    status: int
    fields: dict[str, str]
    body: bytes
    whole: bool


def read_answers(received: bytes) -> list[Answer]:
    """All that was answered on one connection; raises ValueError for bytes that are no answer of HTTP/1.1."""
    answers: list[Answer] = []
    while received:
        head, end, received = received.partition(b"\r\n\r\n")
        status_line, *lines = head.split(b"\r\n")
        status, fields = _STATUS_LINE.fullmatch(status_line), [_FIELD_LINE.fullmatch(line) for line in lines]
        if not end or status is None or None in fields:
            raise ValueError(f"no head of an answer: {head[:200]!r}")
        named = {each[1].decode().lower(): each[2].decode("latin-1") for each in fields if each is not None}
        body, whole, received = _take_body(named, received)
        answers.append(Answer(int(status[1]), named, body, whole))
    return answers


def _take_body(fields: dict[str, str], data: bytes) -> tuple[bytes, bool, bytes]:
    """The body, whether all of it came, and what follows it."""
    if data.startswith(b"HTTP/1.1 ") or not data:
        # None of it: the answer is one to HEAD, or to no method at all.
        return b"", fields.get("content-length", "0") == "0" and "transfer-encoding" not in fields, data
    if fields.get("transfer-encoding") != "chunked":
        size = int(fields.get("content-length", "0"))
        return data[:size], len(data) >= size, data[size:]
    body = b""
    while True:
        line, end, data = data.partition(b"\r\n")
        if not end:
            return body, False, b""
        size = int(line, 16)
        if len(data) < size + 2:
            return body + data[:size], False, b""
        if data[size : size + 2] != b"\r\n":
            raise ValueError(f"a chunk without an end: {data[:50]!r}")
        body, data = body + data[:size], data[size + 2 :]
        if size == 0:
            return body, True, data
