"""Timeline and books: what is written of one request, alone and as the engine tells it."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from opta_lmx.errors import (
    ContextTooLong,
    GenerationFailed,
    IntegrityMismatch,
    LmxError,
    LoadFailed,
    MemoryLimit,
    ModelNotFound,
    QueueFull,
)
from opta_lmx.inference.embedding import EmbedRequest
from opta_lmx.inference.protocol import Embed, Embedded, Rank, Started
from opta_lmx.inference.worker_reply import WorkerReply
from opta_lmx.monitoring.timing import Histogram, LiveRequest, Outcome, Phase, RequestBook, Timeline
from opta_lmx.types import CacheReport, Caller, Delta, FinishReason, Lane, TextPrompt
from tests.engine_house import House, ScriptedWorker, house, request
from tests.fake_workers import Clock, settle


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def books() -> RequestBook:
    return RequestBook()


def begin(books: RequestBook, clock: Clock, choices: int = 1) -> Timeline:
    """A request that has just come."""
    return Timeline(books, "req", choices, clock)


@given(values=st.lists(st.tuples(st.floats(0, 10), st.integers(1, 5))))
def test_a_histogram_counts_each_value_under_the_first_bound_that_holds_it(values: list[tuple[float, int]]) -> None:
    """As Prometheus counts: a bound holds what is equal to it, and what no bound holds counts too."""
    bounds = (0.5, 1.0, 5.0)
    histogram = Histogram(bounds)
    for value, times in values:
        histogram.observe(value, times)
    edges = (-1.0, *bounds, float("inf"))
    for place, (above, below) in enumerate(pairwise(edges)):
        assert histogram.counts[place] == sum(times for value, times in values if above < value <= below)
    assert histogram.count == sum(times for _, times in values)
    assert histogram.sum == pytest.approx(sum(value * times for value, times in values))


def test_the_line_of_a_whole_request(books: RequestBook, clock: Clock) -> None:
    """Every duration is from its own two moments, the rate leaves the first tokens out, and the books agree."""
    timeline = Timeline(books, "req", 1, clock, Caller("nightly", lane=Lane.BATCH))
    timeline.resolved("a")
    clock.seconds += 1
    timeline.admitted()
    clock.seconds += 2
    timeline.leased()
    clock.seconds += 4
    timeline.first_token(2)
    timeline.looked([Delta(0, "x", 2)])
    clock.seconds += 8
    timeline.looked([Delta(0, "y", 4)])
    timeline.prompt_tokens, timeline.cached_tokens, timeline.completion_tokens = 30, 20, 10
    assert timeline.end(Outcome.STOP) == {
        "request_id": "req",
        "model": "a",
        "caller": "nightly",
        "lane": "batch",
        "outcome": "stop",
        "queue_s": 3,
        "load_s": 2,
        "ttft_s": 7,
        "duration_s": 15,
        "prompt_tokens": 30,
        "cached_tokens": 20,
        "completion_tokens": 10,
        "tok_s": 1,
        "choices": 1,
        "error": None,
    }
    book = books.of("a")
    assert (book.queue.sum, book.time_to_first_token.sum, book.e2e.sum) == (3, 7, 15)
    assert (book.prompt_tokens, book.cached_tokens, book.completion_tokens) == (30, 20, 10)
    assert book.outcomes == {Outcome.STOP: 1}


def test_a_request_is_shown_in_each_of_its_phases(books: RequestBook, clock: Clock) -> None:
    """In line, waiting for its model, prompt being read, making tokens; what has not come is None; then it is gone."""
    timeline = begin(books, clock)

    def shown() -> LiveRequest:
        [live] = books.live()
        return live

    assert (shown().phase, shown().model_id, shown().queue_seconds) == (Phase.QUEUE, None, None)
    timeline.resolved("a")
    clock.seconds += 1
    timeline.admitted()
    assert shown().phase is Phase.LOAD
    clock.seconds += 2
    timeline.leased()
    assert (shown().phase, shown().queue_seconds, shown().prompt_tokens) == (Phase.PREFILL, 3, None)
    clock.seconds += 4
    timeline.prompt_tokens = 30
    timeline.first_token(2)
    assert (shown().completion_tokens, shown().tokens_per_second) == (2, None)
    timeline.looked([Delta(0, "x", 2)])
    clock.seconds += 2
    timeline.looked([Delta(0, "y", 4)])
    assert (shown().phase, shown().ttft_seconds, shown().age_seconds) == (Phase.DECODE, 7, 9)
    assert (shown().prompt_tokens, shown().completion_tokens, shown().tokens_per_second) == (30, 6, 2)
    timeline.end(Outcome.STOP)
    assert books.live() == []


def test_gaps_between_tokens_are_counted_by_look(books: RequestBook, clock: Clock) -> None:
    """The first look opens the clock; tokens that came together share the gap; of choices the fullest one tells it."""
    timeline = begin(books, clock, choices=2)
    timeline.resolved("a")
    gaps = books.of("a").inter_token
    timeline.looked([Delta(0, "x", 3)])
    assert gaps.count == 0
    clock.seconds += 0.4
    timeline.looked([Delta(0, "x", 3), Delta(1, "y", 2), Delta(0, "z", 1)])
    assert gaps.count == 4
    assert gaps.sum == pytest.approx(0.4)
    clock.seconds += 0.2
    timeline.looked([Delta(1, "", 0, FinishReason.CANCELLED)])
    assert gaps.count == 4
    assert books.of("a").completion_tokens == 9


def test_tokens_nobody_looked_at_are_counted_once(books: RequestBook, clock: Clock) -> None:
    """Whatever part of an answer was read, the books have all of it at the end."""
    timeline = begin(books, clock)
    timeline.resolved("a")
    timeline.looked([Delta(0, "x", 3)])
    timeline.completion_tokens = 5
    timeline.end(Outcome.CANCELLED)
    assert books.of("a").completion_tokens == 5
    timeline.looked([Delta(0, "y", 2)])
    assert books.of("a").completion_tokens == 5


@pytest.mark.parametrize(
    ("error", "outcome", "name"),
    [
        (ModelNotFound("nobody"), Outcome.REFUSED, "ModelNotFound"),
        (QueueFull("a", 1, 1.0), Outcome.REFUSED, "QueueFull"),
        (MemoryLimit("a", 2, 1, {}), Outcome.REFUSED, "MemoryLimit"),
        (ContextTooLong(9, 8), Outcome.REFUSED, "ContextTooLong"),
        (LoadFailed("a", "bad"), Outcome.ERROR, "LoadFailed"),
        (IntegrityMismatch("f", "x", "y"), Outcome.ERROR, "IntegrityMismatch"),
        (ZeroDivisionError("secret"), Outcome.ERROR, "ZeroDivisionError"),
        (asyncio.CancelledError(), Outcome.CANCELLED, None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_decides_the_outcome(
    books: RequestBook, clock: Clock, error: BaseException, outcome: Outcome, name: str | None
) -> None:
    """What the server has to mend is an error, what it rightly turned away a refusal; only the class is told."""
    timeline = begin(books, clock)
    timeline.failed(error)
    timeline.failed(GenerationFailed("what followed from it"))
    line = timeline.end(Outcome.STOP)
    assert (line["outcome"], line["error"], line["model"]) == (outcome, name, None)
    assert books.of("").outcomes == {outcome: 1}
    assert books.of("").e2e.count == 0


def canonical(entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The canonical lines among what was logged."""
    return [entry for entry in entries if entry["event"] == "request_finished"]


