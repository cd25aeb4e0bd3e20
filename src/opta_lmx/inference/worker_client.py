"""The server's side of one worker process: start it, speak with it, notice its end, stop it.

Everything happens in callbacks of the event loop, so no task has to be owned for a pipe: bytes arrive, frames are
dispatched, and whoever waits is woken. A worker's end is one event, told once both its socket and its process are done.
"""

import asyncio
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import cast

from opta_lmx.errors import (
    Busy,
    ContextTooLong,
    GenerationFailed,
    InvalidRequest,
    LmxError,
    LoadFailed,
    UnsupportedParameter,
    WorkerLost,
)
from opta_lmx.inference import protocol
from opta_lmx.inference.worker_outbox import Outbox
from opta_lmx.inference.worker_reply import WorkerReply
from opta_lmx.inference.worker_stream import WorkerStream
from opta_lmx.manager.catalog import is_encoder
from opta_lmx.monitoring.logging import get_logger
from opta_lmx.types import Encoded, GenerateRequest, LoadOptions, ModelFacts, ModelFiles, TextPrompt, WorkerExit

# Imports take 2 s on an idle machine; under a full test run on two cores they have taken 20.
_HELLO_SECONDS = 120.0
# A 400 GB model from a slow disk (1 GB/s) needs 400 s.
_LOAD_SECONDS = 900.0
# Between SIGTERM and SIGKILL.
_TERM_SECONDS = 2.0
# Memory comes back when other models' requests end, which takes seconds rather than milliseconds.
_MEMORY_RETRY_SECONDS = 5.0
_STDERR_TAIL_LINES = 20
_STDERR_LINE_BYTES = 2000

# Stands where an encoded prompt will.
_NO_PROMPT = TextPrompt("")

_log = get_logger("worker_client")


