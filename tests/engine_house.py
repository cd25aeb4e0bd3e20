"""An engine with scripted rooms behind it, and the callers who use it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from opta_lmx.config import Config, SchedulingConfig
from opta_lmx.config_models import ModelsConfig, Preset
from opta_lmx.errors import LmxError, WorkerLost
from opta_lmx.inference.engine import Generation, InferenceEngine
from opta_lmx.inference.worker_client import WorkerClient
from opta_lmx.inference.worker_stream import WorkerStream
from opta_lmx.manager.model import ModelManager
from opta_lmx.manager.residency import Lease, LoadResult, Residency, UnloadResult
from opta_lmx.types import Delta, GenerateRequest, ModelFiles, SamplingParams, TextPrompt
from tests.fake_workers import Clock, model_files, settle

Result = TypeVar("Result")


def request(model: str = "a", choices: int = 1) -> GenerateRequest:
    """A request for so many choices."""
    return GenerateRequest("req", model, TextPrompt("x"), SamplingParams(n=choices))


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
    ``on_disk`` is what the next ``refresh`` finds; ``may_load`` and ``ttl_seconds`` what the last lease asked for;
    ``model_type`` is every model's.
    """

    worker: ScriptedWorker
    leases: int = 0
    granted: int = 0
    stale: int = 0
    refreshes: int = 0
    may_load: bool | None = None
    ttl_seconds: float | None = None
    model_type: str = "llama"
    listed: tuple[str, ...] = ("a", "b")
    on_disk: tuple[str, ...] = ("a", "b")
    failure: LmxError | None = None
    missing: LmxError | None = None
    may_lease: asyncio.Event = field(default_factory=asyncio.Event)

    def list_available(self) -> tuple[ModelFiles, ...]:
        return tuple(map(model_files, self.listed))

    async def ensure_local(self, model_id: str, admit: Callable[[ModelFiles], None]) -> ModelFiles:
        if self.missing is not None:
            raise self.missing
        return model_files(model_id, model_type=self.model_type)

    def refresh(self) -> None:
        self.refreshes += 1
        self.listed = self.on_disk

    async def lease(self, files: ModelFiles, *, ttl_seconds: float | None = None, may_load: bool = True) -> Lease:
        self.may_load, self.ttl_seconds = may_load, ttl_seconds
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

    def __init__(self, group: asyncio.TaskGroup, scheduling: SchedulingConfig, *, jit: bool) -> None:
        aliases, presets = {"short": "a", "gpt-*": "b"}, {"calm": Preset(model="a")}
        config = Config(scheduling=scheduling, models=ModelsConfig(aliases=aliases, presets=presets, jit=jit))
        self.rooms = Rooms(ScriptedWorker())
        self.rooms.may_lease.set()
        self.clock = Clock()
        models, residency = cast(ModelManager, self.rooms), cast(Residency, self.rooms)
        self.engine = InferenceEngine(config, models, residency, self.clock)
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
async def house(max_running: int = 2, max_waiting: int = 1, *, jit: bool = True) -> AsyncIterator[House]:
    """At the end nothing is held and the engine is idle."""
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        built = House(group, SchedulingConfig(max_running=max_running, max_waiting=max_waiting), jit=jit)
        yield built
        await settle()
        built.check_nothing_held()
        await built.engine.idle()
