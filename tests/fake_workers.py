"""A machine, its workers and a clock for tests of the residency: nothing waits, nothing is random, nothing is real.

``Machine`` is the memory probe; its workers take memory while they live. It notes every sight of what must never
be: a worker stopped while it serves, two processes of one model, a load that starts before there is room for it.
"""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anyio.lowlevel import checkpoint

from opta_lmx.config import MemoryConfig
from opta_lmx.config_models import ModelsConfig
from opta_lmx.errors import LmxError
from opta_lmx.manager.memory import WORKER_OVERHEAD_BYTES, MemoryMonitor, buffer_bytes
from opta_lmx.manager.residency import Lease, Residency, ResidentModel
from opta_lmx.types import EchoOptions, LoadOptions, MemoryReading, ModelFacts, ModelFiles, WorkerExit

GIB = 1024**3

# What the wall clock shows more than the monotonic one.
WALL_OFFSET_SECONDS = 1e9


def run(scenario: Coroutine[Any, Any, None]) -> None:
    """Run a test's coroutine; one that hangs fails after 10 s of real time."""
    asyncio.run(asyncio.wait_for(scenario, 10))


async def settle() -> None:
    """Let every task go on until all of them wait: no chain of wake-ups in these tests is 12 turns long."""
    for _ in range(12):
        await checkpoint()


def model_files(id: str, gib: float = 10, **facts: Any) -> ModelFiles:
    """A model whose need is ``gib`` GiB in all, worker included, unless ``facts`` say more.

    It is an echo model, which needs no buffers; ``echo=None`` makes it one of MLX, which does.
    """
    size = int(gib * GIB) - WORKER_OVERHEAD_BYTES
    values: dict[str, Any] = {
        "path": Path("models") / id,
        "format": "mlx",
        "size_bytes": size,
        "weights_bytes": size,
        "model_type": "llama",
        "context_length": 4096,
        "quantization": None,
        "layers": None,
        "kv_heads": None,
        "head_dim": None,
        "created": 0,
        "echo": EchoOptions(),
    }
    return ModelFiles(id=id, **values | facts)


class Clock:
    """Monotonic seconds that move when told to."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@dataclass(eq=False)
class FakeWorker:
    """A worker of the Machine. ``serving`` counts the requests a test has running on it."""

    machine: "Machine"
    model: ModelFiles
    pid: int
    on_exit: Callable[[WorkerExit], None]
    footprint_bytes: int
    options: LoadOptions
    granted_bytes: int = 0
    decide: Callable[[int | None], int] = lambda wanted: 0
    serving: int = 0
    stopping: bool = False
    alive: bool = True
    progress: int = 0
    killed_for: str | None = None

    @property
    def busy(self) -> bool:
        """True while a test has a request running on it."""
        return self.serving > 0

    def kill(self, reason: str) -> None:
        """Ends by the server's hand, unasked."""
        self.killed_for = reason
        self.machine.killed.append((self.model.id, reason))
        self.end(-9)

    @property
    def facts(self) -> ModelFacts:
        return ModelFacts("llama", 4096, 32000, self.model.weights_bytes, 1024, has_chat_template=True)

    def govern_kv(self, decide: Callable[[int | None], int]) -> None:
        """From now on ``grow`` and ``rest`` speak with the ledger."""
        self.decide = decide

    def grow(self, wanted_bytes: int) -> bool:
        """Ask for so many bytes for all caches together, and fill what is granted; False if it is less than asked."""
        self.granted_bytes = self.decide(wanted_bytes)
        self.footprint_bytes = self.machine.most_bytes(self)
        return self.granted_bytes >= wanted_bytes

    def rest(self) -> None:
        """Nothing runs any more: the caches are empty, and what they had grown by is given back."""
        self.granted_bytes = self.decide(None)
        self.footprint_bytes = self.model.weights_bytes + WORKER_OVERHEAD_BYTES

    @property
    def limit_bytes(self) -> int:
        """What its MLX may take: the bound of its load, and what its requests have been granted beyond."""
        grown = max(0, self.granted_bytes - (self.options.kv_bytes or 0))
        return (self.options.memory_limit_bytes or 0) + grown

    async def stop(self, grace_seconds: float) -> None:
        """Ends at once, or when ``Machine.stop_gate`` opens; tells ``on_exit`` before it returns."""
        if self.alive and self.serving and not self.machine.closing:
            self.machine.violations.append(f"{self.model.id} stopped while it serves {self.serving}")
        self.stopping = True
        await self.machine.stop_gate.wait()
        self.end(0)

    def end(self, exit_code: int, stderr_tail: str = "") -> None:
        """The process ends; ``exit_code`` is negative for a signal."""
        if self.alive:
            self.alive = False
            self.machine.workers.remove(self)
            self.on_exit(WorkerExit(self.pid, exit_code, stderr_tail, self.stopping, self.killed_for))


