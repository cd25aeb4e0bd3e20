"""A worker process whose words are a test's: a client with its real socketpair, and a relay in the worker's place.

The relay is a real process that hands every byte on to the test and back, and ends as the test wants it to.
"""

import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pytest

from opta_lmx.errors import LmxError
from opta_lmx.inference import protocol
from opta_lmx.inference.worker_client import WorkerClient
from opta_lmx.inference.worker_stream import WorkerStream
from opta_lmx.types import (
    Delta,
    GenerateRequest,
    LoadOptions,
    ModelFacts,
    SamplingParams,
    TextPrompt,
    WorkerExit,
)
from tests.fake_workers import model_files

FACTS = ModelFacts("llama", 4096, 32000, 1000, 64, has_chat_template=True)
HELLO = protocol.Hello(protocol.VERSION, 1)
READY = protocol.Ready(FACTS, 0.1, 1000)

# No talk takes a tenth of it.
TALK_SECONDS = 10

# A process that passes bytes on between the server's socket and the test's until the test hangs up, then ends as told.
RELAY = """\
#!{python} -SEs
import os, select, signal, socket, sys
inner = socket.socket(fileno=int(sys.argv[sys.argv.index("--fd") + 1]))
outer = socket.socket(socket.AF_UNIX)
outer.connect({path!r})

def relay():
    while True:
        for ready in select.select([inner, outer], [], [])[0]:
            data = ready.recv(65536)
            if not data:
                return
            (outer if ready is inner else inner).sendall(data)

try:
    relay()
except OSError:
    pass
{ending}
"""


# Python that writes a line to standard error.
SAY = "os.write(2, b'%s\\n')"


class Peer(asyncio.Protocol):
    """The worker's end of the pipe, in the test's hands."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.connected: asyncio.Future[None] = loop.create_future()
        self._frames: asyncio.Queue[protocol.FromServer] = asyncio.Queue()
        self._splitter = protocol.FrameSplitter()
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self.connected.set_result(None)

    def data_received(self, data: bytes) -> None:
        for body in self._splitter.feed(data):
            self._frames.put_nowait(protocol.decode_from_server(body))

    def say(self, *frames: protocol.FromWorker) -> None:
        self.say_bytes(b"".join(map(protocol.encode, frames)))

    def say_bytes(self, data: bytes) -> None:
        """Nobody hears it once the client has hung up."""
        if not self._transport.is_closing():
            self._transport.write(data)

    def hang_up(self) -> None:
        """The process does what it was told to do at its end."""
        self._transport.close()

    async def hear(self) -> protocol.FromServer:
        """The next frame from the server."""
        return await self._frames.get()


@dataclass
class Talk:
    """A client and its peer, with everything the client has told others."""

    client: WorkerClient
    peer: Peer
    exits: list[WorkerExit] = field(default_factory=list)
    ends: int = 0

    async def load(self) -> None:
        """Loads a model of the peer's."""
        self.peer.say(HELLO, READY)
        await self.client.load(model_files("a"), LoadOptions(), self.exits.append)
        assert isinstance(await self.peer.hear(), protocol.Load)

    async def generate(self, choices: int = 1) -> tuple[int, WorkerStream]:
        """Sends a request; the id it has on the pipe, and its stream."""
        stream = self.client.generate(request(choices), self._end)
        frame = await self.peer.hear()
        assert isinstance(frame, protocol.Generate)
        return frame.id, stream

    async def exited(self) -> WorkerExit:
        """The one exit the client has told of."""
        while not self.exits:  # noqa: ASYNC110 - the client tells of it by a plain call
            await asyncio.sleep(0.001)
        [exit] = self.exits
        return exit

    def _end(self) -> None:
        self.ends += 1


def request(choices: int = 1) -> GenerateRequest:
    return GenerateRequest("req", "a", TextPrompt("x"), SamplingParams(n=choices))


def step(*deltas: tuple[int, Delta], steps: int = 1) -> protocol.Step:
    return protocol.Step(steps, 1, 0, list(deltas))


def write_relay(directory: Path, path: str, ending: str) -> str:
    """The program that stands in for Python when the client starts its worker."""
    program = directory / "relay"
    program.write_text(RELAY.format(python=sys.executable, path=path, ending=ending))
    program.chmod(0o700)
    return str(program)


class StartTalk(Protocol):
    """Starts a client; its process ends by ``ending`` (Python, in the relay) when the peer hangs up."""

    def __call__(self, ending: str = "os._exit(0)") -> AbstractAsyncContextManager[Talk]: ...


async def next_of(stream: WorkerStream) -> list[Delta] | LmxError:
    """The next look at a stream, or the error it ended with."""
    try:
        await stream.arrived()
    except LmxError as error:
        return error
    return stream.take()


def make_talk(monkeypatch: pytest.MonkeyPatch) -> StartTalk:
    """Starts talks; ``monkeypatch`` puts the relay in Python's place while a client starts its process."""

    @asynccontextmanager
    async def start(ending: str = "os._exit(0)") -> AsyncIterator[Talk]:
        # Not tmp_path: a socket's path has room for a hundred characters.
        with tempfile.TemporaryDirectory() as name:
            path = f"{name}/s"
            monkeypatch.setattr(sys, "executable", write_relay(Path(name), path, ending))
            peer = Peer()
            server = await asyncio.get_running_loop().create_unix_server(lambda: peer, path)
            client = await WorkerClient.start(echo=True)
            monkeypatch.undo()
            try:
                async with asyncio.timeout(TALK_SECONDS):
                    await peer.connected
                    yield Talk(client, peer)
            finally:
                await client.stop(0)
                server.close()
                assert not client.alive

    return start
