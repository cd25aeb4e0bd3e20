"""One request on a worker's pipe, on its own: what waits for the reader, and the one end it has."""

import asyncio
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opta_lmx.errors import LmxError, WorkerLost
from opta_lmx.inference.worker_stream import WorkerStream
from opta_lmx.types import Delta, FinishReason
from tests.fake_workers import settle

LAST = Delta(0, "", 1, FinishReason.STOP)


@dataclass
class Calls:
    """Counts what a stream asks of others."""

    cancels: int = 0
    ends: int = 0

    def stream(self, choices: int = 1) -> WorkerStream:
        return WorkerStream(choices, self.cancel, self.end)

    def cancel(self) -> None:
        self.cancels += 1

    def end(self) -> None:
        self.ends += 1


def word(text: str, choice: int = 0) -> Delta:
    return Delta(choice, text, 1)


OPERATIONS = st.lists(st.sampled_from(["text", "text", "finish", "fail", "cancel", "take"]), max_size=20)


@given(choices=st.integers(1, 3), operations=OPERATIONS)
def test_a_stream_ends_exactly_once(choices: int, operations: list[str]) -> None:
    """Whatever happens in whatever order: one end, nothing lost, nothing twice, and no cancellation after it."""
    calls = Calls()
    stream = calls.stream(choices)
    then = Calls()
    stream.then(then.end)
    pushed: list[Delta] = []
    taken: list[Delta] = []
    left = choices
    cancels = 0
    for number, operation in enumerate(operations):
        if operation == "cancel":
            cancels += left > 0
            stream.cancel()
        elif operation == "take":
            taken += stream.take()
        elif operation == "fail":
            left = 0
            stream.fail(WorkerLost("a", "x"))
        elif left > 0:
            # A worker says nothing after the last choice has ended.
            delta = Delta(left - 1, str(number), 1, FinishReason.STOP if operation == "finish" else None)
            left -= operation == "finish"
            pushed.append(delta)
            stream.push(delta)
        assert calls.ends == then.ends == (left == 0)
        assert stream.ended == (left == 0)
    assert taken + stream.take() == pushed
    assert calls.cancels == cancels


async def test_deltas_wait_together_for_a_slow_reader() -> None:
    """One look takes everything that has come; the next takes nothing."""
    stream = Calls().stream()
    for text in ("a", "b", "c"):
        stream.push(word(text))
    await stream.arrived()
    assert stream.take() == [word("a"), word("b"), word("c")]
    assert stream.take() == []


@pytest.mark.parametrize("what", ["text", "end", "failure"])
async def test_a_waiting_reader_is_woken(what: str) -> None:
    """By a token, by the end, and by a failure."""
    stream = Calls().stream()
    async with asyncio.TaskGroup() as group:
        reader = group.create_task(outcome(stream))
        await settle()
        assert not reader.done()
        if what == "text":
            stream.push(word("a"))
        elif what == "end":
            stream.push(LAST)
        else:
            stream.fail(WorkerLost("a", "x"))
    result = reader.result()
    assert isinstance(result, WorkerLost) if what == "failure" else result == [word("a") if what == "text" else LAST]


async def outcome(stream: WorkerStream) -> list[Delta] | LmxError:
    """The next look at a stream, or the error it ended with."""
    try:
        await stream.arrived()
    except LmxError as error:
        return error
    return stream.take()


async def test_what_came_before_a_failure_is_given_first() -> None:
    """The error comes when there is nothing else, and again whenever it is asked for."""
    stream = Calls().stream()
    stream.push(word("a"))
    lost = WorkerLost("a", "x")
    stream.fail(lost)
    assert await outcome(stream) == [word("a")]
    assert await outcome(stream) is lost
    assert await outcome(stream) is lost


async def test_the_first_end_counts() -> None:
    """A worker that dies after a request's last token has not failed that request."""
    stream = Calls().stream()
    stream.push(LAST)
    stream.fail(WorkerLost("a", "x"))
    assert await outcome(stream) == [LAST]
    assert await outcome(stream) == []


async def test_a_reader_who_was_cancelled_may_come_back() -> None:
    """Nothing is lost with the wait that was given up."""
    stream = Calls().stream()
    async with asyncio.TaskGroup() as group:
        reader = group.create_task(stream.arrived())
        await settle()
        reader.cancel()
        await settle()
        stream.push(word("a"))
    assert await outcome(stream) == [word("a")]
