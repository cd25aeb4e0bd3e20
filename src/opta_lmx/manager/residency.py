"""The owner of loaded models: the only writer of their states, leases, pins and last use.

Every decision is a synchronous method on the event loop, with no ``await`` between reading and writing. Loads and
stops run as tasks that report back as exactly one event (``_load_ended``, ``_gone``), and after every event
``_settle`` decides whatever can be decided now. What happens when two wishes meet:

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
from functools import partial
from uuid import uuid4

import anyio
import msgspec

from opta_lmx.config_models import ModelsConfig, PerModel
from opta_lmx.errors import Conflict, Draining, InvalidRequest, LmxError, ModelLoading, ModelNotFound, WorkerLost
from opta_lmx.manager.memory import LoadPlan, MemoryMonitor, Verdict, plan_load
from opta_lmx.manager.resident import Hold, Lease, LoadResult, Process, Record, ResidentModel, UnloadResult, Waiter
from opta_lmx.monitoring.logging import get_logger
from opta_lmx.types import LoadOptions, ModelFiles, ModelState, SpawnWorker, TaskStarter, Worker, WorkerExit

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
    # Most generations end within it; a caller that would wait longer is better told to come back.
    room_wait_seconds: float = 30.0
    # How long a worker may take to end by itself before it is signalled; it has no request left to finish.
    stop_grace_seconds: float = 5.0
    new_id: Callable[[], str] = lambda: uuid4().hex
    on_stop: Callable[[str, str], None] = lambda model_id, cause: None  # told of every stop, as the log is
    _records: dict[str, Record] = field(init=False, repr=False, default_factory=dict)
    _kept_out: set[str] = field(init=False, repr=False, default_factory=set)
    _numbers: Iterator[int] = field(init=False, repr=False, default_factory=itertools.count)
    _closing: bool = field(init=False, repr=False, default=False)

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

    async def load(self, files: ModelFiles, *, ttl_seconds: float | None = None) -> LoadResult:
        """Have the model in memory; joins a load in flight. Raises as ``lease`` does."""
        started = self.now()
        lease = await self._acquire(files, ttl_seconds)
        lease.release()
        return LoadResult(files.id, self.memory.reading(0).used_bytes, self.now() - started)

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
                self._begin_stop(record, "expired")
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
        self._closing = True
        with anyio.move_on_after(2 * self.stop_grace_seconds + 1, shield=True):
            async with anyio.create_task_group() as group:
                for record in self._records.values():
                    record.fail_waiters(_draining())
                    if record.process is not None:
                        group.start_soon(self._close_one, record, record.process)

    def check(self) -> None:
        """Raises AssertionError if records and ledger contradict each other."""
        for record in self._records.values():
            record.check(self.memory.reserved_by(record.id))
        owned = sum(r.promised_bytes() + self.memory.grown_by(r.id) for r in self._records.values() if r.process)
        assert self.memory.reserved_bytes == owned, "a reservation has no owner"

    async def _acquire(self, files: ModelFiles, ttl_seconds: float | None) -> Lease:
        if self._closing:
            raise _draining()
        if files.id in self._kept_out:
            raise Conflict(f"The files of {files.id!r} are being changed.")
        record = self._records.get(files.id)
        if record is None:
            own = self.config.per_model.get(files.id, PerModel())
            record = self._records[files.id] = Record(files, pinned=own.pinned)
        if record.state is ModelState.READY and not record.unloads:
            return self._grant(record)
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

    def _grant(self, record: Record) -> Lease:
        process = record.process
        assert process is not None
        assert process.worker is not None
        process.leases += 1
        record.last_used = self.now()
        return Lease(record.id, process.worker, partial(self._give_back, record, process))

    def _give_back(self, record: Record, process: Process) -> None:
        process.leases -= 1
        if record.process is process:
            record.last_used = self.now()
            self._settle()

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
                self._begin_stop(record, "unloaded")
            elif not record.unloads:  # 3
                self._grant_waiters(record)
        if self._closing:
            return
        for record in sorted((r for r in self._records.values() if r.queued), key=lambda r: r.waiters[0].number):  # 4
            if not self._start_or_refuse(record):
                break

    def _start_or_refuse(self, record: Record) -> bool:
        """Do what the plan says; False if nobody may pass this load."""
        options = self.options(record.files)
        plan = self._plan(record.files, options)
        if plan.verdict is Verdict.FITS:
            self._begin_load(record, options, plan)
        elif plan.verdict is Verdict.FITS_AFTER_EVICTION:
            _log.info("eviction_chosen", **plan.as_dict())
            for victim in plan.would_evict:
                self._begin_stop(self._records[victim], "evicted")
        elif plan.verdict is Verdict.DOES_NOT_FIT:
            _log.warning("load_refused", **plan.as_dict())
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

    def _begin_load(self, record: Record, options: LoadOptions, plan: LoadPlan) -> None:
        _log.info("load_started", **plan.as_dict())
        # Absent with a reason: its worker has died.
        record.restarts += record.state is ModelState.ABSENT and record.reason is not None
        record.state, record.process = ModelState.LOADING, Process(plan.need)
        self.memory.reserve(record.id, plan.need.total_bytes)
        reloaded = record.request_count > 0
        options = msgspec.structs.replace(options, kv_bytes=plan.need.kv_bytes, reloaded=reloaded)
        self.tasks.start_soon(self._run_load, record, record.process, options)

    async def _run_load(self, record: Record, process: Process, options: LoadOptions) -> None:
        outcome: Worker | LmxError = _draining()
        started = self.now()
        try:
            with anyio.CancelScope() as process.scope:
                if not self._closing:
                    try:
                        outcome = await self.spawn(record.files, options, partial(self._exited, record, process))
                    except LmxError as error:
                        outcome = error
        finally:
            self._load_ended(record, process, outcome, self.now() - started)

    def _load_ended(self, record: Record, process: Process, outcome: Worker | LmxError, seconds: float) -> None:
        """The one event of a load."""
        if not isinstance(outcome, LmxError) and process.last_words is not None:
            outcome = WorkerLost(record.id, process.last_words)
        if isinstance(outcome, LmxError):
            _log.warning("load_failed", model=record.id, seconds=seconds, reason=str(outcome))
            record.state, record.process, record.reason = ModelState.FAILED, None, str(outcome)
            self.memory.release(record.id)
            record.fail_waiters(outcome)
            record.answer_unloads(0)
        else:
            record.forget_leavers()
            record.state, record.reason, record.last_used = ModelState.READY, None, self.now()
            process.worker, process.loaded_at, process.ttl_seconds = outcome, self.wall(), self._ttl(record)
            # The weights are footprint now, which every reading shows; KV and prefix cache have still to be filled.
            self.memory.reserve(record.id, process.need.held_bytes)
            outcome.govern_kv(partial(self.memory.grow_kv, record.id, process.need.kv_bytes))
            process.used_before_bytes = self.memory.reading(0).used_bytes
            _log.info("model_loaded", model=record.id, pid=outcome.pid, seconds=seconds)
            self._grant_waiters(record)
        process.load_ended.set()
        self._settle()

    def _ttl(self, record: Record) -> float | None:
        asked = record.waiters[0].ttl_seconds if record.waiters else None
        own = self.config.per_model.get(record.id, PerModel()).ttl_seconds
        return next((ttl for ttl in (asked, own) if ttl is not None), self.config.ttl_seconds)

    def _grant_waiters(self, record: Record) -> None:
        for waiter in record.waiters:
            waiter.granted.set_result(self._grant(record))
        record.waiters = []

    def _begin_stop(self, record: Record, cause: str) -> None:
        process = record.process
        assert process is not None
        self.on_stop(record.id, cause)
        _log.info("stop_started", model=record.id, cause=cause, idle_seconds=self.now() - record.last_used)
        record.state = ModelState.STOPPING
        process.used_before_bytes = self.memory.reading(0).used_bytes
        self.tasks.start_soon(self._run_stop, record, process)

    async def _run_stop(self, record: Record, process: Process) -> None:
        if process.worker is not None:
            await process.worker.stop(self.stop_grace_seconds)
        self._gone(record, process)

    async def _close_one(self, record: Record, process: Process) -> None:
        if process.scope is not None:
            process.scope.cancel()
        if process.worker is None:
            await process.load_ended.wait()
        await self._run_stop(record, process)

    def _exited(self, record: Record, process: Process, exit: WorkerExit) -> None:
        """A worker has ended; where its load still runs or its stop was asked for, another event follows."""
        process.exit = exit
        if record.process is process and record.state is ModelState.READY and not exit.expected:
            _log.error("worker_lost", model=record.id, pid=exit.pid, leases=process.leases, reason=process.last_words)
            self._gone(record, process, process.last_words)

    def _gone(self, record: Record, process: Process, reason: str | None = None) -> None:
        """The one event that ends a life in memory: the process has been reaped."""
        if record.process is not process:
            return
        record.state, record.process, record.reason = ModelState.ABSENT, None, reason
        self.memory.release(record.id)
        freed = max(0, process.used_before_bytes - self.memory.reading(0).used_bytes)
        _log.info("model_unloaded", model=record.id, freed_bytes=freed)
        record.answer_unloads(freed)
        self._settle()


def _draining() -> Draining:
    return Draining("The server is shutting down.")
