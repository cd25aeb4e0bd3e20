"""/admin/models: what is on disk, what is in memory, moving the one into the other, and removing either."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from starlette.requests import Request

from opta_lmx.api.admin.wire import (
    AvailableModel,
    AvailableModels,
    Deleted,
    Loaded,
    LoadedModel,
    LoadedModels,
    ModelRequest,
    Pinned,
    Unloaded,
    UnloadRequest,
    Verification,
    VerifiedFile,
    VerifiedModel,
    VerifyRequest,
    to_gib,
)
from opta_lmx.api.openapi import MODEL_ERRORS, errors, request_body
from opta_lmx.api.parsing import read_object
from opta_lmx.api.routing import Router
from opta_lmx.api.services import Services
from opta_lmx.api.validation import validate
from opta_lmx.errors import ModelNotFound
from opta_lmx.manager.integrity import FileCheck
from opta_lmx.manager.residency import ResidentModel
from opta_lmx.types import JsonObject, ModelFiles

router = Router(prefix="/admin/models", tags=["admin"])

_STARTER: JsonObject = {"model_id": "smollm2-135m-instruct"}


@router.get("")
async def list_loaded_models(request: Request) -> LoadedModels:
    """Models in memory, on their way in or out, and those that failed."""
    services: Services = request.app.state.services
    return LoadedModels(models=[loaded_model(model) for model in services.residency.snapshot()])


@router.get("/available")
async def list_available_models(request: Request) -> AvailableModels:
    """Models on disk."""
    services: Services = request.app.state.services
    services.models.refresh()
    return AvailableModels(models=[_available(files) for files in services.models.list_available()])


@router.post("/load", openapi_extra=request_body(ModelRequest, the_starter=_STARTER), responses=errors(*MODEL_ERRORS))
async def load_model(request: Request) -> Loaded:
    """Load a model, joining a load in flight; 507 with the arithmetic if it does not fit."""
    wanted = validate(ModelRequest, await read_object(request))
    services: Services = request.app.state.services
    with named_model_id():
        result = await services.engine.load_model(wanted.model_id)
    return Loaded(
        model_id=result.model_id,
        memory_after_load_gb=to_gib(result.memory_after_bytes),
        time_to_load_ms=round(result.seconds * 1000, 1),
    )


@router.post("/unload", openapi_extra=request_body(UnloadRequest, the_starter=_STARTER), responses=errors(404, 409))
async def unload_model(request: Request) -> Unloaded:
    """Unload a model once its requests have ended, and answer when its process has gone; 409 if it is pinned."""
    wanted = validate(UnloadRequest, await read_object(request))
    services: Services = request.app.state.services
    unload = services.engine.force_unload_model if wanted.force else services.engine.unload_model
    with named_model_id():
        result = await unload(wanted.model_id)
    return Unloaded(model_id=result.model_id, memory_freed_gb=to_gib(result.freed_bytes))


@router.post("/pin", openapi_extra=request_body(ModelRequest, the_starter=_STARTER), responses=errors(404, 409))
async def pin_model(request: Request) -> Pinned:
    """Keep a model in memory until it is unpinned; 409 unless it is loaded or being loaded."""
    wanted = validate(ModelRequest, await read_object(request))
    services: Services = request.app.state.services
    with named_model_id():
        return Pinned(model_id=services.engine.pin_model(wanted.model_id), pinned=True)


@router.post("/unpin", openapi_extra=request_body(ModelRequest, the_starter=_STARTER), responses=errors(404))
async def unpin_model(request: Request) -> Pinned:
    """End a model's pin; done too if it had none."""
    wanted = validate(ModelRequest, await read_object(request))
    services: Services = request.app.state.services
    with named_model_id():
        return Pinned(model_id=services.engine.unpin_model(wanted.model_id), pinned=False)


@router.post(
    "/verify",
    openapi_extra=request_body(VerifyRequest, the_starter=_STARTER, all_models={}),
    responses=errors(404, 409, 422),
)
async def verify_models(request: Request) -> Verification:
    """Hash a model's files, or all models', and hold each against models.lock."""
    wanted = validate(VerifyRequest, await read_object(request))
    services: Services = request.app.state.services
    verified: list[VerifiedModel] = []
    if wanted.model_id is not None:
        with named_model_id():
            model_id = services.engine.resolve(wanted.model_id)
            verified.append(_verified(model_id, await services.models.verify(model_id)))
    else:
        services.models.refresh()
        for files in services.models.list_available():
            # One may be deleted while those before it are hashed.
            with suppress(ModelNotFound):
                verified.append(_verified(files.id, await services.models.verify(files.id)))
    return Verification(success=all(model.verdict != "mismatch" for model in verified), models=verified)


# Ids contain slashes, which clients send as they are or as %2F.
@router.delete("/{model_id:path}", responses=errors(404, 409))
async def delete_model(model_id: str, request: Request) -> Deleted:
    """Remove a model from the disk; 409 while it is loaded or waited for."""
    services: Services = request.app.state.services
    with named_model_id():
        return Deleted(model_id=model_id, freed_bytes=services.engine.delete_model(model_id))


@contextmanager
def named_model_id() -> Iterator[None]:
    """An unknown model is told of by the name its field has on these routes."""
    try:
        yield
    except ModelNotFound as error:
        error.param = "model_id"
        raise


def loaded_model(model: ResidentModel) -> LoadedModel:
    """A model in memory as the admin API shows it."""
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


def _verified(model_id: str, checks: Sequence[FileCheck]) -> VerifiedModel:
    files = [
        VerifiedFile(name=check.name, verdict=check.verdict, expected_sha256=check.expected, actual_sha256=check.actual)
        for check in checks
    ]
    if not checks:
        return VerifiedModel(model_id=model_id, verdict="unrecorded", files=files)
    right = all(check.verdict.right for check in checks)
    return VerifiedModel(model_id=model_id, verdict="verified" if right else "mismatch", files=files)
