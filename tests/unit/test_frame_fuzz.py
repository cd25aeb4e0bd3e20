"""Whatever comes over a worker's pipe, in either direction: each request ends once, and nobody is left waiting.

The seed of a failing talk is in its test's id; LMX_FUZZ_SEED gives another first one.
"""

import asyncio
import os
import random
import socket
import struct
import subprocess
import sys
from typing import Any, Final

import msgspec
import pytest

from opta_lmx.errors import LmxError
from opta_lmx.inference import protocol
from opta_lmx.inference.worker_stream import WorkerStream
from opta_lmx.types import CacheReport, Delta, FinishReason, LoadOptions, SamplingParams, TextPrompt
from tests.worker_peer import FACTS, HELLO, READY, StartTalk, make_talk, next_of

_FIRST_SEED: Final = int(os.environ.get("LMX_FUZZ_SEED", "0"))
_TALKS: Final = 40
_WORKERS: Final = 6
_CHOICES: Final = 2


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch) -> StartTalk:
    return make_talk(monkeypatch)


def _frame(rng: random.Random, ids: list[int]) -> protocol.FromWorker:
    """A frame in good form whose sense is a matter of luck: any of them may come twice, too soon, or for nobody."""
    id = rng.choice([*ids, 10**6, -1])
    finish = rng.choice([None, None, *FinishReason])
    delta = Delta(rng.randint(-1, _CHOICES), rng.choice(["", "a", "é"]), rng.randint(0, 2), finish)
    frames: list[protocol.FromWorker] = [
        protocol.Step(rng.randint(0, 9), 1, 0, [(id, delta), (rng.choice(ids), delta)]),
        protocol.Step(1, 1, 0, []),
        protocol.Started(id, 5, CacheReport()),
        protocol.Refused(id, "invalid", "no"),
        protocol.Failed(id, "broken"),
        protocol.Embedded(id, b"\0" * 8, 2, 1),
        protocol.Ranked(id, [0.5], 1),
        protocol.KvWant(rng.randint(-1, 2**62)),
        protocol.Idle(1, 0, 0),
        protocol.LoadError("late"),
        HELLO,
        READY,
    ]
    return rng.choice(frames)


def _spoil(rng: random.Random, data: bytes) -> bytes:
    """The same with something wrong, often."""
    at = rng.randrange(len(data))
    return rng.choice(
        [
            data,
            data,
            data,
            data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :],
            data[:at],
            data[at:],
            rng.randbytes(rng.randint(1, 40)),
            struct.pack(">I", rng.choice([0, 1, 2**31, 2**32 - 1])) + data,
            struct.pack(">I", 3) + msgspec.msgpack.encode([1, 2]),
        ]
    )


@pytest.mark.parametrize("seed", range(_FIRST_SEED, _FIRST_SEED + _TALKS))
async def test_every_request_ends_once_whatever_the_worker_says(talk: StartTalk, seed: int) -> None:
    """In any pieces; and no callback of the event loop fails over it."""
    rng = random.Random(seed)
    wrong: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: wrong.append(context))
    async with talk() as it:
        await it.load()
        it.client.govern_kv(lambda wanted: wanted or 0)
        asked = [await it.generate(_CHOICES) for _ in range(3)]
        ids, streams = [id for id, _ in asked], [stream for _, stream in asked]
        data = b"".join(_spoil(rng, protocol.encode(_frame(rng, ids))) for _ in range(rng.randint(1, 30)))
        while data:
            size = rng.choice([1, 7, 100, 10_000])
            it.peer.say_bytes(data[:size])
            data = data[size:]
            if rng.random() < 0.3:
                await asyncio.sleep(0)
        if rng.random() < 0.3:
            streams[0].cancel()
        it.peer.hang_up()
        await it.exited()
        for stream in streams:
            await _read_to_the_end(stream)
        assert it.ends == len(streams)
        assert not it.client.busy
    assert not wrong


async def _read_to_the_end(stream: WorkerStream) -> None:
    while True:
        look = await next_of(stream)
        if isinstance(look, LmxError) or not look:
            assert stream.ended
            return


@pytest.mark.parametrize("seed", range(_FIRST_SEED, _FIRST_SEED + _WORKERS))
def test_a_worker_ends_with_words_over_what_it_cannot_read(seed: int) -> None:
    """A real one: it serves what it understands, and a frame that is none ends it; it never lives on deaf."""
    rng = random.Random(seed)
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "opta_lmx.inference.worker", "--echo", "--fd", str(theirs.fileno())]
    with ours, subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE, text=True) as worker:
        theirs.close()
        ours.settimeout(10)
        frames: list[protocol.FromServer] = [protocol.Load("a", "/nowhere", LoadOptions())]
        frames += [_asked(rng, id) for id in range(1, 9)]
        frames += [protocol.Cancel(rng.randint(0, 20)), protocol.KvGrant(rng.randint(-5, 5))]
        ours.sendall(b"".join(map(protocol.encode, frames)))
        ours.sendall(rng.choice([b"\0\0\0\x02\xc1\xc1", b"\xff\xff\xff\xff", b"GET / HTTP/1.1\r\n\r\n"]))
        _, said = worker.communicate(timeout=20)
        # By the reader's border, or with all it was told done: by the hang-up, which is no fault.
        assert worker.returncode == 1
        assert "ProtocolError" in said


def _asked(rng: random.Random, id: int) -> protocol.Generate:
    sampling = SamplingParams(n=rng.randint(1, 3), max_tokens=rng.randint(0, 4), logprobs=rng.choice([None, 0, 3]))
    return protocol.Generate(id, f"req-{id}", TextPrompt("word " * rng.randint(1, 9)), sampling)


def test_facts_are_those_of_a_worker() -> None:
    """What the frames above are made of is what a worker says."""
    assert protocol.decode_from_worker(protocol.encode(READY)[4:]) == READY
    assert READY.facts == FACTS
