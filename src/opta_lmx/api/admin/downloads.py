"""/admin/models/download: bring a model from the hub, follow it, end it."""

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from opta_lmx.api.admin.wire_downloads import DownloadedFile, DownloadRequest, Downloads, DownloadStatus
from opta_lmx.api.errors import json_response, to_envelope
from opta_lmx.api.openai.wire import ErrorDetail
from opta_lmx.api.openapi import errors, event_stream, request_body
from opta_lmx.api.parsing import read_object
from opta_lmx.api.routing import Router
from opta_lmx.api.services import Services
from opta_lmx.api.validation import validate
from opta_lmx.errors import DownloadNotFound, Draining, ModelNotFound
from opta_lmx.manager.download_job import Download

router = Router(prefix="/admin/models/download", tags=["admin"])


@router.post(
    "",
    status_code=202,
    openapi_extra=request_body(DownloadRequest, a_model={"repo_id": "mlx-community/Qwen3-0.6B-4bit"}),
    response_model=DownloadStatus,
    responses=errors(404, 409, 502, 507),
)
async def start_download(request: Request) -> Response:
    """Answer 202 once the hub has listed the files and they fit on the disk; joins the same download in flight."""
    wanted = validate(DownloadRequest, await read_object(request))
    services: Services = request.app.state.services
    if services.engine.draining:
        raise Draining("The server is shutting down and takes no new work.")
    with _named_repo_id():
        download = await services.downloads.start(wanted.repo_id, wanted.revision, wanted.allow_patterns)
    return json_response(download_status(download).model_dump(mode="json"), status=202)


@router.get("")
async def list_downloads(request: Request) -> Downloads:
    """Downloads that run and the last that ended, oldest first."""
    services: Services = request.app.state.services
    return Downloads(downloads=[download_status(download) for download in services.downloads.list()])


@router.get("/{download_id}", responses=errors(404))
async def get_download(request: Request, download_id: str) -> DownloadStatus:
    """A download now."""
    services: Services = request.app.state.services
    return download_status(_found(download_id, services.downloads.get(download_id)))


@router.get(
    "/{download_id}/progress",
    response_class=StreamingResponse,
    responses={**errors(404), 200: {"content": event_stream('data: {"download_id":"d1","state":"completed",...}\n\n')}},
)
async def follow_download(request: Request, download_id: str) -> StreamingResponse:
    """Server-sent events, each the download as it is then, up to its end."""
    services: Services = request.app.state.services
    _found(download_id, services.downloads.get(download_id))
    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    events = _events(services.downloads.events(download_id))
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


@router.delete("/{download_id}", responses=errors(404))
async def cancel_download(request: Request, download_id: str) -> DownloadStatus:
    """End a download; answers when it has ended. Its bytes are kept for the next attempt."""
    services: Services = request.app.state.services
    return download_status(_found(download_id, await services.downloads.cancel(download_id)))


@contextmanager
def _named_repo_id() -> Iterator[None]:
    """A repository the hub does not have is told of by the name its field has here."""
    try:
        yield
    except ModelNotFound as error:
        error.param = "repo_id"
        raise


def _found(download_id: str, download: Download | None) -> Download:
    if download is None:
        raise DownloadNotFound(download_id)
    return download


async def _events(downloads: AsyncIterator[Download]) -> AsyncIterator[bytes]:
    async for download in downloads:
        yield b"data: " + msgspec.json.encode(download_status(download).model_dump(mode="json")) + b"\n\n"


def download_status(download: Download) -> DownloadStatus:
    """A download as the admin API shows it."""
    return DownloadStatus(
        download_id=download.id,
        repo_id=download.repo_id,
        revision=download.revision,
        commit=download.commit,
        state=download.state,
        done_bytes=download.done_bytes,
        total_bytes=download.total_bytes,
        bytes_per_second=round(download.bytes_per_second, 1),
        eta_seconds=None if download.eta_seconds is None else round(download.eta_seconds, 1),
        files=[
            DownloadedFile(
                path=file.path, size_bytes=file.size_bytes, done_bytes=file.done_bytes, verified=file.verified
            )
            for file in download.files
        ],
        error=None if download.error is None else ErrorDetail(**to_envelope(download.error)[1]["error"]),
    )
