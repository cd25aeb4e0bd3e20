"""One connection, bounded: what uvicorn's reading of HTTP leaves open to a client who is slow, large or many.

uvicorn bounds what it holds of a body that nobody reads and of an answer that the client does not take (64 KiB each),
and how long an idle connection stays. It does not bound how long or how large a request's head is, how long a body
takes, how many connections there are, nor how long a client may leave an answer lying. Answers given here come before
any route, in the same shape as the others.
"""

import asyncio
import resource
import socket
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from typing import Any, Final

import msgspec
from httptools import HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from opta_lmx.api.errors import (
    HeadTooLarge,
    RequestTooSlow,
    TooManyConnections,
    UnreadableRequest,
    to_envelope,
)
from opta_lmx.config import ServerConfig
from opta_lmx.monitoring.logging import get_logger

_log = get_logger(__name__)

# nginx takes four buffers of 8 KiB, Apache a hundred fields; no client of ours comes near.
MAX_HEAD_BYTES: Final = 32 * 1024
MAX_HEAD_FIELDS: Final = 100

# Requests read while one before them is being answered. uvicorn reads no further than one, and so does not see the
# client leave; each may bring as much of a body as uvicorn holds.
_REQUESTS_AHEAD: Final = 8

# What the server opens beside connections: a socket, a pipe and a process handle for each worker, files, the log.
_OTHER_OPEN_FILES: Final = 256

# A reader who has taken nothing of what waits for him for so long has gone without saying so.
STALLED_READER_SECONDS: Final = 600.0

# A peer that vanished without a word (a cable, a sleeping laptop) is found out two minutes after its last packet.
_PROBE_AFTER_SECONDS: Final = 60
_PROBE_EVERY_SECONDS: Final = 15
_PROBES: Final = 4
# The same option under the names of Linux and of macOS.
_TCP_KEEPIDLE: Final[int] = getattr(socket, "TCP_KEEPIDLE", None) or socket.TCP_KEEPALIVE  # type: ignore[attr-defined,unused-ignore]


def raise_open_files(connections: int) -> None:
    """Lets this process open as many files as so many connections take; macOS starts at 256.

    A system that permits fewer is told of in the log: what comes beyond them is not even refused.
    """
    wanted = connections + _OTHER_OPEN_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    ceiling = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (ceiling, hard))
        soft = ceiling
    if soft < wanted:
        _log.warning("open_files_limited", limit=soft, wanted=wanted, remedy="raise ulimit -n or lower max_connections")


class _Parser(HttpRequestParser):
    """httptools' parser, for clients who offer to speak another protocol and mean HTTP/1.1 if nobody takes it up.

    Java's HttpClient offers h2c with every first request. httptools takes any such offer for accepted: it skips the
    body and stops.
    """

    def __init__(self, connection: "Connection") -> None:
        super().__init__(connection)
        self.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
        self._connection = connection

    def feed_data(self, data: Any) -> None:
        """Parse on; raises what httptools raises, HttpParserUpgrade only where the offer is accepted."""
        try:
            super().feed_data(data)
        except HttpParserUpgrade as offer:
            if self._connection.accepts_upgrade():
                raise
            [parsed] = offer.args
            self._connection.decline_upgrade(data[parsed:])