async def finished(it: House, *deltas: Delta, choices: int = 1, failure: LmxError | None = None) -> Mapping[str, Any]:
    """The line of a request to which the worker says this."""
    with capture_logs() as entries:
        generation = await it.opened(request(choices=choices))
        for delta in deltas:
            it.stream.push(delta)
        if failure is not None:
            it.stream.fail(failure)
        del generation
    [line] = canonical(entries)
    return line


STOP, LENGTH, GONE = (Delta(0, "", 1, finish) for finish in FinishReason)


@pytest.mark.parametrize(
    ("deltas", "choices", "outcome", "tokens"),
    [
        ([STOP], 1, "stop", 2),
        ([LENGTH], 1, "length", 2),
        ([GONE], 1, "cancelled", 2),
        ([Delta(1, "x", 3), Delta(1, "", 1, FinishReason.LENGTH), STOP], 2, "length", 6),
    ],
)
async def test_a_request_ends_as_the_worker_says(deltas: list[Delta], choices: int, outcome: str, tokens: int) -> None:
    """One line with the worker's finish and its tokens, whether anybody has read them or not."""
    async with house() as it:
        line = await finished(it, *deltas, choices=choices)
        assert (line["outcome"], line["completion_tokens"], line["error"]) == (outcome, tokens, None)
        assert (line["request_id"], line["model"], line["choices"]) == ("req", "a", choices)


