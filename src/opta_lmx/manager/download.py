"""The owner of downloads: which run, how far they are, and how each ended.

A download is a child process (``fetch.py``), so neither its hashing nor its library touches the server, and to cancel
it is to kill it. What it has written stays in ``<publisher>/<name>.incomplete`` for the next attempt. Only a directory
whose every file has the hub's hash, and is in models.lock, is renamed to where a model may be loaded from.
"""

import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import anyio
import msgspec
from anyio.abc import TaskGroup

from opta_lmx.config import DownloadsConfig
from opta_lmx.errors import Conflict, DiskFull, DownloadError, Draining, HubUnreachable, LmxError
from opta_lmx.manager.child import spawn
from opta_lmx.manager.download_job import Download, DownloadState, Job
from opta_lmx.manager.hub import (
    DEFAULT_ENDPOINT,
    INCOMPLETE_SUFFIX,
    Failed,
    Order,
    Patience,
    Plan,
    Progress,
    Recorded,
    Report,
    check_wish,
)
from opta_lmx.manager.hub_token import find_token
from opta_lmx.manager.integrity import ModelRecord, ModelsLock
from opta_lmx.manager.model import ModelManager
from opta_lmx.monitoring.logging import get_logger
from opta_lmx.types import TaskStarter

_log = get_logger(__name__)

# Ended downloads that can still be asked for.
_KEPT = 64

# Python's exit code after an exception that nobody caught.
_CRASHED = 1

# A plan names every file of a repository in one line.
_MAX_LINE_BYTES = 64 * 1024 * 1024

_OFFLINE_NAMES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")

_reports = msgspec.json.Decoder(Report)


@dataclass(frozen=True, slots=True)
class Machine:
    """What downloads are given of the machine: variables, free bytes below a directory, a clock, and patience."""

    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    free_bytes: Callable[[Path], int] = lambda directory: shutil.disk_usage(directory).free
    now: Callable[[], float] = time.monotonic
    patience: Patience = field(default_factory=Patience)


