"""InferenceEngine: what a request holds from the door to its end, and when it gives it back."""

import pytest

from opta_lmx.config_models import Preset
from opta_lmx.errors import (
    Draining,
    GenerationFailed,
    GenerationStalled,
    InvalidRequest,
    LmxError,
    LoadFailed,
    ModelNotFound,
    QueueFull,
    WorkerLost,
)
from opta_lmx.inference.engine import Generation
from opta_lmx.inference.protocol import Started
from opta_lmx.manager.residency import LoadResult, UnloadResult
from opta_lmx.types import CacheReport, Delta, FinishReason
from tests.engine_house import house, request
from tests.fake_workers import settle

LAST = Delta(0, "", 1, FinishReason.STOP)
GONE = Delta(0, "", 0, FinishReason.CANCELLED)


def text(*words: str) -> list[Delta]:
    """One token for each word, none of them the last."""
    return [Delta(0, word, 1) for word in words]


async def read(generation: Generation) -> list[Delta]:
    """Everything a generation still gives."""
    return [delta async for deltas in generation for delta in deltas]


async def test_a_request_opens_with_its_first_token_and_ends_with_its_last() -> None:
    """Slot and lease are held from the door to the last token, and the counts of the prompt come with the first."""
    async with house() as it:
        caller = await it.open()
        assert it.depths == (1, 0)
        assert it.rooms.leases == 1
        it.stream.began(Started(1, 17, CacheReport(5, 5, "other text")))
        await settle()
        assert not caller.done()
        it.stream.push(Delta(0, "one", 1))
        generation = await caller
        assert isinstance(generation, Generation)
        assert (generation.request_id, generation.model_id) == ("req", "a")
        assert (generation.prompt_tokens, generation.cache) == (17, CacheReport(5, 5, "other text"))
        assert it.depths == (1, 0)
        it.stream.push(LAST)
        it.check_nothing_held()
        assert await read(generation) == [Delta(0, "one", 1), LAST]


async def test_an_answer_may_begin_in_reasoning() -> None:
    """Whether the prompt opened it is known with the first token."""
    async with house() as it:
        for in_reasoning in (True, False):
            caller = await it.open()
            it.stream.began(Started(1, 17, CacheReport(), in_reasoning))
            it.stream.push(LAST)
            generation = await caller
            assert isinstance(generation, Generation)
            assert generation.starts_in_reasoning is in_reasoning


async def test_a_reader_who_has_enough_reads_to_the_end() -> None:
    """``stop`` asks the worker once; what it made meanwhile still comes, and then everything is given back."""
    async with house() as it:
        generation = await it.opened()
        generation.stop()
        assert it.worker.cancels == 1
        assert it.depths == (1, 0)
        it.stream.push(Delta(0, "late", 1))
        it.stream.push(GONE)
        assert await read(generation) == [Delta(0, "first", 1), Delta(0, "late", 1), GONE]
        generation.stop()
        assert it.worker.cancels == 1
        it.check_nothing_held()


async def test_a_request_may_end_with_its_first_token() -> None:
    """One that is over before its caller wakes holds nothing when he does."""
    async with house() as it:
        caller = await it.open()
        it.stream.push(LAST)
        generation = await caller
        assert isinstance(generation, Generation)
        it.check_nothing_held()
        assert await read(generation) == [LAST]


async def test_a_slow_reader_gets_fewer_larger_pieces() -> None:
    """Each look gives everything that has come since the last one."""
    async with house() as it:
        generation = await it.opened()
        for delta in text("two", "three"):
            it.stream.push(delta)
        looks = aiter(generation)
        assert await anext(looks) == text("first", "two", "three")
        it.stream.push(LAST)
        assert await anext(looks) == [LAST]
        with pytest.raises(StopAsyncIteration):
            await anext(looks)


async def test_a_generation_ends_with_its_last_choice() -> None:
    """The others' ends change nothing for slot and lease."""
    async with house() as it:
        generation = await it.opened(request(choices=2))
        it.stream.push(Delta(1, "", 1, FinishReason.STOP))
        assert it.rooms.leases == 1
        it.stream.push(LAST)
        it.check_nothing_held()
        assert [delta.choice for delta in await read(generation)] == [0, 1, 0]


