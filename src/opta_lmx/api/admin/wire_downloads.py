"""The JSON shapes of downloads. Sizes are bytes."""

from typing import Annotated

from pydantic import Field

from opta_lmx.api.admin.wire import Wire
from opta_lmx.api.openai.wire import ErrorDetail
from opta_lmx.manager.download_job import DownloadState


class DownloadRequest(Wire):
    """What to download; ``revision`` is a branch, a tag or a commit (the default branch where it is absent)."""

    repo_id: Annotated[str, Field(min_length=1, max_length=193, examples=["mlx-community/Qwen3-0.6B-4bit"])]
    revision: Annotated[str, Field(min_length=1, max_length=255)] | None = None
    allow_patterns: (
        Annotated[list[Annotated[str, Field(min_length=1, max_length=255)]], Field(min_length=1, max_length=64)] | None
    ) = None


class DownloadedFile(Wire):
    """One file; ``verified`` once all its bytes have the hub's hash."""

    path: str
    size_bytes: int
    done_bytes: int
    verified: bool


class DownloadStatus(Wire):
    """A download now. ``error`` says why it failed, ``commit`` and ``files`` what was found on the hub."""

    download_id: str
    repo_id: str
    revision: str | None
    commit: str | None
    state: DownloadState
    done_bytes: int
    total_bytes: int
    bytes_per_second: float
    eta_seconds: float | None
    files: list[DownloadedFile]
    error: ErrorDetail | None


class Downloads(Wire):
    """The answer of GET /admin/models/download."""

    downloads: list[DownloadStatus]
