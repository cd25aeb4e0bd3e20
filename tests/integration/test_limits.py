"""What a client may not cost: time in front of a request, large heads, many connections, slow reading.

Every client here is a raw socket, and beside each another client's stream goes on as if nothing were.
"""

import json
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import anyio
import anyio.abc
import psutil
import pytest

from opta_lmx.types import EchoOptions, JsonObject
from tests.integration.chatting import (
    CHAT,
    chat,
    check_error,
    connect,
    depths,
    stream,
    until,
    until_all_returned,
    until_status,
    words,
)
from tests.integration.conftest import RunningServer, StartServer

HOST: Final = b"Host: localhost\r\n"
GET: Final = b"GET /v1/models HTTP/1.1\r\n" + HOST

# Seconds a client gets in these tests, and what nothing here takes longer than.
SOON, BOUND = 0.4, 8.0

# A stream at this pace shows every hold-up of the server's event loop that is longer than a token.
PACE = EchoOptions(token_seconds=0.01)


class Raw:
    """A connection whose every byte is the test's."""

    def __init__(self, connection: anyio.abc.SocketStream) -> None:
        self._connection = connection

    async def send(self, data: bytes) -> None:
        """Writes; a server that has hung up is no failure here."""
        try:
            await self._connection.send(data)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            return

    async def dribble(self, data: bytes, every: float, size: int = 1) -> None:
        """Writes so many bytes at a time, for ever after the last ones again."""
        while True:
            for start in range(0, len(data), size):
                await self.send(data[start : start + size])
                await anyio.sleep(every)

    async def some(self) -> bytes:
        """What comes next."""
        with anyio.fail_after(BOUND):
            return await self._connection.receive()

    async def rest(self) -> bytes:
        """All that comes until the server closes the connection."""
        received = b""
        with anyio.fail_after(BOUND):
            try:
                while True:
                    received += await self._connection.receive()
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                return received


@asynccontextmanager
async def raw(server: RunningServer) -> AsyncIterator[Raw]:
    """A connection to the server."""
    async with await anyio.connect_tcp("127.0.0.1", server.port) as connection:
        yield Raw(connection)