async def test_names_are_resolved_before_anything_is_held() -> None:
    """Aliases, globs and presets lead to ids; an unknown name is refused with the nearest, and holds nothing."""
    async with house() as it:
        for name, model_id in (("a", "a"), ("short", "a"), ("calm", "a"), ("gpt-4", "b")):
            assert it.engine.resolve(name) == model_id
            generation = await it.opened(request(name))
            assert generation.model_id == model_id
            it.stream.push(LAST)
        assert it.engine.preset("calm") == Preset(model="a")
        assert it.engine.preset("short") is None
        refused = await (await it.open(request("shor")))
        assert isinstance(refused, ModelNotFound)
        assert refused.nearest == ("short",)


@pytest.mark.parametrize(
    "failure",
    [InvalidRequest("the worker refused it"), GenerationFailed("it failed inside")],
    ids=["refused", "failed"],
)
async def test_what_ends_a_request_before_its_first_token_is_raised_by_open(failure: LmxError) -> None:
    """A refusal has its own status because nothing was sent; and nothing is held."""
    async with house() as it:
        caller = await it.open()
        it.stream.fail(failure)
        assert await caller is failure
        assert it.rooms.granted == 1


async def test_a_failure_in_the_rooms_behind_holds_nothing() -> None:
    """Files that are bad and models that do not load are refusals like any other."""
    async with house() as it:
        it.rooms.missing = LoadFailed("a", "its files are bad")
        assert await (await it.open()) is it.rooms.missing
        it.check_nothing_held()
        it.rooms.missing, it.rooms.failure = None, LoadFailed("a", "it did not load")
        assert await (await it.open()) is it.rooms.failure


async def test_a_request_without_a_token_is_started_again_once() -> None:
    """A worker that dies before the first token costs the request nothing but time."""
    async with house() as it:
        caller = await it.open()
        it.worker.die()
        await settle()
        assert it.rooms.granted == 2
        assert it.depths == (1, 0)
        it.stream.push(LAST)
        generation = await caller
        assert isinstance(generation, Generation)
        assert await read(generation) == [LAST]


async def test_a_worker_that_died_unseen_counts_as_lost() -> None:
    """A lease of a worker that has just ended is as good as a death before the first token, and is given back."""
    async with house() as it:
        it.worker.dead = True
        it.rooms.stale = 1
        caller = await it.open()
        assert (it.rooms.granted, it.rooms.leases) == (2, 1)
        it.stream.push(LAST)
        assert isinstance(await caller, Generation)
        it.worker.dead = True
        it.rooms.stale = 2
        assert isinstance(await (await it.open()), WorkerLost)


async def test_a_request_that_loses_two_workers_is_refused() -> None:
    """It is likelier the cause than the victim."""
    async with house() as it:
        caller = await it.open()
        for _ in range(2):
            it.worker.die("exit code 9")
            await settle()
        refused = await caller
        assert isinstance(refused, WorkerLost)
        assert refused.cause == "exit code 9"
        assert it.rooms.granted == 2


async def test_a_death_after_the_first_token_ends_the_generation() -> None:
    """What has come is given first, then the error; nothing is started again, for the client has seen words."""
    async with house() as it:
        generation = await it.opened()
        it.stream.push(Delta(0, "second", 1))
        it.worker.die()
        it.check_nothing_held()
        looks = aiter(generation)
        assert await anext(looks) == text("first", "second")
        with pytest.raises(WorkerLost, match="SIGKILL"):
            await anext(looks)
        assert it.rooms.granted == 1


async def test_a_closed_generation_is_given_back_when_the_worker_lets_go() -> None:
    """Closing asks once and holds on until the worker has answered, however often it is closed."""
    async with house() as it:
        generation = await it.opened()
        await generation.aclose()
        assert it.worker.cancels >= 1
        assert it.depths == (1, 0)
        assert it.rooms.leases == 1
        it.stream.push(GONE)
        it.check_nothing_held()
        asked = it.worker.cancels
        await generation.aclose()
        assert it.worker.cancels == asked


async def test_closing_after_the_end_asks_for_nothing() -> None:
    """A generation that has ended has nothing to cancel."""
    async with house() as it:
        generation = await it.opened()
        it.stream.push(LAST)
        await generation.aclose()
        assert it.worker.cancels == 0


