"""A client that costs little: it shares two cores with what it measures.

A connection keeps what arrives and when; everything else (``answer.py``) happens after the clock has stopped.
"""

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Final, cast

_HEAD_END: Final = b"\r\n\r\n"
_LAST_CHUNK: Final = b"\r\n0\r\n\r\n"


@dataclass(slots=True)
class Exchange:
    """One request and what came back: (time, bytes) of every read. Times are ``perf_counter`` seconds.

    ``under_way`` is set at the ``mark``-th read. ``lost`` if the connection ended before the answer did.
    """

    mark: int
    sent_at: float = 0.0
    reads: list[tuple[float, bytes]] = field(default_factory=list)
    under_way: asyncio.Event = field(default_factory=asyncio.Event)
    lost: bool = False

    @property
    def ended_at(self) -> float:
        """When the last byte came; when it was sent if none did."""
        return self.reads[-1][0] if self.reads else self.sent_at


class Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request on it."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._done: asyncio.Future[Exchange] | None = None
        self._left: int | None = None
        """Bytes to come of a body of known length; None for one in chunks."""

    @property
    def is_open(self) -> bool:
        """False once either side has ended it."""
        return self._transport is not None and not self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        # uvloop's transports are not of asyncio's class.
        self._transport = cast(asyncio.Transport, transport)

    def send(self, request: bytes, *, mark: int = 1) -> tuple[Exchange, asyncio.Future[Exchange]]:
        """Starts a request: what grows while the answer comes, and the future that is done when it has come.

        The future never fails: an answer that breaks off is ``lost``.
        """
        assert self._transport is not None
        assert self._done is None or self._done.done()
        self._exchange = exchange = Exchange(mark)
        self._done = done = asyncio.get_running_loop().create_future()
        self._left = None
        exchange.sent_at = perf_counter()
        if self.is_open:
            self._transport.write(request)
        else:
            self.connection_lost(None)
        return exchange, done

    def data_received(self, data: bytes) -> None:
        """Called by the event loop: the hot path of the whole bench."""
        now = perf_counter()
        exchange = self._exchange
        if exchange is None:
            return
        reads = exchange.reads
        reads.append((now, data))
        if len(reads) == exchange.mark:
            exchange.under_way.set()
        if len(reads) == 1:
            self._left = _body_left(data)
        elif self._left is not None:
            self._left -= len(data)
        if self._left == 0 or (self._left is None and _ends_chunks(reads)):
            self._finish()

    def connection_lost(self, _error: Exception | None) -> None:
        """Called by the event loop."""
        if self._exchange is not None:
            self._exchange.lost = True
            self._finish()

    def close(self) -> None:
        """Leaves, as a client does whose user has gone: at once, whatever is still to come."""
        if self._transport is not None:
            self._transport.abort()

    def _finish(self) -> None:
        exchange, self._exchange = self._exchange, None
        assert exchange is not None
        exchange.under_way.set()
        if self._done is not None and not self._done.done():
            self._done.set_result(exchange)


@asynccontextmanager
async def connected(host: str, port: int, count: int) -> AsyncIterator[list[Connection]]:
    """Connections that are open before any clock starts and closed whatever happens; raises OSError."""
    loop = asyncio.get_running_loop()
    connections: list[Connection] = []
    try:
        for _ in range(count):
            _, connection = await loop.create_connection(Connection, host, port)
            connections.append(connection)
        yield connections
    finally:
        for connection in connections:
            connection.close()


async def exchange_all(connections: Sequence[Connection], requests: Sequence[bytes]) -> list[Exchange]:
    """Sends one request on each connection, all at once, and waits for all answers."""
    with no_garbage_collection():
        started = [connection.send(request) for connection, request in zip(connections, requests, strict=True)]
        return [await done for _, done in started]


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keeps the collector's pauses out of what is timed."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _body_left(first: bytes) -> int | None:
    """Bytes still to come of an answer whose first read this is; None if only its chunks will tell."""
    head, found, body = first.partition(_HEAD_END)
    for line in head.split(b"\r\n")[1:] if found else ():
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value) - len(body)
    return None


def _ends_chunks(reads: Sequence[tuple[float, bytes]]) -> bool:
    """True if the last chunk, which is empty, has come; it may come in pieces."""
    last = reads[-1][1]
    if len(last) >= len(_LAST_CHUNK):
        return last.endswith(_LAST_CHUNK)
    return b"".join(data for _, data in reads[-len(_LAST_CHUNK) :]).endswith(_LAST_CHUNK)