def answered(received: bytes) -> tuple[int, JsonObject]:
    """Status and error of the one answer that was received, which must close the connection."""
    head, _, body = received.partition(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")
    assert "connection: close" in lines
    assert "content-type: application/json" in lines
    assert f"content-length: {len(body)}" in lines
    error: JsonObject = json.loads(body)["error"]
    assert error.keys() >= {"message", "type", "param", "code"}
    return int(lines[0].split()[1]), error


@asynccontextmanager
async def beside_a_stream(server: RunningServer) -> AsyncIterator[None]:
    """Another client's stream runs through the block, and ends whole."""
    async with connect(server) as client, anyio.create_task_group() as tasks:
        begun = anyio.Event()

        async def other() -> None:
            read = await stream(client, chat("a", words(150)), begun)
            assert (read.done, read.text) == (True, words(150))

        tasks.start_soon(other)
        await begun.wait()
        yield


async def test_a_request_that_is_not_sent_in_time_is_cut(server: StartServer, subtests: pytest.Subtests) -> None:
    """Whether nothing comes, a byte now and then, or all but the end; before, in and behind the headers."""
    running = server({"a": PACE}, server={"request_head_seconds": SOON, "request_body_seconds": SOON})
    post = f"POST {CHAT} HTTP/1.1\r\n".encode() + HOST + b"Content-Type: application/json\r\nContent-Length: 99\r\n\r\n"
    chunked = post.replace(b"Content-Length: 99", b"Transfer-Encoding: chunked")
    #        sent at once, then again and again, the status of the answer (None: no word)
    cases: dict[str, tuple[bytes, bytes, int | None]] = {
        "nothing": (b"", b"", None),
        "empty lines": (b"", b"\r\n", 408),
        "half a request line": (b"POST /v1", b"", 408),
        "a header that never ends": (GET + b"X-Slow: ", b"x", 408),
        "header after header": (GET, b"X-Slow: y\r\n", 408),
        "no end of the headers": (GET, b"", 408),
        "no body": (post, b"", 408),
        "a body byte by byte": (post + b'{"model": "', b"a", 408),
        "a body in chunks": (chunked, b"1\r\nx\r\n", 408),
        "a body of a request that was refused": (post.replace(CHAT.encode(), b"/v1/nowhere"), b"z", 404),
    }
    async with beside_a_stream(running), anyio.create_task_group() as tasks:

        async def attempt(name: str, at_once: bytes, again: bytes, status: int | None) -> None:
            async with raw(running) as client, anyio.create_task_group() as writing:
                started = time.monotonic()
                await client.send(at_once)
                if again:
                    writing.start_soon(client.dribble, again, 0.02)
                received = await client.rest()
                took = time.monotonic() - started
                writing.cancel_scope.cancel()
            with subtests.test(name):
                assert SOON * 0.9 < took < BOUND
                if status is None:
                    assert received == b""
                elif status == 408:
                    found, error = answered(received)
                    assert (found, error["code"]) == (408, "request_timeout")
                else:
                    assert received.startswith(f"HTTP/1.1 {status} ".encode())

        for name, case in cases.items():
            tasks.start_soon(attempt, name, *case)


async def test_times_are_for_clients_not_for_answers(server: StartServer) -> None:
    """An answer that takes longer than any of the limits is not cut, whatever the client sends behind its request."""
    limits = {"request_head_seconds": 0.2, "request_body_seconds": 0.2, "keep_alive_seconds": 0.2}
    running = server({"a": PACE}, server=limits)
    body = json.dumps(chat("a", words(100), stream=True)).encode()
    request = b"POST %b HTTP/1.1\r\n%bContent-Length: %d\r\n\r\n%b" % (CHAT.encode(), HOST, len(body), body)
    for behind in (b"", b"\r\n", GET + b"X-Half: ", request[:-10]):
        async with raw(running) as client:
            await client.send(request + behind)
            received = await client.rest()
        assert b"data: [DONE]\n\n" in received, behind


async def test_an_idle_connection_serves_again_until_its_time_is_up(server: StartServer) -> None:
    """Within the time another request is answered; after it the connection is closed without a word."""
    running = server({"a": PACE}, server={"keep_alive_seconds": 1.0})
    async with raw(running) as client:
        started = time.monotonic()
        await client.send(GET + b"\r\n")
        await anyio.sleep(0.3)
        await client.send(GET + b"\r\n")
        received = await client.rest()
    assert received.count(b"HTTP/1.1 200 OK") == 2
    assert 1.2 < time.monotonic() - started < BOUND


async def test_a_large_head_is_refused(server: StartServer, subtests: pytest.Subtests) -> None:
    """431 for one endless header, for many, for a long path; just below the limits a request is served."""
    running = server({"a": PACE})
    cases = {
        "an endless header": (GET + b"X-Large: " + b"x" * 40_000, 431),
        "an endless header in pieces": (GET + b"X-Large: " + b"x" * 33_000 + b"\r\n\r\n", 431),
        "too many": (GET + b"".join(b"X-%d: y\r\n" % number for number in range(100)) + b"\r\n", 431),
        "a long path": (b"GET /" + b"p" * 33_000, 431),
        "rubbish": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        "two hosts": (GET + HOST + b"Connection: close\r\n\r\n", 400),
        "no host": (b"GET /v1/models HTTP/1.1\r\nConnection: close\r\n\r\n", 400),
        "two lengths": (GET + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
    }
    async with beside_a_stream(running):
        for name, (data, status) in cases.items():
            async with raw(running) as client:
                await client.send(data)
                received = await client.rest()
            with subtests.test(name):
                assert answered(received)[0] == status
        many = b"".join(b"X-%d: %b\r\n" % (number, b"y" * 300) for number in range(97))
        async with raw(running) as client:
            await client.send(GET + many + b"Connection: close\r\n\r\n")
            assert (await client.rest()).startswith(b"HTTP/1.1 200 OK")


async def test_what_frames_a_body_is_bounded(server: StartServer, subtests: pytest.Subtests) -> None:
    """431 for endless trailers and extensions of chunks; those of a sane size are overlooked, whatever they say."""
    running = server({"a": PACE})
    post = b"POST %b HTTP/1.1\r\n%bTransfer-Encoding: chunked\r\n\r\n" % (CHAT.encode(), HOST)
    body = json.dumps(chat("a", "hello")).encode()
    whole = post + b"%x;a=b\r\n%b\r\n0\r\n" % (len(body), body)
    endless = {
        "a trailer": (whole + b"X-Large: ", b"x" * 1000),
        "trailers": (whole, b"X-Many: " + b"x" * 1000 + b"\r\n"),
        "an extension": (post + b"1;", b"x" * 1000),
    }
    for name, (at_once, again) in endless.items():
        async with raw(running) as client, anyio.create_task_group() as writing:
            await client.send(at_once)
            writing.start_soon(client.dribble, again, 0.005, len(again))
            received = await client.rest()
            writing.cancel_scope.cancel()
        with subtests.test(name):
            assert answered(received)[0] == 431
    for name, trailer in {"a host": b"Host: evil.example", "any": b"X-Any: x"}.items():
        async with raw(running) as client:
            await client.send(whole + trailer + b"\r\n\r\n")
            received = await client.some()
        with subtests.test(name):
            assert received.startswith(b"HTTP/1.1 200 OK")


async def test_an_answer_before_the_end_of_its_request_is_the_only_one(
    server: StartServer, subtests: pytest.Subtests
) -> None:
    """Whether the rest comes, breaks off or is no HTTP; and then the connection ends like any other."""
    running = server({"a": PACE}, server={"request_body_seconds": SOON, "keep_alive_seconds": SOON})
    head = b"POST /v1/nowhere HTTP/1.1\r\n" + HOST
    sized, chunked = head + b"Content-Length: 4\r\n\r\n", head + b"Transfer-Encoding: chunked\r\n\r\n"
    cases = {
        "the rest": (sized, b"rest", 1),
        "half of it": (sized, b"re", 1),
        "no chunk": (chunked, b"zz\r\n", 1),
        "the rest and another request": (sized, b"rest" + GET + b"\r\n", 2),
    }
    for name, (first, then, answers) in cases.items():
        async with raw(running) as client:
            await client.send(first)
            received = await client.some()
            await client.send(then)
            received += await client.rest()
        with subtests.test(name):
            assert received.startswith(b"HTTP/1.1 404 ")
            assert received.count(b"HTTP/1.1 ") == answers


async def test_connections_are_bounded(server: StartServer) -> None:
    """One more than there may be is answered 503 with a time to come back; when one has gone there is room again."""
    running = server({"a": PACE}, server={"max_connections": 3, "keep_alive_seconds": 60})
    async with raw(running) as first, raw(running) as second, raw(running) as third:
        for client in (first, second, third):
            await client.send(GET + b"\r\n")
        async with raw(running) as fourth:
            received = await fourth.rest()
        assert (answered(received)[0], b"retry-after: 1\r\n" in received) == (503, True)
    async with connect(running) as later:
        await until_all_returned(later)
        check_error(await later.get("/v1/nowhere"), 404, None)


async def test_a_slow_reader_costs_little_and_delays_nobody(server: StartServer) -> None:
    """Ten clients who take a byte a second of answers far larger than all buffers.

    The server holds less than their answers, a stream beside them keeps its pace, and the model is free as soon as the
    last token is made.
    """
    answer = " ".join("x" * 1000 for _ in range(8000))
    running = server(
        {"slow": EchoOptions(context_length=20_000), "a": PACE}, server={"max_body_bytes": len(answer) + 1000}
    )
    body = json.dumps(chat("slow", answer, stream=True)).encode()
    request = b"POST %b HTTP/1.1\r\n%bContent-Length: %d\r\n\r\n%b" % (CHAT.encode(), HOST, len(body), body)
    process = psutil.Process(running.pid)
    readers = 10
    async with connect(running) as client, anyio.create_task_group() as tasks:
        # Loads both models, and has one such answer behind it.
        await stream(client, chat("slow", answer))
        await stream(client, chat("a", words(2)))
        before = process.memory_info().rss

        reading: set[socket.socket] = set()

        async def all_read() -> bool:
            return len(reading) == readers

        async def read_slowly() -> None:
            reader = socket.socket()
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.setblocking(False)
            with reader:
                await anyio.to_thread.run_sync(reader.connect_ex, ("127.0.0.1", running.port))
                await anyio.wait_writable(reader)
                sent = 0
                while sent < len(request):
                    await anyio.wait_writable(reader)
                    sent += reader.send(request[sent:])
                while True:
                    await anyio.wait_readable(reader)
                    assert reader.recv(1)
                    reading.add(reader)
                    await anyio.sleep(1)

        for _ in range(readers):
            tasks.start_soon(read_slowly)
        await until(all_read, bool)
        gaps: list[float] = []
        last = time.monotonic()
        async with client.stream("POST", CHAT, json=chat("a", words(100), stream=True)) as response:
            async for _ in response.aiter_bytes():
                gaps.append(time.monotonic() - last)
                last = time.monotonic()
        await until_status(client, lambda shown: depths(shown) == (0, 0))
        held = process.memory_info().rss - before
        tasks.cancel_scope.cancel()
    gaps = sorted(gaps[1:])
    median, worst = gaps[len(gaps) // 2], gaps[-1]
    print(f"{held / readers / 1e6:.1f} MB a reader; gaps: median {median:.4f} s, worst {worst:.3f} s")  # noqa: T201 - a measurement
    assert held < readers * 3 * len(answer), f"{held / 1e6:.0f} MB"
    assert median < 0.05
    assert worst < 1
