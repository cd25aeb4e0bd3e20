"""One model in memory: its record, the lease a request holds on it, and how status shows it.

Records are written by ``residency.py`` alone, which decides; this file holds what it writes and what follows
from that without a decision.
"""

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import anyio

from opta_lmx.config_models import ModelsConfig, PerModel
from opta_lmx.errors import LmxError, RestartsExhausted
from opta_lmx.manager.changes import ModelChange
from opta_lmx.manager.eviction import Resident
from opta_lmx.manager.memory import LoadNeed
from opta_lmx.manager.progress import ProgressWatch
from opta_lmx.types import ModelFacts, ModelFiles, ModelState, Worker, WorkerExit

_IN_MEMORY = (ModelState.LOADING, ModelState.READY, ModelState.STOPPING)


class Lease:
    """A request's hold on a loaded model; while it lasts, nothing the server decides ends ``worker``."""

    __slots__ = ("_give_back", "model_id", "worker")

    def __init__(self, model_id: str, worker: Worker, give_back: Callable[[], None]) -> None:
        self.model_id = model_id
        self.worker = worker
        self._give_back: Callable[[], None] | None = give_back

    def release(self) -> None:
        """Give the hold back; harmless when done before, or when the worker has died meanwhile."""
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back()


@dataclass(frozen=True, slots=True)
class LoadResult:
    """``memory_after_bytes`` is what the whole machine uses; ``seconds`` counts waiting for room too."""

    model_id: str
    memory_after_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class UnloadResult:
    """``freed_bytes`` is the machine's used memory before the stop less that after the process had gone, never < 0."""

    model_id: str
    freed_bytes: int


@dataclass(frozen=True, slots=True)
class ShownHold:
    """A bot's lease as status shows it; ``expires_at`` is a wall-clock second."""

    lease_id: str
    owner: str
    expires_at: float


@dataclass(frozen=True, slots=True)
class ResidentModel:
    """One model as status shows it. ``*_at`` are wall-clock seconds; ``memory_bytes`` is what the ledger counts for it.

    ``leases`` are running requests, ``holds`` the number of the bots' leases, ``held`` those leases, ``waiters``
    callers waiting for the load or for room. ``reason`` says why it is not in memory where that was not asked for.
    """

    id: str
    state: ModelState
    pid: int | None
    memory_bytes: int
    need: LoadNeed | None
    loaded_at: float | None
    last_used_at: float | None
    request_count: int
    pinned: bool
    leases: int
    holds: int
    ttl_seconds: float | None
    restarts: int
    reason: str | None
    waiters: int
    facts: ModelFacts | None
    held: tuple[ShownHold, ...] = ()
    # Seconds for which its worker has had work and made no step, once that is suspicious; else 0.
    stalled_seconds: float = 0.0


@dataclass(slots=True, eq=False)
class Waiter:
    """A caller who waits for a lease; ``number`` is its place among all callers, ``deadline`` monotonic."""

    granted: asyncio.Future[Lease]
    number: int
    deadline: float
    ttl_seconds: float | None


@dataclass(frozen=True, slots=True)
class Hold:
    """A bot's lease: protects the model until a moment of the monotonic clock."""

    owner: str
    until: float


@dataclass(slots=True, eq=False)
class Process:
    """One life of a model in memory: from the decision to load it until its process has gone.

    ``worker`` is None while it loads; ``scope`` cancels the load; ``exit`` is set when the worker has ended.
    ``used_before_bytes``: what the machine used when it became ready, later when its stop began.
    """

    need: LoadNeed
    scope: anyio.CancelScope | None = None
    load_ended: asyncio.Event = field(default_factory=asyncio.Event)
    worker: Worker | None = None
    exit: WorkerExit | None = None
    leases: int = 0
    loaded_at: float = 0.0
    ttl_seconds: float | None = None
    used_before_bytes: int = 0
    watch: ProgressWatch = field(default_factory=ProgressWatch)

    @property
    def last_words(self) -> str | None:
        """How the worker ended by itself; None if it has not."""
        return None if self.exit is None else str(self.exit)


