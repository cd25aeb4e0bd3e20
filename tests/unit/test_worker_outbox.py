"""What goes to a worker: in order, at its pace, and never much in one turn of the event loop."""

import asyncio
import socket
from typing import cast

import pytest
from anyio.lowlevel import checkpoint
from hypothesis import given
from hypothesis import strategies as st

from opta_lmx.inference.worker_outbox import Outbox
from tests.fake_workers import run, settle

_MIB = 1024 * 1024


class Pipe(asyncio.Transport):
    """A transport that keeps what it is given, by turns of the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.turns: list[bytes] = []
        self.closing = False
        self._turn_is_new = True

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Add it to this turn's."""
        if self._turn_is_new:
            self.turns.append(b"")
            self._turn_is_new = False
            asyncio.get_running_loop().call_soon(self._end_turn)
        self.turns[-1] += bytes(data)

    def is_closing(self) -> bool:
        """As a test says."""
        return self.closing

    def _end_turn(self) -> None:
        self._turn_is_new = True


async def _until_sent(pipe: Pipe, size: int) -> None:
    async with asyncio.timeout(5):
        while sum(map(len, pipe.turns)) < size:
            await checkpoint()


async def test_a_small_frame_goes_at_once() -> None:
    """A token's latency does not wait for another turn."""
    pipe = Pipe()
    Outbox(pipe).send([b"frame"])
    assert pipe.turns == [b"frame"]


@given(st.lists(st.lists(st.binary(max_size=3).map(lambda seed: seed * 60_000), max_size=4), max_size=6))
def test_frames_stay_whole_and_in_order(frames: list[list[bytes]]) -> None:
    """Whatever their sizes, and never more than 256 KiB in a turn."""

    async def scenario() -> None:
        pipe = Pipe()
        outbox = Outbox(pipe)
        for frame in frames:
            outbox.send(frame)
        wanted = b"".join(b"".join(frame) for frame in frames)
        await _until_sent(pipe, len(wanted))
        assert b"".join(pipe.turns) == wanted
        # Each send is allowed a look of its own while nothing waits; those of this test come in one turn.
        assert all(len(turn) <= 256 * 1024 for turn in pipe.turns[1:])

    run(scenario())


async def test_a_worker_that_does_not_read_is_waited_for() -> None:
    """Between pause and resume nothing is written, and nothing is lost."""
    pipe = Pipe()
    outbox = Outbox(pipe)
    outbox.pause()
    outbox.send([b"a" * _MIB])
    await settle()
    assert pipe.turns == []
    outbox.resume()
    outbox.send([b"b"])
    await _until_sent(pipe, _MIB + 1)
    assert b"".join(pipe.turns) == b"a" * _MIB + b"b"


@pytest.mark.parametrize("closed_by", ["loss", "transport"])
async def test_after_the_end_nothing_is_written(closed_by: str) -> None:
    """What still waited goes nowhere, and what comes later neither."""
    pipe = Pipe()
    outbox = Outbox(pipe)
    outbox.send([b"a" * _MIB])
    outbox.close()
    pipe.closing = closed_by == "transport"
    sent = sum(map(len, pipe.turns))
    if pipe.closing:
        outbox.send([b"late"])
    await settle()
    assert sum(map(len, pipe.turns)) == sent < _MIB


async def test_ten_megabytes_pass_through_a_real_socket() -> None:
    """With the transport's own pauses, all of it arrives, in order."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    loop = asyncio.get_running_loop()
    outboxes: list[Outbox] = []

    class Sender(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            outboxes.append(Outbox(cast("asyncio.Transport", transport)))

        def pause_writing(self) -> None:
            outboxes[0].pause()

        def resume_writing(self) -> None:
            outboxes[0].resume()

        def connection_lost(self, exc: Exception | None) -> None:
            lost.set()

    lost = asyncio.Event()
    transport, _ = await loop.connect_accepted_socket(Sender, ours)
    wanted = bytes(range(256)) * 4096 * 10
    outboxes[0].send([wanted[:1000], wanted[1000:]])
    came = bytearray()
    async with asyncio.timeout(30):
        while len(came) < len(wanted):
            came += await loop.sock_recv(theirs, _MIB)
    assert came == wanted
    transport.close()
    theirs.close()
    await lost.wait()