class WorkerClient(asyncio.Protocol):
    """A worker process. Made by ``start``; becomes useful with ``load``; ends with ``stop`` or by itself."""

    def __init__(self) -> None:
        self.model_id = "spare"
        self.progress = 0
        self.depths = (0, 0)
        self._process: _Process | None = None
        self._outbox: Outbox | None = None
        self._splitter = protocol.FrameSplitter()
        self._streams: dict[int, WorkerStream] = {}
        self._replies: dict[int, WorkerReply] = {}
        # Of the streams, as their clients know them.
        self._request_ids: dict[int, str] = {}
        self._next_id = 1
        self._facts: ModelFacts | None = None
        self._on_exit: Callable[[WorkerExit], None] | None = None
        self._decide_kv: Callable[[int | None], int] = lambda wanted: wanted or 0
        self._stopping = False
        self._killed_for: str | None = None
        self._socket_lost = False
        loop = asyncio.get_running_loop()
        self._hello: asyncio.Future[None] = loop.create_future()
        self._loaded: asyncio.Future[None] = loop.create_future()
        self._gone: asyncio.Future[WorkerExit] = loop.create_future()

    @classmethod
    async def start(cls, *, echo: bool) -> "WorkerClient":
        """Start a process; it imports its backend while the caller does other things."""
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        client = cls()
        # -P: no file in the directory the server was started from takes the place of a package.
        arguments = [sys.executable, "-P", "-m", "opta_lmx.inference.worker", "--fd", str(theirs.fileno())]
        try:
            transport, process = await loop.subprocess_exec(
                lambda: _Process(client),
                *arguments,
                *(["--echo"] if echo else []),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # a terminal's Ctrl-C reaches the server alone
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
            )
        finally:
            theirs.close()
        process.transport = transport
        client._process = process
        await loop.connect_accepted_socket(lambda: client, ours)
        return client

    @property
    def pid(self) -> int:
        """Process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def facts(self) -> ModelFacts:
        """What the worker said of its model; only after ``load``."""
        assert self._facts is not None
        return self._facts

    @property
    def request_ids(self) -> list[str]:
        """The generations it works on, as their clients know them."""
        return [*self._request_ids.values()]

    @property
    def busy(self) -> bool:
        """True while a request is with it."""
        return bool(self._streams or self._replies)

    @property
    def alive(self) -> bool:
        """False once its end was noticed."""
        return not self._gone.done()

    async def load(self, files: ModelFiles, options: LoadOptions, on_exit: Callable[[WorkerExit], None]) -> None:
        """Load a model; raises LoadFailed, and then the process has gone. ``on_exit`` is for ends after that."""
        self.model_id = files.id
        try:
            async with asyncio.timeout(_HELLO_SECONDS):
                await self._until(self._hello)
            self._send(protocol.Load(files.id, str(files.path), options, is_encoder(files)))
            async with asyncio.timeout(_LOAD_SECONDS):
                await self._until(self._loaded)
        except TimeoutError as error:
            await self.stop(0)
            raise LoadFailed(files.id, "the worker did not become ready in time") from error
        except BaseException:
            await self.stop(0)
            raise
        self._on_exit = on_exit

    def govern_kv(self, decide: Callable[[int | None], int]) -> None:
        """Who answers the worker's wishes for KV memory, in bytes; None says that it has gone idle."""
        self._decide_kv = decide

    def generate(self, request: GenerateRequest, on_end: Callable[[], None]) -> WorkerStream:
        """Send a request; raises WorkerLost if the process has gone."""
        id = self._new_id()

        def end() -> None:
            del self._streams[id], self._request_ids[id]
            on_end()

        stream = WorkerStream(request.sampling.n, lambda: self._send(protocol.Cancel(id)), end)
        self._streams[id], self._request_ids[id] = stream, request.request_id
        prompt, structured = request.prompt, request.structured
        frame = protocol.Generate(
            id,
            request.request_id,
            _NO_PROMPT if isinstance(prompt, Encoded) else prompt,
            request.sampling,
            None if isinstance(structured, Encoded) else structured,
            request.context_length,
            request.tool_format,
            request.reasoning_format,
        )
        parts = {"prompt": prompt, "structured": structured}
        if encoded := {name: part for name, part in parts.items() if isinstance(part, Encoded)}:
            self._send_pieces(protocol.encode_around(frame, **encoded))
        else:
            self._send(frame)
        return stream

    def ask(self, frame: Callable[[int], protocol.Embed | protocol.Rank], on_end: Callable[[], None]) -> WorkerReply:
        """Send what ``frame`` makes of an id; raises WorkerLost if the process has gone."""
        id = self._new_id()

        def end() -> None:
            del self._replies[id]
            on_end()

        reply = WorkerReply(lambda: self._send(protocol.Cancel(id)), end)
        self._replies[id] = reply
        self._send(frame(id))
        return reply

    def _new_id(self) -> int:
        if not self.alive or self._socket_lost:
            raise WorkerLost(self.model_id, "it had already ended")
        id, self._next_id = self._next_id, self._next_id + 1
        return id

    async def stop(self, grace_seconds: float) -> None:
        """1 ask, 2 SIGTERM to its group after the grace, 3 SIGKILL, 4 reap. Safe to call twice."""
        self._stopping = True
        if grace_seconds > 0 and self.alive:
            self._send(protocol.Stop())
            if await self._gone_within(grace_seconds):
                return
        for number, seconds in ((signal.SIGTERM, _TERM_SECONDS), (signal.SIGKILL, None)):
            self._signal(number)
            if await self._gone_within(seconds):
                return

    def kill(self, reason: str) -> None:
        """End the process at once; ``reason`` is what its exit then says."""
        self._killed_for = reason
        self._signal(signal.SIGKILL)

    async def _gone_within(self, seconds: float | None) -> bool:
        done, _ = await asyncio.wait([self._gone], timeout=seconds)
        return bool(done)

    async def _until(self, event: asyncio.Future[None]) -> None:
        """Wait for a frame or for the end, whichever comes first."""
        await asyncio.wait((event, self._gone), return_when=asyncio.FIRST_COMPLETED)
        if event.done():
            event.result()
            return
        raise LoadFailed(self.model_id, f"the worker ended while loading ({self._gone.result()})", crashed=True)

    def _send(self, frame: protocol.FromServer) -> None:
        self._send_pieces([protocol.encode(frame)])

    def _send_pieces(self, pieces: list[bytes]) -> None:
        if self._outbox is not None:
            self._outbox.send(pieces)

    def _signal(self, number: int) -> None:
        if self.alive:
            with suppress(ProcessLookupError):  # it ended between the look and the signal; the event is on its way
                os.killpg(self.pid, number)

    # -- callbacks of the event loop ---------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is up."""
        self._outbox = Outbox(cast("asyncio.Transport", transport))

    def pause_writing(self) -> None:
        """The worker reads more slowly than we write."""
        assert self._outbox is not None
        self._outbox.pause()

    def resume_writing(self) -> None:
        """It has caught up."""
        assert self._outbox is not None
        self._outbox.resume()

    def data_received(self, data: bytes) -> None:
        """Dispatch every complete frame."""
        try:
            for body in self._splitter.feed(data):
                self._dispatch(protocol.decode_from_worker(body))
        except protocol.ProtocolError as error:
            _log.error("worker_frame_refused", model=self.model_id, pid=self.pid, reason=str(error))
            self._signal(signal.SIGKILL)

    def connection_lost(self, exc: Exception | None) -> None:
        """The worker closed its end: it is dead or as good as dead."""
        self._socket_lost = True
        if self._outbox is not None:
            self._outbox.close()
        self._signal(signal.SIGKILL)
        self._finish_if_done()

    def process_ended(self) -> None:
        """The process was reaped and its stderr read to the end."""
        self._finish_if_done()

    def _dispatch(self, frame: protocol.FromWorker) -> None:
        self.progress += not isinstance(frame, protocol.KvWant)
        if isinstance(frame, protocol.Step):
            self.depths = (frame.running, frame.waiting)
            streams = self._streams
            for id, delta in frame.deltas:
                if (stream := streams.get(id)) is not None:
                    stream.push(delta)
        elif isinstance(frame, protocol.Idle):
            self.depths = (0, 0)
            self._decide_kv(None)
        elif isinstance(frame, protocol.KvWant):
            self._send(protocol.KvGrant(self._decide_kv(frame.bytes)))
        elif isinstance(frame, protocol.Hello):
            self._greet(frame)
        elif isinstance(frame, protocol.Ready | protocol.LoadError):
            self._finish_load(frame)
        elif isinstance(frame, protocol.Embedded | protocol.Ranked):
            if (reply := self._replies.get(frame.id)) is not None:
                reply.finish(frame)
        else:
            self._answer(frame)

    def _greet(self, frame: protocol.Hello) -> None:
        if frame.version != protocol.VERSION:
            raise protocol.ProtocolError(f"the worker speaks version {frame.version}, not {protocol.VERSION}")
        if self._hello.done():
            raise protocol.ProtocolError("the worker greets again")
        self._hello.set_result(None)

    def _finish_load(self, frame: protocol.Ready | protocol.LoadError) -> None:
        if self._loaded.done():
            raise protocol.ProtocolError("the worker tells again what became of its load")
        if isinstance(frame, protocol.Ready):
            self._facts = frame.facts
            self._loaded.set_result(None)
        else:
            self._loaded.set_exception(LoadFailed(self.model_id, frame.reason))

    def _answer(self, frame: protocol.Started | protocol.Refused | protocol.Failed) -> None:
        stream = self._streams.get(frame.id)
        if isinstance(frame, protocol.Started):
            if stream is not None:
                stream.began(frame)
        elif (asked := stream or self._replies.get(frame.id)) is not None:
            if isinstance(frame, protocol.Failed):
                asked.fail(GenerationFailed(f"The model could not finish this answer: {frame.message}"))
            else:
                asked.fail(_refusal(frame))

    def _finish_if_done(self) -> None:
        process = self._process
        if process is None or not (self._socket_lost and process.ended) or self._gone.done():
            return
        exit = WorkerExit(self.pid, process.exit_code, process.stderr_tail, self._stopping, self._killed_for)
        self._gone.set_result(exit)
        # Its owner learns first: leases given back by the streams are then those of a worker known to be dead.
        if self._on_exit is not None:
            self._on_exit(exit)
        everyone: list[WorkerStream | WorkerReply] = [*self._streams.values(), *self._replies.values()]
        for asked in everyone:
            asked.fail(WorkerLost(self.model_id, str(exit)))


