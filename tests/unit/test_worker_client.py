"""The server's side of a worker process, against a peer that says what the test says."""

import asyncio
import os
import re
import signal
import struct

import pytest
from structlog.testing import capture_logs

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
from opta_lmx.types import CacheReport, Delta, FinishReason, LoadOptions, WorkerExit
from tests.fake_workers import model_files, settle
from tests.worker_peer import FACTS, HELLO, READY, SAY, StartTalk, make_talk, next_of, request, step

LAST = Delta(0, "", 1, FinishReason.STOP)
GONE = Delta(0, "", 0, FinishReason.CANCELLED)
WORD = Delta(0, "a", 1)
OTHER_WORD = Delta(1, "b", 1)


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch) -> StartTalk:
    return make_talk(monkeypatch)


async def test_a_load_is_asked_for_and_answered(talk: StartTalk) -> None:
    """Once the worker greets it is told what to load; afterwards it is known by its facts and its process."""
    async with talk() as it:
        options = LoadOptions(max_running=7)
        loading = asyncio.get_running_loop().create_task(it.client.load(model_files("a"), options, it.exits.append))
        it.peer.say(HELLO)
        frame = await it.peer.hear()
        assert frame == protocol.Load("a", str(model_files("a").path), options)
        assert not loading.done()
        it.peer.say(READY)
        await loading
        assert it.client.facts == FACTS
        assert it.client.alive
        os.kill(it.client.pid, 0)


@pytest.mark.parametrize(
    ("frames", "ending", "reason"),
    [
        ((HELLO, protocol.LoadError("the weights are sour")), "os._exit(0)", "the weights are sour"),
        ((protocol.Hello(protocol.VERSION + 1, 1),), "os._exit(0)", "SIGKILL"),
        (
            (HELLO,),
            "sys.stderr.write('no more memory'); sys.stderr.flush(); os._exit(3)",
            "exit code 3: no more memory",
        ),
        ((), "os.abort()", "SIGABRT"),
    ],
    ids=["refused", "other-version", "exit", "abort"],
)
async def test_a_load_that_fails_leaves_no_process(
    talk: StartTalk, frames: tuple[protocol.FromWorker, ...], ending: str, reason: str
) -> None:
    """LoadFailed names the model and the reason, the process has been reaped, and no exit is told beside it."""
    async with talk(ending) as it:
        it.peer.say(*frames)
        if frames in ((HELLO,), ()):
            it.peer.hang_up()
        with pytest.raises(LoadFailed, match=re.escape(reason)) as failed:
            await it.client.load(model_files("a"), LoadOptions(), it.exits.append)
        assert failed.value.model_id == "a"
        assert not it.client.alive
        with pytest.raises(ProcessLookupError):
            os.kill(it.client.pid, 0)
        assert it.exits == []


async def test_a_load_that_is_given_up_leaves_no_process(talk: StartTalk) -> None:
    """Whoever cancels a load waits until its process has gone."""
    async with talk() as it:
        it.peer.say(HELLO)
        loading = asyncio.get_running_loop().create_task(
            it.client.load(model_files("a"), LoadOptions(), it.exits.append)
        )
        await it.peer.hear()
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading
        assert not it.client.alive
        assert it.exits == []


async def test_every_request_has_its_own_deltas(talk: StartTalk) -> None:
    """One step serves many; deltas of requests that are over or unknown go nowhere."""
    async with talk() as it:
        await it.load()
        (one, first), (two, second) = await it.generate(), await it.generate(choices=2)
        assert one != two
        it.peer.say(protocol.Started(one, 11, CacheReport(3, 3, "x")), protocol.Started(two, 12, CacheReport()))
        it.peer.say(step((one, WORD), (two, OTHER_WORD), (one + two + 1, WORD), steps=41))
        it.peer.say(step((one, LAST), (two, Delta(1, "", 1, FinishReason.LENGTH))), step((one, WORD)))
        it.peer.say(protocol.Step(43, 1, 2, [(two, LAST)]))
        while not second.ended:
            await second.arrived()
            await settle()
        assert (first.prompt_tokens, first.cache, second.prompt_tokens) == (11, CacheReport(3, 3, "x"), 12)
        assert await next_of(first) == [WORD, LAST]
        assert second.take() == [OTHER_WORD, Delta(1, "", 1, FinishReason.LENGTH), LAST]
        assert it.client.depths == (1, 2)
        assert it.ends == 2


async def test_a_request_crosses_the_pipe_as_it_is(talk: StartTalk) -> None:
    """Everything the worker needs of it, under a number of the pipe's own."""
    async with talk() as it:
        await it.load()
        wanted = request()
        it.client.generate(wanted, lambda: None)
        frame = await it.peer.hear()
        assert isinstance(frame, protocol.Generate)
        assert (frame.request_id, frame.prompt, frame.sampling) == ("req", wanted.prompt, wanted.sampling)


