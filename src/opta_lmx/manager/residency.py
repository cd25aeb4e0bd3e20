"""The owner of loaded models: the only writer of their states, leases, pins and last use.

Every decision is a synchronous method on the event loop, with no ``await`` between reading and writing. Loads and
stops are carried out by ``processes.py``, as tasks that report back as exactly one event, and after every event
``_settle`` decides whatever can be decided now. What happens when two wishes meet (docs/plans/ARCHITECTURE.md names
the test of each):

========================================  ============================================================
lease of a loading model                  joins that load: all its waiters get leases, or all its failure
lease of a stopping model                 waits until the process has gone, then loads it again
lease while an unload waits for others    likewise: the unload came first
lease after a failed load or a death      loads again; the reason is kept until that has succeeded
no room, but idle models would make it    they are stopped, oldest first; the load starts when all have gone
no room, but busy or loading ones could   waits, ``room_wait_seconds`` at most, then MemoryLimit
no room whatever leaves                   MemoryLimit at once, with the plan
unload of a leased model                  waits for the leases to end and lets no new one in
unload of a loading model                 waits for the load; who joined it gets a lease first; then as above
unload of a pinned or held model          Conflict; with ``force`` pin and holds end first, leases never do
unload of what is not in memory           Conflict
the worker dies                           absent; its leases are void, releasing them harmless; pin and holds stay
a caller leaves while waiting             forgotten: a running load goes on, one that waits for room never starts
========================================  ============================================================
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from uuid import uuid4

import anyio
import msgspec

from opta_lmx.config import WorkersConfig
from opta_lmx.config_models import ModelsConfig
from opta_lmx.errors import Conflict, Draining, InvalidRequest, ModelLoading, ModelNotFound
from opta_lmx.manager.changes import ModelChange
from opta_lmx.manager.memory import LoadPlan, MemoryMonitor, Verdict, plan_load
from opta_lmx.manager.processes import ModelProcesses
from opta_lmx.manager.resident import Hold, Lease, LoadResult, Record, ResidentModel, UnloadResult, Waiter
from opta_lmx.manager.restarts import next_start
from opta_lmx.monitoring.logging import get_logger
from opta_lmx.types import LoadOptions, ModelFiles, ModelState, SpawnWorker, TaskStarter

__all__ = ["Lease", "LoadResult", "Residency", "ResidentModel", "UnloadResult"]

_log = get_logger(__name__)


@dataclass(eq=False)
class Residency:
    """Loads, leases and stops models. ``now`` is monotonic, ``wall`` only for what people read; both in seconds."""

    config: ModelsConfig
    memory: MemoryMonitor
    spawn: SpawnWorker
    options: Callable[[ModelFiles], LoadOptions]
    tasks: TaskStarter
    now: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    auto_evict: bool = True
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    # Most generations end within it; a caller that would wait longer is better told to come back.
    room_wait_seconds: float = 30.0
    # How long a worker may take to end by itself before it is signalled; it has no request left to finish.
    stop_grace_seconds: float = 5.0
    new_id: Callable[[], str] = lambda: uuid4().hex
    on_change: Callable[[ModelChange], None] = lambda change: None  # told of every change of a model's state
    _records: dict[str, Record] = field(init=False, repr=False, default_factory=dict)
    _kept_out: set[str] = field(init=False, repr=False, default_factory=set)
    _numbers: Iterator[int] = field(init=False, repr=False, default_factory=itertools.count)
    _processes: ModelProcesses = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._processes = ModelProcesses(
            memory=self.memory,
            spawn=self.spawn,
            tasks=self.tasks,
            idle_time=lambda record: record.idle_time(self.config),
            settle=self._settle,
            now=self.now,
            wall=self.wall,
            stop_grace_seconds=self.stop_grace_seconds,
        )

    async def lease(self, files: ModelFiles, *, ttl_seconds: float | None = None, may_load: bool = True) -> Lease:
        """A hold on the model, loading it first if need be.

        With ``may_load`` False only a model that is in memory, or was until its worker died, else ModelNotFound.
        ``ttl_seconds`` becomes its idle time if this call starts the load (the first of those who join it counts);
        None takes the configuration's. Raises MemoryLimit, LoadFailed, WorkerLost, ModelLoading (an unload in
        progress outlasts the wait), Conflict (its files are being changed) or Draining.
        """
        record = self._records.get(files.id)
        if not may_load and (record is None or (record.process is None and record.reason is None)):
            raise ModelNotFound(files.id)
        lease = await self._acquire(files, ttl_seconds)
        self._records[files.id].request_count += 1
        return lease

    async def load(self, files: ModelFiles, *, forgive: bool = True) -> LoadResult:
        """Have the model in memory; joins a load in flight. Raises as ``lease`` does.

        ``forgive`` starts the count of its workers' deaths anew.
        """
        started = self.now()
        record = self._records.get(files.id)
        if forgive and record is not None:
            record.deaths.clear()
        (await self._acquire(files, None)).release()
        return LoadResult(files.id, self.memory.reading(0).used_bytes, self.now() - started)

    def reconfigure(self, config: ModelsConfig, *, auto_evict: bool, workers: WorkersConfig) -> None:
        """Take changed settings; idle times and pins also of models in memory, where no caller has said otherwise."""
        for record in self._records.values():
            record.reconfigure(self.config, config)
        self.config, self.auto_evict, self.workers = config, auto_evict, workers
        self._settle()

    async def unload(self, model_id: str, *, force: bool = False) -> UnloadResult:
        """Stop the model once its leases have ended, and wait until its process has gone.

        ``force`` first ends its pin and its holds. Raises Conflict if it is pinned or held, or not in memory.
        If its load fails meanwhile, that frees 0 bytes.
        """
        record = self._records.get(model_id)
        if record is None or record.process is None:
            raise Conflict(f"{model_id!r} is not loaded.")
        if force:
            record.pinned = False
            record.holds.clear()
        elif record.protection is not None:
            raise Conflict(f"{model_id!r} is {record.protection}. Unpin it or end the lease, or use force.")
        unload: asyncio.Future[UnloadResult] = asyncio.get_running_loop().create_future()
        record.unloads.append(unload)
        self._settle()
        try:
            return await unload
        finally:
            # Whoever gives up asking for the unload lets the model serve again.
            self._settle()

    def plan(self, files: ModelFiles, context_length: int | None = None) -> LoadPlan:
        """What a load would do now, with all its arithmetic; changes nothing. ``context_length`` in tokens."""
        options = self.options(files)
        if context_length is not None:
            options = msgspec.structs.replace(options, context_length=context_length)
        plan = self._plan(files, options)
        record = self._records.get(files.id)
        if record is not None and record.state in (ModelState.LOADING, ModelState.READY):
            return replace(plan, verdict=Verdict.RESIDENT, would_evict=())
        return plan

    def pin(self, model_id: str) -> None:
        """Never evict the model, never let it expire. Raises Conflict unless it is loaded or being loaded."""
        self._staying(model_id).pinned = True

    def unpin(self, model_id: str) -> None:
        """End the pin; harmless if there is none."""
        record = self._records.get(model_id)
        if record is not None:
            record.pinned = False
            self._settle()

    def hold(self, model_id: str, owner: str, seconds: float) -> str:
        """Protect the model as a pin does, for ``seconds`` from now, in the name of ``owner``; returns the hold's id.

        Raises InvalidRequest for a time that is not positive, Conflict unless it is loaded or being loaded.
        """
        if not seconds > 0:
            raise InvalidRequest("'seconds' must be greater than 0.", param="seconds")
        record = self._staying(model_id)
        lease_id = self.new_id()
        record.holds[lease_id] = Hold(owner, self.now() + seconds)
        return lease_id

    def drop(self, lease_id: str) -> bool:
        """End a hold, which counts as use; False if there is none of that id (any more)."""
        for record in self._records.values():
            if record.holds.pop(lease_id, None) is not None:
                record.last_used = self.now()
                self._settle()
                return True
        return False

    @contextmanager
    def kept_out(self, model_id: str) -> Iterator[None]:
        """Keeps the model out of memory while its files change; Conflict if it is in memory, waited for or held."""
        record = self._records.get(model_id)
        if record is not None and (record.process is not None or record.waiters or record.holds):
            raise Conflict(f"{model_id!r} is {record.state if record.process else record.protection or 'waited for'}.")
        if model_id in self._kept_out:
            raise Conflict(f"The files of {model_id!r} are being changed already.")
        self._kept_out.add(model_id)
        try:
            yield
        finally:
            self._kept_out.discard(model_id)

    def step(self, now: float) -> None:
        """What time brings: holds end, idle models expire, callers have waited long enough. Run it once a second."""
        for record in self._records.values():
            record.end_holds(now)
            if record.expired(now):
                self._processes.begin_stop(record, "expired")
            elif record.stalled(now, self.workers.stall_seconds):
                self._processes.kill_stalled(record)
        self._settle()
        for record in self._records.values():
            if record.queued:
                record.fail_waiters(self.plan(record.files).refusal(), until=now)
            elif record.state is not ModelState.LOADING:
                record.fail_waiters(ModelLoading(f"{record.id!r} is being unloaded. Try again later."), until=now)

    def snapshot(self) -> tuple[ResidentModel, ...]:
        """Every model that is in memory, waited for, or not in memory against expectation. For reading only."""
        now, wall = self.now(), self.wall()
        return tuple(r.show(now, wall) for r in self._records.values() if r.process or r.waiters or r.reason)

    async def close(self) -> None:
        """Stop every worker, all at once, and refuse whoever waits; leases do not delay it.

        Goes on where its caller is cancelled. Bounded by what a stop may take: the grace before the first signal,
        as much before the last, and a second to be reaped.
        """
        self._processes.closing = True
        with anyio.move_on_after(2 * self.stop_grace_seconds + 1, shield=True):
            async with anyio.create_task_group() as group:
                for record in self._records.values():
                    record.fail_waiters(Draining())
                    if record.process is not None:
                        group.start_soon(self._processes.close_one, record, record.process)

    def check(self) -> None:
        """Raises AssertionError if records and ledger contradict each other."""
        for record in self._records.values():
            record.check(self.memory.reserved_by(record.id))
        owned = sum(r.promised_bytes() + self.memory.grown_by(r.id) for r in self._records.values() if r.process)
        assert self.memory.reserved_bytes == owned, "a reservation has no owner"

    async def _acquire(self, files: ModelFiles, ttl_seconds: float | None) -> Lease:
        if self._processes.closing:
            raise Draining()
        if files.id in self._kept_out:
            raise Conflict(f"The files of {files.id!r} are being changed.")
        record = self._records.get(files.id)
        if record is None:
            record = self._records[files.id] = Record.of(files, self.config, self.on_change)
        if record.state is ModelState.READY and not record.unloads:
            return self._processes.grant(record)
        record.files = files
        granted: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        deadline = self.now() + self.room_wait_seconds
        record.waiters.append(Waiter(granted, next(self._numbers), deadline, ttl_seconds))
        self._settle()
        try:
            return await granted
        except asyncio.CancelledError:
            # The grant may have come in the same turn of the loop as the cancellation: then nobody took it.
            if granted.done() and not granted.cancelled() and granted.exception() is None:
                granted.result().release()
            self._settle()
            raise

    def _settle(self) -> None:
        """Decide whatever can be decided now.

        1. Nobody waits who has left.  2. An unload whose model is idle begins.  3. Callers kept back for an unload
        that was given up are served.  4. Loads start or are refused in the order their first callers came; one for
        which others are being stopped lets nobody pass, one that waits for busy models does.
        """
        for record in self._records.values():
            record.forget_leavers()  # 1
            process = record.process
            if record.state is not ModelState.READY or process is None:
                continue
            if record.unloads and process.leases == 0:  # 2
                self._processes.begin_stop(record, "unloaded")
            elif not record.unloads:  # 3
                self._processes.grant_waiters(record)
        if self._processes.closing:
            return
        for record in sorted((r for r in self._records.values() if r.queued), key=lambda r: r.waiters[0].number):  # 4
            if not self._start_or_refuse(record):
                break

    def _start_or_refuse(self, record: Record) -> bool:
        """Do what the plan says; False if nobody may pass this load.

        A model whose worker died waits for its turn to be restarted, which ``step`` looks for, and not for ever.
        """
        limit, window = self.workers.restart_limit, self.workers.restart_window_seconds
        start_at = next_start(record.deaths, self.now(), limit, window)
        if start_at is None:
            record.give_up(window)
            return True
        if start_at > self.now():
            return True
        options = self.options(record.files)
        plan = self._plan(record.files, options)
        if plan.verdict is Verdict.FITS:
            self._processes.begin_load(record, options, plan)
        elif plan.verdict is Verdict.FITS_AFTER_EVICTION:
            _log.info("eviction_chosen", model=record.id, **plan.as_dict())
            for victim in plan.would_evict:
                self._processes.begin_stop(self._records[victim], "evicted")
        elif plan.verdict is Verdict.DOES_NOT_FIT:
            _log.warning("load_refused", model=record.id, **plan.as_dict())
            record.fail_waiters(plan.refusal())
        return plan.verdict not in (Verdict.FITS_AFTER_STOP, Verdict.FITS_AFTER_EVICTION)

    def _plan(self, files: ModelFiles, options: LoadOptions) -> LoadPlan:
        residents = [r.resident(self.memory.grown_by(r.id)) for r in self._records.values() if r.process]
        need, ledger = self.memory.need(files, options), self.memory.ledger(0)
        return plan_load(files.id, need, ledger, residents, evict=self.auto_evict)

    def _staying(self, model_id: str) -> Record:
        """The record of a model that is loaded or will be, and that nobody is unloading; else raises Conflict."""
        record = self._records.get(model_id)
        if record is None or record.state not in (ModelState.LOADING, ModelState.READY):
            raise Conflict(f"{model_id!r} is not loaded.")
        record.forget_leavers()
        if record.unloads:
            raise Conflict(f"{model_id!r} is being unloaded.")
        return record