def _own(config: ModelsConfig, model_id: str) -> PerModel:
    return config.per_model.get(model_id, PerModel())


def _configured_ttl(config: ModelsConfig, model_id: str) -> float | None:
    ttl = _own(config, model_id).ttl_seconds
    return config.ttl_seconds if ttl is None else ttl


@dataclass(slots=True, eq=False)
class Record:
    """All that is known of one model id; ``process`` is set while it is in memory."""

    files: ModelFiles
    pinned: bool = False
    state: ModelState = ModelState.ABSENT
    process: Process | None = None
    waiters: list[Waiter] = field(default_factory=list)
    unloads: list[asyncio.Future[UnloadResult]] = field(default_factory=list)
    holds: dict[str, Hold] = field(default_factory=dict)
    last_used: float = 0.0
    request_count: int = 0
    restarts: int = 0
    # When its workers ended unasked: moments of the monotonic clock, oldest first.
    deaths: list[float] = field(default_factory=list)
    reason: str | None = None
    on_change: Callable[[ModelChange], None] = lambda change: None

    @classmethod
    def of(cls, files: ModelFiles, config: ModelsConfig, on_change: Callable[[ModelChange], None]) -> "Record":
        """A model that was never in memory, pinned if the settings say so."""
        return cls(files, pinned=_own(config, files.id).pinned, on_change=on_change)

    @property
    def id(self) -> str:
        """The model's id."""
        return self.files.id

    @property
    def protection(self) -> str | None:
        """Why it may be neither evicted nor expired, in words; None if it may."""
        owners = sorted({hold.owner for hold in self.holds.values()})
        return "pinned" if self.pinned else f"leased by {', '.join(owners)}" if owners else None

    def become(self, state: ModelState, process: Process | None, reason: str | None, cause: str | None = None) -> None:
        """The only way to a new state; whoever watches is told. ``cause`` is what a stop was decided for."""
        self.state, self.process, self.reason = state, process, reason
        self.on_change(ModelChange(self.id, state, reason, cause))

    @property
    def queued(self) -> bool:
        """True if somebody waits for a load that has not been started."""
        return self.process is None and bool(self.waiters)

    def resident(self, grown_bytes: int = 0) -> Resident:
        """The facts the eviction policy judges, while it is in memory; ``grown_bytes`` is known to the ledger."""
        process = self.process
        return Resident(
            id=self.id,
            memory_bytes=process.need.total_bytes if process else 0,
            last_used=self.last_used,
            state=self.state,
            leases=process.leases if process else 0,
            protected=self.protection is not None,
            grown_bytes=grown_bytes,
        )

    def reconfigure(self, old: ModelsConfig, new: ModelsConfig) -> None:
        """Take changed settings of this model, where no caller has said otherwise."""
        if _own(old, self.id).pinned != _own(new, self.id).pinned:
            self.pinned = _own(new, self.id).pinned
        if self.process is not None and self.process.ttl_seconds == _configured_ttl(old, self.id):
            self.process.ttl_seconds = _configured_ttl(new, self.id)

    def idle_time(self, config: ModelsConfig) -> float | None:
        """Idle seconds before it is unloaded: its first waiter's wish, else the settings'; None: never."""
        asked = self.waiters[0].ttl_seconds if self.waiters else None
        return _configured_ttl(config, self.id) if asked is None else asked

    def end_holds(self, now: float) -> None:
        """End the holds whose time is up, which counts as use."""
        for lease_id in [lease_id for lease_id, hold in self.holds.items() if hold.until <= now]:
            del self.holds[lease_id]
            self.last_used = now

    def expired(self, now: float) -> bool:
        """True if it has been idle for its whole idle time."""
        ttl = self.process.ttl_seconds if self.process else None
        return ttl is not None and now - self.last_used >= ttl and self.resident().idle

    def stalled(self, now: float, stall_seconds: float) -> bool:
        """True if its worker has work and gets nowhere; to be asked about once a second."""
        process = self.process
        if self.state is not ModelState.READY or process is None or process.worker is None:
            return False
        worker = process.worker
        return process.watch.look(now, busy=worker.busy, progress=worker.progress, stall_seconds=stall_seconds)

    def give_up(self, window_seconds: float) -> None:
        """Fail until somebody asks for the load, or the deaths are long enough ago."""
        cause = self.reason or "for no known reason"
        if self.state is not ModelState.FAILED:
            self.become(ModelState.FAILED, None, cause)
        self.fail_waiters(RestartsExhausted(self.id, len(self.deaths), window_seconds, cause))

    def forget_leavers(self) -> None:
        """Drop callers whose wait was cancelled, before their own tasks get to say so: nothing is loaded for nobody."""
        self.waiters = [waiter for waiter in self.waiters if not waiter.granted.done()]
        self.unloads = [unload for unload in self.unloads if not unload.done()]

    def fail_waiters(self, error: LmxError, *, until: float = math.inf) -> None:
        """Answer every waiter whose deadline is not after ``until`` with ``error``."""
        self.forget_leavers()
        for waiter in self.waiters:
            if waiter.deadline <= until:
                waiter.granted.set_exception(error)
        self.forget_leavers()

    def answer_unloads(self, freed_bytes: int) -> None:
        """Tell everybody who asked for the unload what it freed."""
        self.forget_leavers()
        for unload in self.unloads:
            unload.set_result(UnloadResult(self.id, freed_bytes))
        self.unloads = []

    def promised_bytes(self) -> int:
        """What the ledger must hold for it now: all of its need while it loads, then what no reading shows yet."""
        if self.process is None:
            return 0
        need = self.process.need
        return need.total_bytes if self.state is ModelState.LOADING else need.held_bytes

    def show(self, now: float, wall: float) -> ResidentModel:
        """How status shows it; ``now`` and ``wall`` are the same moment on both clocks."""
        process = self.process
        worker = process.worker if process else None
        return ResidentModel(
            id=self.id,
            state=self.state,
            pid=worker.pid if worker else None,
            memory_bytes=process.need.total_bytes if process else 0,
            need=process.need if process else None,
            loaded_at=process.loaded_at if process and worker else None,
            last_used_at=wall - (now - self.last_used) if worker else None,
            request_count=self.request_count,
            pinned=self.pinned,
            leases=process.leases if process else 0,
            holds=len(self.holds),
            ttl_seconds=process.ttl_seconds if process else None,
            restarts=self.restarts,
            reason=self.reason,
            waiters=len(self.waiters),
            facts=worker.facts if worker else None,
            held=tuple(ShownHold(lease, hold.owner, wall + hold.until - now) for lease, hold in self.holds.items()),
            stalled_seconds=process.watch.silent_seconds if process and process.watch.suspect else 0.0,
        )

    def check(self, reserved_bytes: int) -> None:
        """Raises AssertionError if the parts of the record contradict each other, or what the ledger holds for it."""
        process = self.process
        assert reserved_bytes == self.promised_bytes(), f"{self.id} is {self.state}, promised {reserved_bytes} bytes"
        assert (process is not None) == (self.state in _IN_MEMORY), f"{self.id} is {self.state}, process {process}"
        if process is None:
            assert not self.unloads, f"{self.id} is {self.state}: an unload waits for nothing"
            return
        assert (process.worker is None) == (self.state is ModelState.LOADING), f"{self.id}: {self.state}, no worker"
        assert process.leases >= 0, f"{self.id}: {process.leases} leases"
        if self.state is ModelState.READY:
            assert self.unloads or not self.waiters, f"{self.id} is ready and lets its callers wait"
            assert process.leases > 0 or not self.unloads, f"{self.id} is idle and its unload does not start"
        if self.state is ModelState.STOPPING:
            assert process.leases == 0, f"{self.id}: stopped under {process.leases} leases"
            assert self.protection is None, f"{self.id}: stopped while {self.protection}"