class _Process(asyncio.SubprocessProtocol):
    """Collects a worker's last words and its exit code."""

    def __init__(self, client: WorkerClient) -> None:
        self.transport: asyncio.SubprocessTransport | None = None
        self.ended = False
        self._client = client
        self._partial = b""
        self._lines: deque[str] = deque(maxlen=_STDERR_TAIL_LINES)

    @property
    def pid(self) -> int:
        assert self.transport is not None
        return self.transport.get_pid()

    @property
    def exit_code(self) -> int | None:
        """Negative for a signal, as in subprocess."""
        assert self.transport is not None
        return self.transport.get_returncode()

    @property
    def stderr_tail(self) -> str:
        return "\n".join(self._lines)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        """Pass whole lines of stderr on to the log, and keep the last ones."""
        *lines, self._partial = (self._partial + data).split(b"\n")
        if len(self._partial) > _STDERR_LINE_BYTES:
            lines, self._partial = [*lines, self._partial], b""
        for line in lines:
            self._keep(line)

    def connection_lost(self, exc: Exception | None) -> None:
        """The process was reaped and its pipes are closed."""
        if self._partial:
            self._keep(self._partial)
        self.ended = True
        self._client.process_ended()

    def _keep(self, line: bytes) -> None:
        text = line[:_STDERR_LINE_BYTES].decode("utf-8", "replace").rstrip()
        if text:
            self._lines.append(text)
            _log.info("worker_stderr", model=self._client.model_id, line=text, request_ids=self._client.request_ids)


def _refusal(frame: protocol.Refused) -> LmxError:
    if frame.kind == "context":
        return ContextTooLong(frame.prompt_tokens, frame.context_length, param=frame.param or "messages")
    if frame.kind == "memory":
        return Busy(frame.message, retry_after_seconds=_MEMORY_RETRY_SECONDS)
    if frame.kind == "unsupported":
        return UnsupportedParameter(frame.message, param=frame.param)
    return InvalidRequest(frame.message, param=frame.param, code=frame.code)