@pytest.mark.parametrize(
    ("refused", "error", "facts"),
    [
        (
            protocol.Refused(1, "context", "", "prompt", None, 70, 64),
            ContextTooLong,
            {"prompt_tokens": 70, "context_length": 64, "param": "prompt", "code": "context_length_exceeded"},
        ),
        (protocol.Refused(1, "context", "", None, None, 70, 64), ContextTooLong, {"param": "messages"}),
        (
            protocol.Refused(1, "unsupported", "no grammar", "response_format"),
            UnsupportedParameter,
            {"param": "response_format", "code": "unsupported_parameter"},
        ),
        (
            protocol.Refused(1, "invalid", "bad id", "logit_bias", "invalid_value"),
            InvalidRequest,
            {"param": "logit_bias", "code": "invalid_value"},
        ),
        (protocol.Refused(1, "memory", "no room for its KV cache"), Busy, {"retry_after_seconds": 5.0}),
    ],
    ids=["context", "context-of-messages", "unsupported", "invalid", "memory"],
)
async def test_a_refusal_keeps_its_kind(
    talk: StartTalk, refused: protocol.Refused, error: type[LmxError], facts: dict[str, object]
) -> None:
    """Each kind of refusal is the error it was in the worker, with its message and its fields; the request is over."""
    async with talk() as it:
        await it.load()
        number, stream = await it.generate()
        assert number == refused.id
        it.peer.say(refused)
        refusal = await next_of(stream)
        assert type(refusal) is error
        assert refused.message in str(refusal)
        assert {name: getattr(refusal, name) for name in facts} == facts
        assert it.ends == 1


async def test_a_request_that_fails_leaves_its_neighbours_alone(talk: StartTalk) -> None:
    """It gets GenerationFailed with the worker's words after what it had; the others go on."""
    async with talk() as it:
        await it.load()
        (one, first), (two, second) = await it.generate(), await it.generate()
        it.peer.say(step((one, WORD)), protocol.Failed(one, "its grammar broke"), step((two, LAST)))
        assert await next_of(second) == [LAST]
        assert await next_of(first) == [WORD]
        failure = await next_of(first)
        assert isinstance(failure, GenerationFailed)
        assert "its grammar broke" in str(failure)
        assert it.ends == 2


async def test_a_cancelled_request_ends_when_the_worker_says_so(talk: StartTalk) -> None:
    """One Cancel frame goes out; the end is the worker's answer, and after it nothing is asked any more."""
    async with talk() as it:
        await it.load()
        number, stream = await it.generate()
        stream.cancel()
        assert await it.peer.hear() == protocol.Cancel(number)
        assert it.ends == 0
        it.peer.say(step((number, GONE)))
        assert await next_of(stream) == [GONE]
        assert it.ends == 1
        stream.cancel()
        it.client.generate(request(), lambda: None)
        assert isinstance(await it.peer.hear(), protocol.Generate)


@pytest.mark.parametrize(
    ("ending", "code", "cause"),
    [
        (f"{SAY % 'one, two'}; {SAY % 'last words'}; os._exit(7)", 7, "exit code 7: last words"),
        ("os.abort()", -signal.SIGABRT, "signal SIGABRT"),
        ("os._exit(0)", 0, "exit code 0"),
        ("inner.close(); signal.pause()", -signal.SIGKILL, "signal SIGKILL"),
    ],
    ids=["exit", "abort", "clean-exit", "closed-and-alive"],
)
async def test_a_worker_that_ends_fails_what_was_open(talk: StartTalk, ending: str, code: int, cause: str) -> None:
    """Every open request gets WorkerLost with how; the exit is told once; a worker that closes its pipe is killed."""
    async with talk(ending) as it:
        await it.load()
        (one, first), (_, second) = await it.generate(), await it.generate(choices=2)
        it.peer.say(step((one, WORD)))
        it.peer.hang_up()
        exit = await it.exited()
        assert (exit.pid, exit.exit_code, exit.expected) == (it.client.pid, code, False)
        assert not it.client.alive
        assert await next_of(first) == [WORD]
        for stream in (first, second):
            lost = await next_of(stream)
            assert isinstance(lost, WorkerLost)
            assert (lost.model_id, lost.cause) == ("a", cause)
        assert it.ends == 2
        with pytest.raises(WorkerLost):
            it.client.generate(request(), lambda: None)


