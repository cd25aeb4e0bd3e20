"""The parent's side of a GGUF import: check the file, run the job in a child process, answer everybody who waits.

The job itself is ``inference/worker/convert.py``; its docstring says how it speaks.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import anyio
from anyio import to_thread

from opta_lmx.errors import Draining, LmxError
from opta_lmx.manager.child import spawn
from opta_lmx.manager.gguf import GgufError, inspect
from opta_lmx.manager.gguf_size import ImportForm
from opta_lmx.monitoring.logging import get_logger

_log = get_logger(__name__)

# Rises when an import of the same file would give other bytes: older imports are then made again.
IMPORT_VERSION = 2

# The directories the job writes to, beside their target (the same word as in convert.py).
STAGING_SUFFIX = ".import.incomplete"

# What is kept of the job's standard error, for the reason of a crash.
_STDERR_TAIL_BYTES = 4096


# Seconds between two log lines on the progress of one import.
_LOG_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class ImportProgress:
    """How far an import is, in bytes of the source's tensors; both are 0 until its header has been read."""

    done_bytes: int
    total_bytes: int


@dataclass(slots=True)
class _Job:
    """One running import. ``error`` is its failure; ``abandoned`` if its caller was cancelled before the end."""

    progress: ImportProgress = ImportProgress(0, 0)
    ended: anyio.Event = field(default_factory=anyio.Event)
    error: LmxError | GgufError | OSError | None = None
    abandoned: bool = True
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)


class GgufImporter:
    """Runs at most one job for each target; callers that come meanwhile share its outcome.

    A job reports every 2 million values; a machine that needs longer than ``stall_seconds`` for so few is not
    working.
    """

    def __init__(
        self,
        form: ImportForm | None = None,
        now: Callable[[], float] = time.monotonic,
        stall_seconds: float = 300.0,
    ) -> None:
        self._form = form or ImportForm()
        self._now = now
        self._stall_seconds = stall_seconds
        self._jobs: dict[Path, _Job] = {}
        self._closing = False

    def progress(self, target: Path) -> ImportProgress | None:
        """How far the import to ``target`` is; None if none runs."""
        job = self._jobs.get(target)
        return job.progress if job is not None else None

    async def import_gguf(self, source: Path, target: Path, finish: Callable[[], None] | None = None) -> None:
        """Makes ``target`` an MLX model directory, replacing one that is there.

        ``finish`` runs in a thread once the directory is in place, before anybody is answered. Raises GgufError or
        OSError, and then nothing is left behind, or what ``finish`` raises. If the caller that runs the job is
        cancelled, the job is killed and one of those who wait starts it again; after ``close`` all get Draining.
        """
        while (running := self._jobs.get(target)) is not None:
            await running.ended.wait()
            if running.error is not None:
                raise running.error
            if not running.abandoned:
                return
        if self._closing:
            raise Draining()
        job = self._jobs[target] = _Job()
        started = self._now()
        try:
            await to_thread.run_sync(inspect, source)
            with job.scope:
                await self._run(source, target, job)
            if job.scope.cancelled_caught:
                raise Draining()
            if finish is not None:
                await to_thread.run_sync(finish)
            job.abandoned = False
            _log.info("gguf_imported", source=source.name, seconds=round(self._now() - started, 3))
        except (LmxError, GgufError, OSError) as error:
            job.error = error
            _log.warning("gguf_import_failed", source=source.name, reason=str(error))
            raise
        finally:
            del self._jobs[target]
            job.ended.set()

    def close(self) -> None:
        """Ends every import and begins no other: whoever waits for one is told that the server stops."""
        self._closing = True
        for job in self._jobs.values():
            job.scope.cancel()

    async def _run(self, source: Path, target: Path, job: _Job) -> None:
        """Runs the job to its end; kills it when cancelled or stalled. A job that fails leaves nothing behind."""
        process = await spawn(
            *("opta_lmx.inference.worker.convert", os.fspath(source), os.fspath(target)),
            *("--precision", "full" if self._form.full else "half", "--bits", str(self._form.bits)),
        )
        assert process.stderr is not None
        tail = bytearray()
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(_read_tail, process.stderr, tail)
                refusal = await self._read_progress(process, source.name, job)
            code = await process.wait()
        finally:
            with anyio.CancelScope(shield=True):
                _kill(process)
                if await process.wait() != 0:
                    await to_thread.run_sync(discard, target.with_name(target.name + STAGING_SUFFIX))
        if refusal is not None:
            raise GgufError(refusal)
        if code != 0:
            last = tail.decode(errors="replace").strip().rpartition("\n")[2]
            raise GgufError(f"the import ended with exit code {code}" + (f" ({last})" if last else ""))

    async def _read_progress(self, process: asyncio.subprocess.Process, name: str, job: _Job) -> str | None:
        """Reads the job's lines to their end; the reason if it refused. A job that says nothing for long is killed."""
        assert process.stdout is not None
        refusal: str | None = None
        logged = self._now()
        while True:
            try:
                with anyio.fail_after(self._stall_seconds):
                    line = await process.stdout.readline()
            except TimeoutError:
                _kill(process)
                return f"the import made no progress for {self._stall_seconds:g} seconds"
            if not line:
                return refusal
            message = json.loads(line)
            refusal = message.get("error", refusal)
            if "done" in message:
                job.progress = ImportProgress(message["done"], message["total"])
            if self._now() - logged >= _LOG_SECONDS:
                logged = self._now()
                done, total = job.progress.done_bytes, job.progress.total_bytes
                _log.info("gguf_import_progress", source=name, done_bytes=done, total_bytes=total)


def discard(directory: Path) -> None:
    """Removes a job's directory, unless a living job holds it."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(directory, ignore_errors=True)
    except BlockingIOError:
        return
    finally:
        os.close(descriptor)


def _kill(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()


async def _read_tail(stderr: asyncio.StreamReader, tail: bytearray) -> None:
    while chunk := await stderr.read(_STDERR_TAIL_BYTES):
        tail += chunk
        del tail[:-_STDERR_TAIL_BYTES]
