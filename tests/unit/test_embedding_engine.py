"""What a request to an encoder holds on its way through the engine, and how it ends."""

import asyncio
from collections.abc import Callable

import pytest

from opta_lmx.errors import GenerationFailed, InvalidRequest, LmxError, UnsupportedParameter, WorkerLost
from opta_lmx.inference.embedding import EmbedRequest, RankRequest
from opta_lmx.inference.protocol import Embed, Embedded, Rank, Ranked
from opta_lmx.inference.worker_reply import WorkerReply
from opta_lmx.manager.catalog import is_encoder
from opta_lmx.types import TextPrompt
from tests.engine_house import House, ScriptedWorker, house, request
from tests.fake_workers import model_files, settle

EMBED = EmbedRequest("req", "a", (TextPrompt("x"),), 8)
RANK = RankRequest("req", "a", "q", ("x", "y"))
EMBEDDED = Embedded(1, b"\0" * 8, 2, 3)


class ScriptedEncoder(ScriptedWorker):
    """A worker without a process that is asked: the test answers through ``replies``."""

    def __init__(self) -> None:
        super().__init__()
        self.replies: list[WorkerReply] = []
        self.frames: list[Embed | Rank] = []

    def ask(self, frame: Callable[[int], Embed | Rank], on_end: Callable[[], None]) -> WorkerReply:
        if self.dead:
            raise WorkerLost("a", "it had already ended")
        self.frames.append(frame(1))

        def cancel() -> None:
            self.cancels += 1

        self.replies.append(WorkerReply(cancel, on_end))
        return self.replies[-1]


def furnish(it: House) -> ScriptedEncoder:
    """Turns the models behind a house's engine into encoders; the worker that serves them."""
    encoder = ScriptedEncoder()
    it.rooms.worker = encoder
    it.rooms.model_type = "bert"
    return encoder


async def embed(it: House) -> "asyncio.Task[Embedded | LmxError]":
    """Starts a caller and lets it come as far as it can."""

    async def call() -> Embedded | LmxError:
        try:
            return await it.engine.embed(EMBED)
        except LmxError as error:
            return error

    task = it.start(call())
    await settle()
    return task


async def test_slot_and_lease_are_held_until_the_answer() -> None:
    """And given back with it."""
    async with house() as it:
        encoder = furnish(it)
        caller = await embed(it)
        assert encoder.frames == [Embed(1, [TextPrompt("x")], 8)]
        assert it.depths == (1, 0)
        assert it.rooms.leases == 1
        encoder.replies[0].finish(EMBEDDED)
        assert await caller == EMBEDDED
        it.check_nothing_held()


async def test_a_rank_is_asked_and_answered() -> None:
    """As an embedding is."""
    async with house() as it:
        encoder = furnish(it)
        caller = it.start(it.engine.rank(RANK))
        await settle()
        assert encoder.frames == [Rank(1, "q", ["x", "y"])]
        encoder.replies[0].finish(Ranked(1, [0.5, 0.25], 9))
        assert (await caller).scores == [0.5, 0.25]


@pytest.mark.parametrize("failure", [InvalidRequest("refused"), GenerationFailed("failed inside")])
async def test_a_refusal_reaches_the_caller(failure: LmxError) -> None:
    """And holds nothing; what comes after it is ignored."""
    async with house() as it:
        encoder = furnish(it)
        caller = await embed(it)
        encoder.replies[0].fail(failure)
        encoder.replies[0].finish(EMBEDDED)
        assert await caller is failure
        it.check_nothing_held()


async def test_a_caller_who_leaves_lets_the_request_go() -> None:
    """The worker is told at once; slot and lease stay until it is done with the request."""
    async with house() as it:
        encoder = furnish(it)
        caller = await embed(it)
        caller.cancel()
        await settle()
        assert encoder.cancels == 1
        assert it.depths == (1, 0)
        assert it.rooms.leases == 1
        encoder.replies[0].fail(GenerationFailed("cancelled"))
        it.check_nothing_held()
        encoder.replies[0].cancel()
        assert encoder.cancels == 1


async def test_a_request_survives_one_death_of_its_worker() -> None:
    """It is asked again, once; the second death is the caller's."""
    async with house() as it:
        for survives in (True, False):
            first, second = furnish(it), ScriptedEncoder()
            caller = await embed(it)
            first.dead = True
            it.rooms.worker = second
            first.replies[0].fail(WorkerLost("a", "signal SIGKILL"))
            await settle()
            assert len(second.replies) == 1
            if survives:
                second.replies[0].finish(EMBEDDED)
                assert await caller == EMBEDDED
            else:
                second.replies[0].fail(WorkerLost("a", "signal SIGKILL"))
                assert isinstance(await caller, WorkerLost)
            it.check_nothing_held()


async def test_nobody_loads_a_model_for_what_it_cannot_do() -> None:
    """A model that writes is not leased for vectors, an encoder not for text; each refusal names the other route."""
    async with house() as it:
        refused = await (await embed(it))
        assert isinstance(refused, UnsupportedParameter)
        assert "'a' can write text" in str(refused)
        furnish(it)
        answer = await (await it.open(request()))
        assert isinstance(answer, UnsupportedParameter)
        assert "'a' can make embeddings" in str(answer)
        assert it.rooms.granted == 0


def test_encoders_are_known_by_their_type() -> None:
    """A GGUF of one is none: there is no import for it."""
    assert is_encoder(model_files("a", model_type="xlm-roberta"))
    assert not is_encoder(model_files("a", model_type="llama"))
    assert not is_encoder(model_files("a", model_type="bert", format="gguf"))