class Connection(HttpToolsProtocol):
    """uvicorn's protocol with a time for every phase in which the client has the word, and a size for the head.

    A connection is in its *head* from its beginning, or from the first byte after an answer, until the headers are
    complete; in its *body* until that is complete; otherwise the server has the word.
    """

    def __init__(
        self,
        *args: Any,
        limits: Callable[[], ServerConfig],
        stalled_seconds: float = STALLED_READER_SECONDS,
        **kwargs: Any,
    ) -> None:
        """``limits`` are those of the moment: read anew for each phase."""
        super().__init__(*args, **kwargs)
        self.parser = _Parser(self)
        # While a parser is told what it would know if it had not stopped.
        self._reminding = False
        self._limits = limits
        self._stalled_seconds = stalled_seconds
        # uvicorn's ``cycle`` is the last request read; of several sent at once, this is the one being answered.
        self._turn: RequestResponseCycle | None = None
        self._in_head = False
        self._in_body = False
        # Of a head; or of what frames a body (sizes and extensions of chunks, trailers) since its last piece.
        self._head_bytes = 0
        self._got_on = False
        self._deadline: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, if there is room for it."""
        super().connection_made(transport)
        self.timeout_keep_alive = self._limits().keep_alive_seconds  # type: ignore[assignment]  # used as a float is
        _probe(transport)
        if len(self.connections) > self._limits().max_connections:
            self._refuse(TooManyConnections())
            return
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """No timer outlives the connection, and no answer goes on for nobody."""
        for timer in (self._deadline, self._stall):
            if timer is not None:
                timer.cancel()
        self._unset_keepalive_if_required()
        if self._turn is not None and not self._turn.response_complete:
            self._turn.disconnected = True
            self._turn.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on; a head, or a body's framing, that has grown too large without being complete ends the connection."""
        if self.transport.is_closing():
            return
        if self._deadline is None and not self._answering:
            self._begin_head()
        self._got_on = False
        super().data_received(data)
        if self._in_head or (self._in_body and not self._got_on):
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self._refuse(HeadTooLarge(MAX_HEAD_BYTES, MAX_HEAD_FIELDS))

    def send_400_response(self, msg: str) -> None:
        """What the parser does not understand, or what was too large for it, in the shape of every other error."""
        if self._head_is_too_large():
            self._refuse(HeadTooLarge(MAX_HEAD_BYTES, MAX_HEAD_FIELDS))
        else:
            self._refuse(UnreadableRequest(msg))

    # -- callbacks of the parser -------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A request begins."""
        if self._reminding:
            return
        self._unset_keepalive_if_required()
        self._begin_head()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A piece of the request's target."""
        if not self._reminding:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One field. Those behind the body come too late to be checked, and are nothing we know: they are dropped."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is there; now the body, for which there is a time too."""
        if self._reminding:
            return
        if self._head_is_too_large():
            # Ends the parsing; what is said of it is ``send_400_response``'s.
            raise HeadTooLarge(MAX_HEAD_BYTES, MAX_HEAD_FIELDS)
        self._in_head = False
        self._framing_ended()
        self._wait_for_client(self._limits().request_body_seconds)
        super().on_headers_complete()
        self._in_body = True
        if 0 < len(self.pipeline) <= _REQUESTS_AHEAD:
            self.flow.resume_reading()

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._framing_ended()
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The server has the word, unless the parser has only skipped a body that is still to come."""
        if self.parser.should_upgrade() and not self.accepts_upgrade() and self._body_framing():
            return
        self._in_body = False
        self._stop_waiting()
        super().on_message_complete()
        if not self._answering:
            # The answer came before the whole request. uvicorn has counted the rest as the client's next word.
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    # -- offers of another protocol ----------------------------------------------------------------

    def accepts_upgrade(self) -> bool:
        """True for WebSocket, if the server has it."""
        return self._should_upgrade()

    def decline_upgrade(self, rest: bytes) -> None:
        """Go on as if no offer had been made, with what followed the head."""
        self.parser = _Parser(self)
        if framing := self._body_framing():
            self._reminding = True
            self.parser.feed_data(b"POST / HTTP/1.1\r\n" + framing + b"\r\n\r\n")
            self._reminding = False
        if rest:
            self.parser.feed_data(rest)

    def _body_framing(self) -> bytes:
        """The field that says how long the request's body is; empty if it has none."""
        framings = [(name, value) for name, value in self.headers if name in (b"transfer-encoding", b"content-length")]
        return next((name + b": " + value for name, value in sorted(framings, reverse=True) if value != b"0"), b"")

    # -- answers -----------------------------------------------------------------------------------

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._turn = cycle
        super()._start_asgi_task(cycle, app)

    def pause_writing(self) -> None:
        """The client takes less than the server has for it."""
        super().pause_writing()
        self._watch_reader(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """It has taken nearly all."""
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
        super().resume_writing()

    # ----------------------------------------------------------------------------------------------

    @property
    def _answering(self) -> bool:
        # uvicorn's annotations leave out that there is no request yet.
        return self.cycle is not None and not self.cycle.response_complete  # type: ignore[redundant-expr]

    def _head_is_too_large(self) -> bool:
        if not self._in_head or self.headers is None:
            return False
        # Each field comes with a colon, a space and a line's end.
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        return size > MAX_HEAD_BYTES or len(self.headers) > MAX_HEAD_FIELDS

    def _begin_head(self) -> None:
        if not self._in_head:
            self._in_head = True
            self._head_bytes = 0
            self._wait_for_client(self._limits().request_head_seconds)

    def _framing_ended(self) -> None:
        self._head_bytes = 0
        self._got_on = True

    def _wait_for_client(self, seconds: float) -> None:
        self._stop_waiting()
        self._deadline = self.loop.call_later(seconds, self._waited, seconds)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _waited(self, seconds: float) -> None:
        """The client had its time. Where the server itself held it up, or still answers, it gets as much again."""
        self._deadline = None
        if self.transport.is_closing():
            return
        if self.flow.read_paused or self.pipeline or (self._in_head and self._answering):
            self._wait_for_client(seconds)
        elif self._head_bytes == 0 and self._in_head:
            # Nothing was asked, so there is nothing to answer.
            self.transport.close()
        else:
            self._refuse(RequestTooSlow(seconds))

    def _refuse(self, error: Exception) -> None:
        """Answer, if an answer can still be taken for this request's, and close."""
        self._stop_waiting()
        if self._may_answer():
            status, body, headers = to_envelope(error)
            content = msgspec.json.encode(body)
            headers |= {
                "content-type": "application/json",
                "content-length": str(len(content)),
                "connection": "close",
            }
            lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *(f"{k}: {v}" for k, v in headers.items())]
            self.transport.write("\r\n".join([*lines, "", ""]).encode("latin-1") + content)
        self.transport.close()

    def _may_answer(self) -> bool:
        """False where the request being read has its answer, or one to it or to one before it is under way."""
        if self._answering:
            return not (self._in_head or self.pipeline or self.cycle.response_started)
        return not self._in_body

    def _watch_reader(self, before_bytes: int) -> None:
        self._stall = self.loop.call_later(self._stalled_seconds, self._reader_waited, before_bytes)

    def _reader_waited(self, before_bytes: int) -> None:
        now_bytes = self.transport.get_write_buffer_size()
        if now_bytes < before_bytes:
            self._watch_reader(now_bytes)
        else:
            self.transport.abort()


def _probe(transport: asyncio.BaseTransport) -> None:
    """Has the system ask now and then whether the peer of a silent connection is still there."""
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, _TCP_KEEPIDLE, _PROBE_AFTER_SECONDS)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_EVERY_SECONDS)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