class DownloadManager:
    """Runs downloads into ``root``, the models directory; ``models`` is told of each that is complete."""

    def __init__(
        self,
        config: DownloadsConfig,
        root: Path,
        models: ModelManager,
        tasks: TaskStarter,
        machine: Machine | None = None,
        *,
        on_change: Callable[[Download], None] = lambda download: None,
    ) -> None:
        self._config = config
        self._root = root
        self._models = models
        self._tasks = tasks
        self._machine = machine or Machine()
        self._lock = ModelsLock(root)
        self._on_change = on_change
        self._jobs: dict[str, Job] = {}
        self._slots = anyio.Semaphore(config.max_parallel)
        self._closing = False

    def reconfigure(self, config: DownloadsConfig) -> None:
        """Take changed settings, for downloads that start from now on; ``max_parallel`` stays as it was."""
        self._config = config

    async def start(
        self, repo_id: str, revision: str | None = None, allow_patterns: Sequence[str] | None = None
    ) -> Download:
        """Begins a download, or joins the same one in flight; answers once the hub has listed the files.

        Complete at once if models.lock says that these files of this revision are here. Refuses before the first byte:
        InvalidRequest, ModelNotFound, DiskFull, HubUnreachable, DownloadError, and Conflict if the directory is there
        with something else in it or the repository is being downloaded in another way; Draining after ``close``.
        """
        if self._closing:
            raise Draining()
        check_wish(repo_id, revision, allow_patterns)
        patterns = tuple(allow_patterns or ())
        running = (job for job in self._jobs.values() if not job.state.is_last)
        job = next((job for job in running if _is_same(job.repo_id, repo_id)), None)
        if job is None:
            job = Job(uuid4().hex, repo_id, revision, patterns)
            self._jobs[job.id] = job
            self._tasks.start_soon(self._run, job)
        elif (job.repo_id, job.revision, job.patterns) != (repo_id, revision, patterns):
            raise Conflict(f"{job.repo_id!r} is being downloaded at another revision or with other patterns.")
        while job.state is DownloadState.PREPARING:
            await job.changed.wait()
        if job.plan is None:
            raise job.error or self._cut_off(repo_id)
        return job.snapshot()

    def _cut_off(self, repo_id: str) -> LmxError:
        return Draining() if self._closing else Conflict(f"The download of {repo_id!r} was cancelled.")

    def list(self) -> tuple[Download, ...]:
        """Downloads that run and the last that ended, oldest first."""
        return tuple(job.snapshot() for job in self._jobs.values())

    def get(self, download_id: str) -> Download | None:
        """The download of this id."""
        job = self._jobs.get(download_id)
        return job.snapshot() if job else None

    async def events(self, download_id: str) -> AsyncIterator[Download]:
        """The download now and after each change, up to its end; a slow reader is spared what has passed."""
        job = self._jobs.get(download_id)
        while job is not None:
            changed = job.changed
            snapshot = job.snapshot()
            yield snapshot
            if snapshot.state.is_last:
                return
            await changed.wait()

    async def cancel(self, download_id: str) -> Download | None:
        """Ends a download that runs and waits for its end; what it has is kept for the next attempt."""
        job = self._jobs.get(download_id)
        if job is None:
            return None
        job.scope.cancel()
        while not job.state.is_last:
            await job.changed.wait()
        return job.snapshot()

    async def close(self) -> None:
        """Ends every download as ``cancel`` does, and begins no other: the next server goes on with what is here."""
        self._closing = True
        for job in list(self._jobs.values()):
            await self.cancel(job.id)

    async def _run(self, job: Job) -> None:
        """A download from its beginning to its one end."""
        started = self._machine.now()
        state = DownloadState.CANCELLED
        try:
            with job.scope:
                await self._download(job)
                state = DownloadState.COMPLETED
        except (LmxError, OSError) as error:
            state = DownloadState.FAILED
            job.error = error if isinstance(error, LmxError) else _disk_error(error)
        finally:
            if state is not DownloadState.COMPLETED:
                self._tidy(job.repo_id)
            self._end(job, state)
        seconds = round(self._machine.now() - started, 3)
        reason = str(job.error) if job.error else None
        _log.info(f"download_{state}", model=job.repo_id, bytes=job.total_bytes, seconds=seconds, reason=reason)

    def _end(self, job: Job, state: DownloadState) -> None:
        job.state = state
        if job.plan is None:
            # Whoever asked for it is told by start; nobody else knows of it.
            del self._jobs[job.id]
        for old in [job.id for job in self._jobs.values() if job.state.is_last][:-_KEPT]:
            del self._jobs[old]
        job.tell()
        if job.plan is not None:
            self._on_change(job.snapshot())

    async def _download(self, job: Job) -> None:
        record = self._check_place(job.repo_id)
        if record is not None and (record.revision, record.patterns) == (job.revision, job.patterns):
            job.adopt(record)
            return
        for name in _OFFLINE_NAMES:
            if self._machine.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
                raise HubUnreachable(f"{name} is set, so nothing is downloaded; models on disk go on working.")
        error = await self._with_child(job, record)
        if error is not None:
            raise error

    def _check_place(self, repo_id: str) -> ModelRecord | None:
        """The record of what is there already, None if the place is free. Raises Conflict if it is another's."""
        target = self._root / repo_id
        publisher = target.parent
        if publisher.is_symlink() or self._models.find(publisher.name) is not None:
            raise Conflict(f"{publisher.name!r} in the models directory is no folder of a publisher's models.")
        for place in (publisher, target):
            if other := _spelled_otherwise(place):
                raise Conflict(f"{other!r} is in the models directory; on many disks {place.name!r} is the same name.")
        if not os.path.lexists(target):
            return None
        record = self._lock.find(repo_id)
        if record is None or record.source != repo_id:
            raise Conflict(f"{repo_id!r} is on disk already and was not downloaded here. Delete or move it first.")
        return record

    async def _with_child(self, job: Job, record: ModelRecord | None) -> LmxError | None:
        """Runs the child to its end, whatever happens here; gives the error the download has ended with."""
        process = await self._spawn(job)
        assert process.stdout is not None
        assert process.stderr is not None
        last_words = b""
        outcome: LmxError | None = None
        try:
            async with anyio.create_task_group() as group:
                outcome = await self._follow(job, process, record, group)
                group.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                with suppress(ProcessLookupError):
                    process.kill()
                last_words = await process.stderr.read()
                await process.wait()
            for _ in range(job.slots):
                self._slots.release()
            job.slots = 0
        if process.returncode == _CRASHED:
            _log.error("download_crashed", model=job.repo_id, stderr=last_words.decode(errors="replace")[-4096:])
        return outcome

    async def _spawn(self, job: Job) -> asyncio.subprocess.Process:
        config = self._config
        environ = dict(self._machine.environ) | {"HF_HUB_DISABLE_TELEMETRY": "1"}
        # The token reaches the child by its input: what is in no environment is in no crash report of one.
        token = find_token(config, environ)
        environ.pop(config.token_env or "", None)
        order = Order(
            endpoint=(config.endpoint or DEFAULT_ENDPOINT).rstrip("/"),
            token=token.value,
            token_name=token.source,
            repo_id=job.repo_id,
            revision=job.revision,
            patterns=job.patterns,
            root=str(self._root),
            patience=self._machine.patience,
        )
        process = await spawn("opta_lmx.manager.fetch", env=environ, line_bytes=_MAX_LINE_BYTES)
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(order) + b"\n")
        return process

    async def _follow(
        self, job: Job, process: asyncio.subprocess.Process, record: ModelRecord | None, group: TaskGroup
    ) -> LmxError | None:
        """Reads the child's reports; gives the error the download ends with, None if it is complete."""
        assert process.stdout is not None
        line = b""
        try:
            while line := await process.stdout.readline():
                match _reports.decode(line):
                    case Plan() as plan if record is not None:
                        self._compare(plan, record, job)
                        return None
                    case Plan() as plan:
                        self._begin(job, plan)
                        group.start_soon(self._grant, job, process)
                    case Progress() as progress:
                        self._advance(job, progress)
                    case Recorded():
                        self._finish(job)
                        return None
                    case Failed() as failed:
                        return failed.to_error()
        except LmxError as error:
            return error
        except msgspec.DecodeError:
            # Something in its environment writes where the reports go, before its first line of ours can prevent that.
            _log.error("download_garbled", model=job.repo_id, line=line[:200].decode(errors="replace"))
        return DownloadError("The download process ended unexpectedly; the server's log tells more.")

    def _compare(self, plan: Plan, record: ModelRecord, job: Job) -> None:
        if plan.commit != record.revision or not {file.path for file in plan.files} <= record.files.keys():
            raise Conflict(
                f"{job.repo_id!r} is on disk at revision {record.revision}; delete it to download {plan.commit}, "
                "or other files of it."
            )
        job.adopt(record)

    def _begin(self, job: Job, plan: Plan) -> None:
        """Raises DiskFull if the files do not fit beside what other downloads still have to write."""
        need = sum(file.size - plan.present.get(file.path, 0) for file in plan.files)
        existing = next(path for path in (self._root, *self._root.parents) if path.is_dir())
        promised = sum(other.remaining_bytes for other in self._jobs.values() if not other.state.is_last)
        free = max(0, self._machine.free_bytes(existing) - promised)
        if need > free:
            raise DiskFull(need, free)
        job.plan = plan
        job.done = dict(plan.present)
        job.state = DownloadState.DOWNLOADING
        _log.info("download_started", model=job.repo_id, commit=plan.commit, bytes=job.total_bytes, need_bytes=need)
        job.tell()
        self._on_change(job.snapshot())

    async def _grant(self, job: Job, process: asyncio.subprocess.Process) -> None:
        """Lets the child begin its files, each when one of the places that all downloads share is free."""
        assert process.stdin is not None
        for _ in job.plan.files if job.plan else ():
            await self._slots.acquire()
            job.slots += 1
            process.stdin.write(b"\n")

    def _advance(self, job: Job, progress: Progress) -> None:
        for _ in range(job.advance(progress, self._machine.now())):
            job.slots -= 1
            self._slots.release()
        job.tell()

    def _finish(self, job: Job) -> None:
        target = self._root / job.repo_id
        if os.path.lexists(target):
            raise Conflict(f"{job.repo_id!r} has come to the disk meanwhile.")
        target.with_name(target.name + INCOMPLETE_SUFFIX).rename(target)
        self._models.refresh()

    def _tidy(self, repo_id: str) -> None:
        """Leaves nothing but what the next attempt can use."""
        target = self._root / repo_id
        home = target.with_name(target.name + INCOMPLETE_SUFFIX)
        folders = [Path(folder) for folder, _, _ in os.walk(home, topdown=False)]
        for folder in (*folders, target.parent):
            with suppress(OSError):
                folder.rmdir()
        if not os.path.lexists(target):
            with suppress(LmxError, OSError):
                self._lock.forget(repo_id)


def _is_same(repo_id: str, other: str) -> bool:
    """True if they are one directory on a disk that does not tell upper case from lower, as a Mac's."""
    return repo_id.casefold() == other.casefold()


def _spelled_otherwise(place: Path) -> str | None:
    """The name of what lies in ``place``'s folder and differs from it in case alone."""
    with suppress(OSError):
        for other in place.parent.iterdir():
            if other.name != place.name and _is_same(other.name, place.name):
                return other.name
    return None


def _disk_error(error: OSError) -> DownloadError:
    return DownloadError(f"The download failed ({error.strerror}).")
