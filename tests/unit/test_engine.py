"""InferenceEngine: what a request holds from the door to its end, and when it gives it back."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import pytest

from opta_lmx.config import Config, ModelsConfig, Preset, SchedulingConfig
from opta_lmx.errors import (
    Draining,
    GenerationFailed,
    InvalidRequest,
    LmxError,
    LoadFailed,
    ModelNotFound,
    QueueFull,
    WorkerLost,
)
from opta_lmx.inference.engine import Generation, InferenceEngine
from opta_lmx.inference.protocol import Started
from opta_lmx.inference.worker_client import WorkerClient
from opta_lmx.inference.worker_stream import WorkerStream
from opta_lmx.manager.model import ModelManager
from opta_lmx.manager.residency import Lease, LoadResult, Residency, UnloadResult
from opta_lmx.types import CacheReport, Delta, FinishReason, GenerateRequest, ModelFiles, SamplingParams, TextPrompt
from tests.fake_workers import model_files, settle

Result = TypeVar("Result")

LAST = Delta(0, "", 1, FinishReason.STOP)
GONE = Delta(0, "", 0, FinishReason.CANCELLED)


def request(model: str = "a", choices: int = 1) -> GenerateRequest:
    return GenerateRequest("req", model, TextPrompt("x"), SamplingParams(n=choices))


def text(*words: str) -> list[Delta]:
    """One token for each word, none of them the last."""
    return [Delta(0, word, 1) for word in words]


class ScriptedWorker(WorkerClient):
    """A worker without a process: the test speaks for it through ``streams``."""

    def __init__(self) -> None:
        super().__init__()
        self.streams: list[WorkerStream] = []
        self.cancels = 0
        self.dead = False

    def generate(self, request: GenerateRequest, on_end: Callable[[], None]) -> WorkerStream:
        if self.dead:
            raise WorkerLost("a", "it had already ended")

        def cancel() -> None:
            self.cancels += 1

        self.streams.append(WorkerStream(request.sampling.n, cancel, on_end))
        return self.streams[-1]

    def die(self, cause: str = "signal SIGKILL") -> None:
        """End with every request that is open."""
        self.dead = True
        for stream in self.streams:
            stream.fail(WorkerLost("a", cause))


@dataclass(eq=False)
class Rooms:
    """The catalog and the residency behind the engine.

    A lease is of ``worker``, or of a new one if that has died; ``stale`` of them come before its death is noticed.
    """

    worker: ScriptedWorker
    leases: int = 0
    granted: int = 0
    stale: int = 0
    failure: LmxError | None = None
    missing: LmxError | None = None
    may_lease: asyncio.Event = field(default_factory=asyncio.Event)

    def list_available(self) -> tuple[ModelFiles, ...]:
        return model_files("a"), model_files("b")

    async def ensure_local(self, model_id: str) -> ModelFiles:
        if self.missing is not None:
            raise self.missing
        return model_files(model_id)

    async def lease(self, files: ModelFiles) -> Lease:
        await self.may_lease.wait()
        if self.failure is not None:
            raise self.failure
        if self.worker.dead and self.stale == 0:
            self.worker = ScriptedWorker()
        self.stale = max(0, self.stale - 1)
        self.leases += 1
        self.granted += 1
        return Lease(files.id, self.worker, self._give_back)

    async def load(self, files: ModelFiles) -> LoadResult:
        return LoadResult(files.id, 1, 2.0)

    async def unload(self, model_id: str) -> UnloadResult:
        return UnloadResult(model_id, 3)

    def _give_back(self) -> None:
        self.leases -= 1


class House:
    """An engine over fakes, and the callers who use it."""

    def __init__(self, group: asyncio.TaskGroup, max_running: int, max_waiting: int) -> None:
        config = Config(
            scheduling=SchedulingConfig(max_running=max_running, max_waiting=max_waiting),
            models=ModelsConfig(aliases={"short": "a", "gpt-*": "b"}, presets={"calm": Preset(model="a")}),
        )
        self.rooms = Rooms(ScriptedWorker())
        self.rooms.may_lease.set()
        self.engine = InferenceEngine(config, cast(ModelManager, self.rooms), cast(Residency, self.rooms))
        self._group = group

    @property
    def worker(self) -> ScriptedWorker:
        return self.rooms.worker

    @property
    def stream(self) -> WorkerStream:
        """The newest request as the newest worker has it."""
        return self.worker.streams[-1]

    @property
    def depths(self) -> tuple[int, int]:
        return self.engine.queue_depths().get("a", (0, 0))

    def start(self, work: Coroutine[Any, Any, Result]) -> "asyncio.Task[Result]":
        return self._group.create_task(work)

    async def open(self, wanted: GenerateRequest | None = None) -> "asyncio.Task[Generation | LmxError]":
        """Starts a caller and lets it come as far as it can."""

        async def call() -> Generation | LmxError:
            try:
                return await self.engine.open(wanted or request())
            except LmxError as error:
                return error

        task = self.start(call())
        await settle()
        return task

    async def opened(self, wanted: GenerateRequest | None = None) -> Generation:
        """A generation whose first token has come."""
        caller = await self.open(wanted)
        self.stream.push(Delta(0, "first", 1))
        generation = await caller
        assert isinstance(generation, Generation)
        return generation

    def check_nothing_held(self) -> None:
        assert self.depths == (0, 0)
        assert self.rooms.leases == 0


@asynccontextmanager
async def house(max_running: int = 2, max_waiting: int = 1) -> AsyncIterator[House]:
    """At the end nothing is held and the engine is idle."""
    async with asyncio.TaskGroup() as group:
        built = House(group, max_running, max_waiting)
        yield built
        await settle()
        built.check_nothing_held()
        await asyncio.wait_for(built.engine.idle(), 1)


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
        await asyncio.wait_for(idle, 1)
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
