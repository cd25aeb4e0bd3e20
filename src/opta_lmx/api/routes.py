"""The ASGI application: every route, what each request passes on its way, and what its errors look like."""

import time
from collections.abc import Callable
from typing import Any, Final
from uuid import uuid4

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Lifespan

from opta_lmx.api import docs
from opta_lmx.api.admin import config, downloads, events, leases, metrics, plan, requests
from opta_lmx.api.admin import models as admin_models
from opta_lmx.api.admin import status as admin_status
from opta_lmx.api.admin.wire import LeaseRequest, ModelRequest, PlanRequest, UnloadRequest, VerifyRequest
from opta_lmx.api.admin.wire_downloads import DownloadRequest
from opta_lmx.api.auth import KeyCheck
from opta_lmx.api.errors import UnknownRoute, WrongMethod, error_response
from opta_lmx.api.hosts import HostCheck
from opta_lmx.api.middleware import Cors, PlainPaths, RequestIds
from opta_lmx.api.openai import chat, completions, embeddings, models, rerank
from opta_lmx.api.openai.wire import ChatRequest
from opta_lmx.api.openai.wire_text import CompletionRequest, EmbeddingsRequest, RerankRequest
from opta_lmx.api.services import Services
from opta_lmx.config import Config
from opta_lmx.errors import LmxError
from opta_lmx.monitoring.logging import get_logger

# What bodies are read as; handlers do that themselves, so that no signature says it.
_REQUEST_SHAPES: Final = (
    ChatRequest,
    CompletionRequest,
    EmbeddingsRequest,
    RerankRequest,
    ModelRequest,
    UnloadRequest,
    PlanRequest,
    VerifyRequest,
    LeaseRequest,
    DownloadRequest,
)

_log = get_logger(__name__)


def build_app(
    services: Services,
    lifespan: Lifespan[Starlette] | None = None,
    *,
    new_id: Callable[[], str] = lambda: uuid4().hex,
    wall: Callable[[], float] = time.time,
) -> Starlette:
    """The application over ``services``, which hang on ``app.state``; ``wall`` (seconds) dates answers."""
    # admin_models comes last: its DELETE takes any path below /admin/models, since ids contain slashes.
    rooms = (
        chat,
        completions,
        embeddings,
        rerank,
        models,
        admin_status,
        metrics,
        requests,
        config,
        leases,
        plan,
        downloads,
        events,
        admin_models,
    )
    operations = [operation for room in rooms for operation in room.router.operations]
    served = [*operations, *(docs.router.operations if services.config.server.docs else ())]
    app = Starlette(routes=[operation.to_route() for operation in served], lifespan=lifespan)
    # A redirect would turn a POST to a misspelt path into a GET.
    app.router.redirect_slashes = False
    app.state.services = services
    app.state.new_id = new_id
    app.state.wall = wall
    app.state.document = docs.ApiDocument(operations, _REQUEST_SHAPES)
    _handle_errors(app)
    _add_middleware(app, services, new_id)
    return app


def _add_middleware(app: Starlette, services: Services, new_id: Callable[[], str]) -> None:
    """From the inside out: a preflight needs no key, and every answer has an id.

    Each reads the settings of the moment, so that a reload reaches it.
    """

    def current() -> Config:
        return services.config

    app.add_middleware(PlainPaths)
    app.add_middleware(KeyCheck, current=current)
    app.add_middleware(Cors, current=current)
    app.add_middleware(HostCheck, current=current)
    app.add_middleware(RequestIds, new_id=new_id)


def _handle_errors(app: Starlette) -> None:
    handlers: dict[type[Exception], Callable[[Request, Any], Any]] = {
        LmxError: _answer_error,
        HTTPException: _answer_routing_error,
        ClientDisconnect: _answer_nobody,
        Exception: _answer_bug,
    }
    for exception, handler in handlers.items():
        app.add_exception_handler(exception, handler)


async def _answer_error(_request: Request, error: LmxError) -> Response:
    return error_response(error)


async def _answer_routing_error(request: Request, error: HTTPException) -> Response:
    """The only two that the router raises."""
    allowed = (error.headers or {}).get("Allow")
    if allowed is not None:
        return error_response(WrongMethod(allowed))
    return error_response(UnknownRoute(request.method, request.scope["path"]))


async def _answer_nobody(_request: Request, _error: ClientDisconnect) -> Response:
    # nginx's number for it. No client sees this; it keeps a departure from being taken for a fault.
    return Response(status_code=499)


async def _answer_bug(request: Request, error: Exception) -> Response:
    """The error itself goes on to the server's log; the client learns where to look."""
    request_id = request.state.request_id
    _log.error("request_crashed", request_id=request_id, path=request.scope["path"], error=type(error).__name__)
    response = error_response(error)
    # This answer passes none of the middleware.
    response.headers["x-request-id"] = request_id
    return response