@pytest.mark.parametrize(
    "garbage",
    [
        struct.pack(">I", 3) + b"\xc1\xc1\xc1",
        struct.pack(">I", protocol.MAX_FRAME_BYTES + 1),
        b"GET / HTTP/1.1\r\n\r\n",
    ],
    ids=["no-frame", "too-large", "another-protocol"],
)
async def test_a_worker_that_speaks_garbage_is_killed(talk: StartTalk, garbage: bytes) -> None:
    """Nothing it says can be trusted any more: SIGKILL, and its requests are lost."""
    async with talk("signal.pause()") as it:
        await it.load()
        _, stream = await it.generate()
        it.peer.say_bytes(garbage)
        exit = await it.exited()
        assert (exit.exit_code, exit.expected) == (-signal.SIGKILL, False)
        assert isinstance(await next_of(stream), WorkerLost)
        assert it.ends == 1


async def test_a_frame_may_come_in_pieces(talk: StartTalk) -> None:
    """What one write began another may end."""
    async with talk() as it:
        await it.load()
        number, stream = await it.generate()
        data = protocol.encode(step((number, LAST)))
        it.peer.say_bytes(data[:5])
        await settle()
        it.peer.say_bytes(data[5:])
        assert await next_of(stream) == [LAST]


async def test_a_stop_asks_first(talk: StartTalk) -> None:
    """A worker that ends when asked is not signalled, its exit is expected, and a second stop does nothing."""
    async with talk() as it:
        await it.load()
        stopping = asyncio.get_running_loop().create_task(it.client.stop(5))
        assert await it.peer.hear() == protocol.Stop()
        it.peer.hang_up()
        await stopping
        exit = await it.exited()
        assert (exit.exit_code, exit.expected) == (0, True)
        await it.client.stop(5)
        assert len(it.exits) == 1


async def test_a_worker_that_does_not_stop_is_told_by_signal(talk: StartTalk) -> None:
    """After the grace comes SIGTERM; what it had open is lost."""
    async with talk() as it:
        await it.load()
        _, stream = await it.generate()
        await it.client.stop(0.01)
        exit = await it.exited()
        assert (exit.exit_code, exit.expected) == (-signal.SIGTERM, True)
        assert isinstance(await next_of(stream), WorkerLost)


async def test_the_last_words_are_kept_within_bounds(talk: StartTalk) -> None:
    """The last twenty lines, each cut, whatever their bytes; an endless line without an end costs no memory."""
    words = "b''.join(b'line %d\\n' % n for n in range(50)) + b'x' * 100_000 + b'\\n' + b'bad \\xff end'"
    async with talk(f"sys.stderr.buffer.write({words}); sys.stderr.flush(); os._exit(1)") as it:
        await it.load()
        it.peer.hang_up()
        exit = await it.exited()
    lines = exit.stderr_tail.split("\n")
    assert len(lines) == 20
    assert lines[-1] == "bad \ufffd end"
    assert max(map(len, lines)) <= 2000


async def test_the_last_words_name_the_requests_they_may_be_about(talk: StartTalk) -> None:
    """Each line of a worker's is logged with the ids, as clients know them, of the generations it works on."""
    with capture_logs() as entries:
        async with talk(f"{SAY % 'no more memory'}; os._exit(1)") as it:
            await it.load()
            _, stream = await it.generate()
            assert it.client.request_ids == ["req"]
            it.peer.hang_up()
            await it.exited()
            assert isinstance(await next_of(stream), WorkerLost)
            assert it.client.request_ids == []
    words = [entry for entry in entries if entry["event"] == "worker_stderr"]
    assert [(entry["line"], entry["request_ids"]) for entry in words] == [("no more memory", ["req"])]


async def test_wishes_for_memory_are_answered(talk: StartTalk) -> None:
    """The worker is told what whoever governs memory decides; an idle worker is reported to him as None."""
    asked: list[int | None] = []

    def decide(wanted: int | None) -> int:
        asked.append(wanted)
        return 5

    async with talk() as it:
        await it.load()
        it.client.govern_kv(decide)
        it.peer.say(protocol.KvWant(17))
        assert await it.peer.hear() == protocol.KvGrant(5)
        it.peer.say(protocol.Idle(9, 0, 0), protocol.KvWant(18))
        await it.peer.hear()
        assert asked == [17, None, 18]
        assert it.client.depths == (0, 0)


@pytest.mark.parametrize(
    ("code", "tail", "words"),
    [
        (3, "first\nlast", "exit code 3: last"),
        (0, "", "exit code 0"),
        (-signal.SIGSEGV, "", "signal SIGSEGV"),
        (None, "", "no exit code"),
    ],
)
def test_an_end_is_told_in_words(code: int | None, tail: str, words: str) -> None:
    """A code, or a signal by its name, and the last line."""
    assert str(WorkerExit(1, code, tail, expected=False)) == words
