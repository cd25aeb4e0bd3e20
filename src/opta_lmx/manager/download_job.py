"""One download: what is known of it, and how it looks from outside. ``download.py`` owns every one of them."""

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum

import anyio

from opta_lmx.errors import LmxError
from opta_lmx.manager.hub import HubFile, Plan, Progress
from opta_lmx.manager.integrity import ModelRecord

# The speed shown is that of the last seconds: short enough to follow the line, long enough to read.
_SPEED_SECONDS = 5.0


class DownloadState(StrEnum):
    """preparing -> downloading -> completed, failed or cancelled."""

    PREPARING = "preparing"  # the hub is asked
    DOWNLOADING = "downloading"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_last(self) -> bool:
        """True if nothing follows."""
        return self not in (DownloadState.PREPARING, DownloadState.DOWNLOADING)


@dataclass(frozen=True, slots=True)
class FileProgress:
    """One file; ``verified`` once all its bytes have the hub's hash."""

    path: str
    size_bytes: int
    done_bytes: int
    verified: bool


@dataclass(frozen=True, slots=True)
class Download:
    """A download as it is now. ``commit`` and ``files`` are known once the hub has answered.

    ``done_bytes`` counts what an earlier attempt has left; the speed does not. ``eta_seconds`` is None while unknown.
    """

    id: str
    repo_id: str
    revision: str | None
    commit: str | None
    state: DownloadState
    done_bytes: int
    total_bytes: int
    bytes_per_second: float
    eta_seconds: float | None
    files: tuple[FileProgress, ...]
    error: LmxError | None


@dataclass(slots=True, eq=False)
class Job:
    """The record of one download; only the manager's methods write to it."""

    id: str
    repo_id: str
    revision: str | None
    patterns: tuple[str, ...]
    state: DownloadState = DownloadState.PREPARING
    plan: Plan | None = None
    done: dict[str, int] = field(default_factory=dict)
    verified: set[str] = field(default_factory=set)
    error: LmxError | None = None
    # Files it has been allowed to begin and has not ended.
    slots: int = 0
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    changed: anyio.Event = field(default_factory=anyio.Event)
    # (time, bytes) of the last seconds.
    pace: deque[tuple[float, int]] = field(default_factory=deque)

    @property
    def total_bytes(self) -> int:
        """Bytes of all files, 0 while they are unknown."""
        return sum(file.size for file in self.plan.files) if self.plan else 0

    @property
    def remaining_bytes(self) -> int:
        """Bytes still to be written."""
        return self.total_bytes - sum(self.done.values())

    def adopt(self, record: ModelRecord) -> None:
        """All of it is here, as models.lock says."""
        files = tuple(HubFile(path, file.size, file.sha256, None) for path, file in record.files.items())
        self.done = {file.path: file.size for file in files}
        self.plan = Plan(record.revision, files, self.done)
        self.verified = set(self.done)

    def advance(self, progress: Progress, at: float) -> int:
        """Takes in how far the child is, at a time in seconds; gives how many files have ended since the last."""
        for path, size in progress.bytes.items():
            # What was there before is read again first, to be hashed.
            self.done[path] = max(size, self.done.get(path, 0))
        ended = set(progress.verified) - self.verified
        self.verified |= ended
        self.pace.append((at, sum(self.done.values())))
        while at - self.pace[0][0] > _SPEED_SECONDS:
            self.pace.popleft()
        return len(ended)

    def snapshot(self) -> Download:
        """The download as others see it."""
        speed, eta = 0.0, None
        if not self.state.is_last and len(self.pace) > 1:
            (first_at, first), (last_at, last) = self.pace[0], self.pace[-1]
            speed = (last - first) / (last_at - first_at) if last_at > first_at else 0.0
            eta = self.remaining_bytes / speed if speed > 0 else None
        return Download(
            id=self.id,
            repo_id=self.repo_id,
            revision=self.revision,
            commit=self.plan.commit if self.plan else None,
            state=self.state,
            done_bytes=sum(self.done.values()),
            total_bytes=self.total_bytes,
            bytes_per_second=speed,
            eta_seconds=eta,
            files=tuple(
                FileProgress(file.path, file.size, self.done.get(file.path, 0), file.path in self.verified)
                for file in (self.plan.files if self.plan else ())
            ),
            error=self.error,
        )

    def tell(self) -> None:
        """Wakes whoever follows the job."""
        self.changed.set()
        self.changed = anyio.Event()
