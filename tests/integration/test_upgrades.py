"""Clients that offer another protocol with their request, as Java's does, are answered by HTTP/1.1, body and all."""

import json
import random
import socket
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Final

import pytest

from opta_lmx.types import EchoOptions
from tests.integration.chatting import CHAT, chat
from tests.integration.conftest import RunningServer, StartServer

_OFFERS: Final = {
    # Java's HttpClient, unless it is told to speak HTTP/1.1.
    "h2c": "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\n",
    "websocket": "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n",
    "unknown": "Connection: upgrade\r\nUpgrade: something/1.0\r\n",
}
_BODY: Final = json.dumps(chat("a", "so it is read")).encode()
_FRAMED: Final = {
    "sized": f"Content-Length: {len(_BODY)}\r\n\r\n".encode() + _BODY,
    "chunked": b"Transfer-Encoding: chunked\r\n\r\n5\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n"
    % (_BODY[:5], len(_BODY) - 5, _BODY[5:]),
}


@pytest.mark.parametrize("framing", _FRAMED)
def test_the_body_of_a_request_with_an_offer_is_read(
    server: StartServer, subtests: pytest.Subtests, framing: str
) -> None:
    """In whatever pieces it comes; what follows on the connection is served too, with an offer or without."""
    running = server({"a": EchoOptions()})
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost:{running.port}\r\nContent-Type: application/json\r\n"
    plain = head.encode() + _FRAMED[framing]
    for offer, fields in _OFFERS.items():
        offered = (head + fields).encode() + _FRAMED[framing]
        for name, pieces in _ways(offered, plain, random.Random(offer + framing)).items():
            with subtests.test(offer=offer, pieces=name):
                for answer in _exchange(running, pieces, answers=2):
                    assert answer["choices"][0]["message"]["content"] == "so it is read"
    assert "Unsupported upgrade" not in running.log.read_text()


def test_an_offer_without_a_body_is_declined(server: StartServer, subtests: pytest.Subtests) -> None:
    """By the answer itself."""
    running = server({"a": EchoOptions()})
    for offer, fields in _OFFERS.items():
        request = f"GET /v1/models HTTP/1.1\r\nHost: localhost:{running.port}\r\n{fields}\r\n".encode()
        with subtests.test(offer):
            for answer in _exchange(running, [request, request], answers=2):
                assert [model["id"] for model in answer["data"]] == ["a"]


def _ways(offered: bytes, plain: bytes, rng: random.Random) -> dict[str, list[bytes]]:
    """Pieces in which a request with an offer may come, and another after it."""
    both = offered + plain
    return {
        "at once": [both],
        "head and body": [*_cut(offered, [offered.index(b"\r\n\r\n") + 4]), plain],
        "byte by byte": [bytes([byte]) for byte in both],
        "anyhow": _cut(both, sorted(rng.sample(range(1, len(both)), 9))),
        "twice": [offered, offered],
    }


def _cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    edges = [0, *places, len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


def _exchange(running: RunningServer, pieces: Sequence[bytes], answers: int) -> Iterator[Any]:
    """The JSON of so many answers on one connection, each of which must be a 200 of HTTP/1.1."""
    with socket.create_connection(("127.0.0.1", running.port), timeout=10) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            connection.sendall(piece)
        # One reader for all: each of its own would take bytes of the next answer with it.
        reader = connection.makefile("rb")
        for _ in range(answers):
            status = reader.readline()
            assert status == b"HTTP/1.1 200 OK\r\n"
            length = 0
            while (line := reader.readline()) != b"\r\n":
                name, _, value = line.partition(b":")
                if name.lower() == b"content-length":
                    length = int(value)
            yield json.loads(reader.read(length))
