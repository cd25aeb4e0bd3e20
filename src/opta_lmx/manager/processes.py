"""Carries out what ``residency.py`` decides: loads and stops as tasks, leases, and the one event each life ends with.

A part of the residency, which alone makes and asks it. Nothing is decided here: after every event ``settle`` is
called, and what follows from it is the residency's to say.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import anyio
import msgspec

from opta_lmx.errors import Draining, LmxError, LoadFailed, WorkerLost
from opta_lmx.manager.memory import LoadPlan, MemoryMonitor
from opta_lmx.manager.resident import Lease, Process, Record
from opta_lmx.monitoring.logging import get_logger
from opta_lmx.types import LoadOptions, ModelState, SpawnWorker, TaskStarter, Worker, WorkerExit

_log = get_logger(__name__)


@dataclass(eq=False)
class ModelProcesses:
    """Starts, leases and ends the processes of records. ``idle_time`` gives the seconds a model just loaded may idle.

    Once ``closing``, a load that has not begun its process never does.
    """

    memory: MemoryMonitor
    spawn: SpawnWorker
    tasks: TaskStarter
    idle_time: Callable[[Record], float | None]
    settle: Callable[[], None]
    now: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    # How long a worker may take to end by itself before it is signalled; it has no request left to finish.
    stop_grace_seconds: float = 5.0
    closing: bool = False

    def grant(self, record: Record) -> Lease:
        """A lease on a ready model; whoever releases it has used the model until then."""
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
            self.settle()

    def begin_load(self, record: Record, options: LoadOptions, plan: LoadPlan) -> None:
        """Promise the plan's need and start a process, which ends in ``_load_ended``."""
        _log.info("load_started", model=record.id, **plan.as_dict())
        # Absent with a reason: its worker has died.
        record.restarts += record.state is ModelState.ABSENT and record.reason is not None
        record.become(ModelState.LOADING, Process(plan.need), record.reason)
        self.memory.reserve(record.id, plan.need.total_bytes)
        options = msgspec.structs.replace(options, reloaded=record.request_count > 0)
        options = plan.need.limit_worker(options, self.memory.reading().working_set_bytes)
        self.tasks.start_soon(self._run_load, record, record.process, options)

    async def _run_load(self, record: Record, process: Process, options: LoadOptions) -> None:
        outcome: Worker | LmxError = Draining()
        started = self.now()
        try:
            with anyio.CancelScope() as process.scope:
                if not self.closing:
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
            if isinstance(outcome, WorkerLost) or (isinstance(outcome, LoadFailed) and outcome.crashed):
                record.deaths.append(self.now())
            _log.warning("load_failed", model=record.id, seconds=round(seconds, 3), reason=str(outcome))
            record.become(ModelState.FAILED, None, str(outcome))
            self.memory.release(record.id)
            record.fail_waiters(outcome)
            record.answer_unloads(0)
        else:
            record.forget_leavers()
            record.last_used = self.now()
            process.worker, process.loaded_at, process.ttl_seconds = outcome, self.wall(), self.idle_time(record)
            record.become(ModelState.READY, process, None)
            # The weights are footprint now, which every reading shows; caches and buffers have still to be filled.
            self.memory.reserve(record.id, process.need.held_bytes)
            outcome.govern_kv(partial(self.memory.grow_kv, record.id, process.need.kv_bytes))
            process.used_before_bytes = self.memory.reading(0).used_bytes
            _log.info(
                "model_loaded",
                model=record.id,
                pid=outcome.pid,
                seconds=round(seconds, 3),
                need_bytes=process.need.total_bytes,
                used_bytes=process.used_before_bytes,
            )
            self.grant_waiters(record)
        process.load_ended.set()
        self.settle()

    def grant_waiters(self, record: Record) -> None:
        """A lease for everybody who waits for a model that is ready."""
        for waiter in record.waiters:
            waiter.granted.set_result(self.grant(record))
        record.waiters = []

    def begin_stop(self, record: Record, cause: str) -> None:
        """Ask a ready model's process to end, which ends in ``_gone``."""
        process = record.process
        assert process is not None
        idle_seconds = round(self.now() - record.last_used, 3)
        _log.info("stop_started", model=record.id, cause=cause, idle_seconds=idle_seconds)
        record.become(ModelState.STOPPING, process, record.reason, cause)
        process.used_before_bytes = self.memory.reading(0).used_bytes
        self.tasks.start_soon(self._run_stop, record, process)

    async def _run_stop(self, record: Record, process: Process) -> None:
        if process.worker is not None:
            await process.worker.stop(self.stop_grace_seconds)
        self._gone(record, process)

    def kill_stalled(self, record: Record) -> None:
        """End a worker that makes no step, which ends in ``_gone`` as any death does."""
        process = record.process
        assert process is not None
        assert process.worker is not None
        silent = process.watch.silent_seconds
        _log.error("worker_stalled", model=record.id, pid=process.worker.pid, silent_seconds=silent)
        process.worker.kill(f"it made no step for {silent:.0f} seconds and was ended")

    async def close_one(self, record: Record, process: Process) -> None:
        """End a process whatever it does, a load too; returns once it has gone."""
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
            record.deaths.append(self.now())
            self._gone(record, process, process.last_words)

    def _gone(self, record: Record, process: Process, reason: str | None = None) -> None:
        """The one event that ends a life in memory: the process has been reaped."""
        if record.process is not process:
            return
        record.become(ModelState.ABSENT, None, reason)
        self.memory.release(record.id)
        used = self.memory.reading(0).used_bytes
        freed = max(0, process.used_before_bytes - used)
        _log.info("model_unloaded", model=record.id, freed_bytes=freed, used_bytes=used)
        record.answer_unloads(freed)
        self.settle()