async def test_a_request_that_fails_half_way_is_an_error() -> None:
    """The class of the error stands in the line, its text does not."""
    async with house() as it:
        line = await finished(it, failure=GenerationFailed("with words of the prompt"))
        assert (line["outcome"], line["error"]) == ("error", "GenerationFailed")
        assert "words" not in str(line)


async def test_a_reader_who_has_enough_is_no_leaver() -> None:
    """``stop`` ends as it should; ``aclose`` of what has not ended is a client who left."""
    async with house() as it:
        for close, outcome in ((False, "stop"), (True, "cancelled")):
            with capture_logs() as entries:
                generation = await it.opened()
                await generation.aclose() if close else generation.stop()
                it.stream.push(Delta(0, "", 0, FinishReason.CANCELLED))
            [line] = canonical(entries)
            assert line["outcome"] == outcome


class Encoder(ScriptedWorker):
    """A worker that owes one reply."""

    reply: WorkerReply

    def ask(self, frame: Callable[[int], Embed | Rank], on_end: Callable[[], None]) -> WorkerReply:
        self.reply = WorkerReply(lambda: None, on_end)
        return self.reply


async def test_an_embedding_has_its_line_too() -> None:
    """It reads tokens and makes none; a caller who leaves is a leaver here too."""
    async with house() as it:
        it.rooms.model_type = "bert"
        it.rooms.worker = worker = Encoder()
        wanted = EmbedRequest("req", "a", (TextPrompt("x"),))
        with capture_logs() as entries:
            caller = it.start(it.engine.embed(wanted))
            await settle()
            worker.reply.finish(Embedded(1, b"", 1, 9))
            assert (await caller).prompt_tokens == 9
            caller = it.start(it.engine.embed(wanted))
            await settle()
            caller.cancel()
            await settle()
            worker.reply.fail(GenerationFailed("cancelled"))
        answered, left = canonical(entries)
        assert (answered["outcome"], answered["prompt_tokens"], answered["completion_tokens"]) == ("stop", 9, 0)
        assert (answered["choices"], answered["ttft_s"], answered["tok_s"]) == (0, None, None)
        assert (left["outcome"], left["error"]) == ("cancelled", None)


async def test_every_request_has_exactly_one_line() -> None:
    """Refused by name, by the queue, by draining, lost twice, left while waiting: each once, with its own word."""
    with capture_logs() as entries:
        async with house(max_running=1, max_waiting=1) as it:
            await (await it.open(request("nobody")))
            caller = await it.open()
            waiting = await it.open()
            await (await it.open())
            waiting.cancel()
            await settle()
            for _ in range(2):
                it.worker.die()
                await settle()
            await caller
            it.engine.draining = True
            await (await it.open())
    found = [(line["model"], line["outcome"], line["error"]) for line in canonical(entries)]
    assert found == [
        (None, "refused", "ModelNotFound"),
        ("a", "refused", "QueueFull"),
        ("a", "cancelled", None),
        ("a", "error", "LostTwice"),
        (None, "refused", "Draining"),
    ]


async def test_the_line_waits_for_the_worker() -> None:
    """A caller who left before his first token ends when the worker lets go, with what that had counted."""
    async with house() as it:
        with capture_logs() as entries:
            caller = await it.open()
            it.stream.began(Started(1, 17, CacheReport(5, 5, "other text")))
            caller.cancel()
            await settle()
            assert canonical(entries) == []
            it.stream.push(Delta(0, "", 0, FinishReason.CANCELLED))
        [line] = canonical(entries)
        assert (line["outcome"], line["ttft_s"], line["tok_s"]) == ("cancelled", None, None)
        assert (line["prompt_tokens"], line["cached_tokens"], line["completion_tokens"]) == (17, 5, 0)
