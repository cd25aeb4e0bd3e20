"""/admin/events: changes of state of models and downloads, as they happen."""

from collections.abc import AsyncGenerator

import anyio
import msgspec
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from opta_lmx.api.admin.downloads import download_status
from opta_lmx.api.admin.models import loaded_model
from opta_lmx.api.admin.wire import ModelChanged
from opta_lmx.api.openapi import event_stream
from opta_lmx.api.routing import Router
from opta_lmx.api.services import Services
from opta_lmx.manager.changes import Lagged, ModelChange, Quiet, Told
from opta_lmx.manager.download_job import Download
from opta_lmx.types import JsonObject

router = Router(prefix="/admin/events", tags=["admin"])


class _EventStream(StreamingResponse):
    """Closes its generator on every way out, so that no reader outlives its connection."""

    def __init__(self, events: AsyncGenerator[bytes]) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._events.aclose()


@router.get(
    "",
    response_class=StreamingResponse,
    responses={200: {"content": event_stream('event: snapshot\ndata: {"models":[...],"downloads":[...]}\n\n')}},
)
async def follow_changes(request: Request) -> StreamingResponse:
    """Server-sent events without end: what there is now, then each change of a model's or download's state."""
    services: Services = request.app.state.services
    return _EventStream(_events(services))


async def _events(services: Services) -> AsyncGenerator[bytes]:
    with services.changes.reading() as reader:
        # Nothing is lost between the two: both happen in one turn of the event loop.
        yield _event("snapshot", _snapshot(services))
        while True:
            match await reader.next():
                case None:
                    return
                case Quiet():
                    yield b": heartbeat\n\n"
                case Told() as told:
                    yield _told(told)


def _snapshot(services: Services) -> JsonObject:
    return {
        "models": [loaded_model(model).model_dump(mode="json") for model in services.residency.snapshot()],
        "downloads": [download_status(one).model_dump(mode="json") for one in services.downloads.list()],
    }


def _told(told: Told) -> bytes:
    match told.what:
        case ModelChange() as change:
            changed = ModelChanged(
                at=told.at,
                model_id=change.model_id,
                state=change.state,
                cause=change.cause,
                reason=change.reason,
            )
            return _event("model", changed.model_dump(mode="json"))
        case Download() as download:
            return _event("download", {"at": told.at, **download_status(download).model_dump(mode="json")})
        case Lagged(missed):
            return _event("lagged", {"at": told.at, "missed": missed})


def _event(name: str, data: JsonObject) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), msgspec.json.encode(data))