@dataclass(eq=False)
class Machine:
    """Total memory, what other processes use, and the workers: a MemoryProbe and a SpawnWorker in one.

    ``load_gate`` and ``stop_gate`` are open unless a test clears them. ``failures`` says which loads fail, and how.
    """

    clock: Clock = field(default_factory=Clock)
    total_bytes: int = 100 * GIB
    others_bytes: int = 0
    max_memory_percent: int = 90
    kv_reserve_fraction: float = 0.0
    failures: dict[str, LmxError] = field(default_factory=dict)
    workers: list[FakeWorker] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    killed: list[tuple[str, str]] = field(default_factory=list)
    closing: bool = False
    load_gate: asyncio.Event = field(default_factory=asyncio.Event)
    stop_gate: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.load_gate.set()
        self.stop_gate.set()
        self._loading: dict[str, ModelFiles] = {}
        self._limits: dict[str, int] = {}
        self._next_pid = 100

    @property
    def used_bytes(self) -> int:
        # A load has taken half of what it will: no reading taken meanwhile is right.
        loading = sum((model.weights_bytes + WORKER_OVERHEAD_BYTES) // 2 for model in self._loading.values())
        return self.others_bytes + sum(worker.footprint_bytes for worker in self.workers) + loading

    @property
    def limit_bytes(self) -> int:
        return self.total_bytes * self.max_memory_percent // 100

    def read(self) -> MemoryReading:
        return MemoryReading(self.total_bytes, self.used_bytes, None, self.clock())

    def worker(self, model_id: str) -> FakeWorker:
        """The living worker of a model."""
        return next(w for w in self.workers if w.model.id == model_id)

    async def __call__(
        self, model: ModelFiles, options: LoadOptions, on_exit: Callable[[WorkerExit], None]
    ) -> FakeWorker:
        self._watch(model)
        self.loads.append(model.id)
        self._loading[model.id] = model
        loading = sum(self._limits.values()) + sum(worker.limit_bytes for worker in self.workers)
        self._limits[model.id] = options.memory_limit_bytes or 0
        if loading + self._limits[model.id] > self.limit_bytes:
            self.violations.append(f"with {model.id} the workers' bounds are above the cap")
        try:
            await self.load_gate.wait()
            if model.id in self.failures:
                raise self.failures[model.id]
        finally:
            del self._loading[model.id], self._limits[model.id]
        self._next_pid += 1
        footprint = model.weights_bytes + WORKER_OVERHEAD_BYTES
        worker = FakeWorker(self, model, self._next_pid, on_exit, footprint, options)
        self.workers.append(worker)
        return worker

    def _watch(self, model: ModelFiles) -> None:
        if model.id in self._loading:
            self.violations.append(f"two loads of {model.id} at once")
        if any(w.model.id == model.id for w in self.workers):
            self.violations.append(f"{model.id} loaded beside its living process")
        if self.promised_bytes + self.most_bytes(model) > self.limit_bytes:
            self.violations.append(f"{model.id} loaded with no room for it")

    @property
    def promised_bytes(self) -> int:
        """What all programs together may come to use without asking again."""
        users: list[FakeWorker | ModelFiles] = [*self.workers, *self._loading.values()]
        return self.others_bytes + sum(self.most_bytes(user) for user in users)

    def most_bytes(self, user: FakeWorker | ModelFiles) -> int:
        """What a model may come to use: its weights, its process, its buffers, and its KV caches full to the brim."""
        model = user.model if isinstance(user, FakeWorker) else user
        granted = user.granted_bytes if isinstance(user, FakeWorker) else 0
        kv = max(granted, int(model.weights_bytes * self.kv_reserve_fraction))
        return model.weights_bytes + WORKER_OVERHEAD_BYTES + buffer_bytes(model) + kv


class Tasks:
    """A TaskStarter over an asyncio task group."""

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self._group = group

    def start_soon(self, func: Callable[..., Coroutine[Any, Any, object]], /, *args: object) -> None:
        self._group.create_task(func(*args))


class House:
    """A residency on a fake machine, and the callers who use it. ``async with`` it; leaving checks everything."""

    def __init__(self, models: ModelsConfig | None = None, *, auto_evict: bool = True, **machine: Any) -> None:
        self.machine = Machine(**machine)
        self.clock = self.machine.clock
        self.options = LoadOptions()
        self._models = models or ModelsConfig()
        self._auto_evict = auto_evict
        self._group = asyncio.TaskGroup()

    async def __aenter__(self) -> "House":
        await self._group.__aenter__()
        machine = self.machine
        config = MemoryConfig(
            max_memory_percent=machine.max_memory_percent, kv_reserve_fraction=machine.kv_reserve_fraction
        )
        self.memory = MemoryMonitor(config, machine, self.clock)
        self.residency = Residency(
            self._models,
            self.memory,
            machine,
            lambda files: self.options,
            Tasks(self._group),
            now=self.clock,
            wall=lambda: self.clock() + WALL_OFFSET_SECONDS,
            auto_evict=self._auto_evict,
        )
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        self.machine.closing = True
        self.machine.load_gate.set()
        self.machine.stop_gate.set()
        await self.residency.close()
        await self._group.__aexit__(*exc_info)
        self.check()
        assert self.machine.workers == []
        assert self.memory.reserved_bytes == 0

    def check(self) -> None:
        """Nothing forbidden was seen, and the residency's own books agree."""
        assert self.machine.violations == []
        self.residency.check()

    def shown(self, model_id: str) -> ResidentModel:
        """What status shows of a model."""
        return next(model for model in self.residency.snapshot() if model.id == model_id)

    async def settle(self) -> None:
        """Let everything happen that can happen now, then check it."""
        await settle()
        self.check()

    def start(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        """A caller with a task of its own, whose result is what ``work`` gives or the LmxError it raises."""

        async def call() -> Any:
            try:
                return await work
            except LmxError as error:
                return error

        return self._group.create_task(call())

    async def advance(self, seconds: float) -> None:
        """Let time pass, and the residency notice."""
        self.clock.seconds += seconds
        self.residency.step(self.clock())
        await self.settle()

    async def serve(self, files: ModelFiles, **wishes: Any) -> "Serving":
        """Lease a model and have a request running on it."""
        return Serving(await self.residency.lease(files, **wishes))


class Serving:
    """A running request: its worker counts it, and it releases its lease when it ends."""

    def __init__(self, lease: Lease) -> None:
        assert isinstance(lease.worker, FakeWorker)
        self.lease = lease
        self.worker = lease.worker
        self.worker.serving += 1

    def end(self) -> None:
        self.worker.serving -= 1
        self.lease.release()
        if self.worker.serving == 0 and self.worker.alive:
            self.worker.rest()