async def test_a_caller_who_leaves_before_the_first_token_cancels_his_request() -> None:
    """Slot and lease come back when the worker is done with it, not when he stops listening."""
    async with house() as it:
        caller = await it.open()
        caller.cancel()
        await settle()
        assert it.worker.cancels == 1
        assert it.rooms.leases == 1
        assert it.depths == (1, 0)
        it.stream.push(GONE)
        it.check_nothing_held()


async def test_a_caller_who_leaves_before_he_has_a_lease_holds_nothing() -> None:
    """Whoever waits for a model has only his slot to give back."""
    async with house() as it:
        it.rooms.may_lease.clear()
        caller = await it.open()
        assert it.depths == (1, 0)
        caller.cancel()
        await settle()
        it.check_nothing_held()
        assert it.worker.streams == []
        it.rooms.may_lease.set()


async def test_the_queue_is_bounded_and_in_order() -> None:
    """Beyond what runs and waits newcomers are refused; a slot that comes back goes to whoever waits."""
    async with house(max_running=1, max_waiting=1) as it:
        first = await it.opened()
        waiting = await it.open()
        assert it.depths == (1, 1)
        refused = await (await it.open())
        assert isinstance(refused, QueueFull)
        assert refused.retry_after_seconds >= 1
        it.stream.push(LAST)
        await settle()
        assert it.depths == (1, 0)
        it.stream.push(LAST)
        assert isinstance(await waiting, Generation)
        assert await read(first) == [Delta(0, "first", 1), LAST]


async def test_a_draining_engine_takes_no_new_work_and_ends_what_runs() -> None:
    """Requests and loads are refused; ``idle`` waits for those that were open, queued ones included."""
    async with house(max_running=1) as it:
        await it.opened()
        waiting = await it.open()
        it.engine.draining = True
        assert isinstance(await (await it.open()), Draining)
        with pytest.raises(Draining):
            await it.engine.load_model("a")
        idle = it.start(it.engine.idle())
        await settle()
        it.stream.push(LAST)
        await settle()
        assert not idle.done()
        it.stream.push(LAST)
        await idle
        assert isinstance(await waiting, Generation)


async def test_loads_and_unloads_go_by_any_name() -> None:
    """An alias loads and unloads the model it stands for; an unknown name is refused."""
    async with house() as it:
        assert await it.engine.load_model("short") == LoadResult("a", 1, 2.0)
        assert await it.engine.unload_model("gpt-4") == UnloadResult("b", 3)
        with pytest.raises(ModelNotFound):
            await it.engine.load_model("nobody")
        with pytest.raises(ModelNotFound):
            await it.engine.unload_model("nobody")


async def test_a_name_nobody_knows_is_looked_for_on_disk_once_a_second() -> None:
    """A model that was copied in answers at once; whoever asks for nonsense does not make the disk work."""
    async with house() as it:
        assert it.engine.resolve("a") == "a"
        assert it.rooms.refreshes == 0
        it.rooms.on_disk = ("a", "b", "new")
        assert it.engine.resolve("new") == "new"
        for _ in range(3):
            with pytest.raises(ModelNotFound):
                it.engine.resolve("nonsense")
        assert it.rooms.refreshes == 1
        it.clock.seconds += 1
        with pytest.raises(ModelNotFound):
            it.engine.resolve("nonsense")
        assert it.rooms.refreshes == 2


@pytest.mark.parametrize("jit", [True, False])
async def test_requests_load_models_only_if_they_may(jit: bool) -> None:
    """``models.jit`` decides whether a request may bring its model into memory."""
    async with house(jit=jit) as it:
        await it.opened()
        assert it.rooms.may_load is jit
        it.stream.push(LAST)


async def test_a_silent_worker_ends_the_request_and_not_its_slot() -> None:
    """Its caller is told after the time for silence, counted from the last token; the slot waits for the worker."""
    async with house() as it:
        caller = await it.open()
        it.engine.step(0)
        it.engine.step(299)
        assert not caller.done()
        it.engine.step(300)
        await settle()
        assert isinstance(caller.result(), GenerationStalled)
        assert it.worker.cancels
        assert (it.depths, it.rooms.leases) == ((1, 0), 1)
        it.stream.push(GONE)
        it.check_nothing_held()

        generation = await it.opened()
        it.engine.step(1000)
        it.stream.push(Delta(0, "more", 1))
        it.engine.step(1299)
        it.engine.step(1599)
        with pytest.raises(GenerationStalled):
            await read(generation)
        it.stream.push(GONE)
