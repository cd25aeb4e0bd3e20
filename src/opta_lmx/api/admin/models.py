"""/admin/models: what is on disk, what is in memory, and moving the one into the other."""

from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import APIRouter, Request

from opta_lmx.api.admin.wire import (
    AvailableModel,
    AvailableModels,
    Loaded,
    LoadedModel,
    LoadedModels,
    ModelRequest,
    Unloaded,
    to_gib,
)
from opta_lmx.api.openapi import request_body
from opta_lmx.api.parsing import read_object
from opta_lmx.api.services import Services
from opta_lmx.api.validation import validate
from opta_lmx.errors import ModelNotFound
from opta_lmx.manager.residency import ResidentModel
from opta_lmx.types import ModelFiles

router = APIRouter(prefix="/admin/models", tags=["admin"])


@router.get("")
async def list_loaded_models(request: Request) -> LoadedModels:
    """Models in memory, on their way in or out, and those that failed."""
    services: Services = request.app.state.services
    return LoadedModels(models=[_loaded(model) for model in services.residency.snapshot()])


@router.get("/available")
async def list_available_models(request: Request) -> AvailableModels:
    """Models on disk."""
    services: Services = request.app.state.services
    services.models.refresh()
    return AvailableModels(models=[_available(files) for files in services.models.list_available()])


@router.post("/load", openapi_extra=request_body(ModelRequest))
async def load_model(request: Request) -> Loaded:
    """Load a model, joining a load in flight; 507 with the arithmetic if it does not fit."""
    wanted = validate(ModelRequest, await read_object(request))
    services: Services = request.app.state.services
    with _named_model_id():
        result = await services.engine.load_model(wanted.model_id)
    return Loaded(
        model_id=result.model_id,
        memory_after_load_gb=to_gib(result.memory_after_bytes),
        time_to_load_ms=round(result.seconds * 1000, 1),
    )


@router.post("/unload", openapi_extra=request_body(ModelRequest))
async def unload_model(request: Request) -> Unloaded:
    """Unload a model once its requests have ended, and answer when its process has gone; 409 if it is pinned."""
    wanted = validate(ModelRequest, await read_object(request))
    services: Services = request.app.state.services
    with _named_model_id():
        result = await services.engine.unload_model(wanted.model_id)
    return Unloaded(model_id=result.model_id, memory_freed_gb=to_gib(result.freed_bytes))


@contextmanager
def _named_model_id() -> Iterator[None]:
    """An unknown model is told of by the name its field has on these routes."""
    try:
        yield
    except ModelNotFound as error:
        error.param = "model_id"
        raise


def _loaded(model: ResidentModel) -> LoadedModel:
    return LoadedModel(
        id=model.id,
        state=model.state,
        memory_bytes=model.memory_bytes,
        loaded_at=model.loaded_at,
        last_used_at=model.last_used_at,
        request_count=model.request_count,
        pinned=model.pinned,
        leases=model.leases,
        ttl=model.ttl_seconds,
        reason=model.reason,
    )


def _available(files: ModelFiles) -> AvailableModel:
    return AvailableModel(
        id=files.id,
        path=str(files.path),
        size_bytes=files.size_bytes,
        format=files.format,
        quantization=files.quantization,
        context_length=files.context_length,
        verified=files.verified,
        problem=files.problem,
    )
