"""/admin/health, /ready, /status and /memory: how the server is, for monitors and for people."""

from starlette.requests import Request
from starlette.responses import Response

from opta_lmx import __version__
from opta_lmx.api.admin.wire import Health, ImportStatus, Ledger, Line, Memory, ModelStatus, Ready, Status, to_gib
from opta_lmx.api.errors import json_response, to_envelope
from opta_lmx.api.routing import Router
from opta_lmx.api.services import Services
from opta_lmx.errors import Busy, Draining, LmxError, ModelLoading
from opta_lmx.manager.residency import ResidentModel
from opta_lmx.types import ModelState

router = Router(prefix="/admin", tags=["admin"])


@router.get("/health", response_model_exclude_none=True)
async def get_health(request: Request) -> Health:
    """Whether the server process lives; needs no key. Degraded: a model it should serve could not be kept."""
    services: Services = request.app.state.services
    settings = services.config.models
    failures = _failures(services, {*settings.auto_load, settings.default_model})
    if not failures:
        return Health(status="ok", version=__version__)
    return Health(status="degraded", version=__version__, reason="; ".join(failures))


@router.get("/ready", response_model=Ready)
async def get_ready(request: Request) -> Response:
    """Whether a request would be served now; 503 with the reason otherwise."""
    reason = _not_ready(request.app.state.services)
    if reason is None:
        return json_response({"status": "ready"})
    _, body, headers = to_envelope(reason)
    return json_response({"status": "not_ready", "reason": str(reason), **body}, status=503, headers=headers)


@router.get("/status")
async def get_status(request: Request) -> Status:
    """The server at a glance."""
    services: Services = request.app.state.services
    depths = services.engine.queue_depths()
    return Status(
        version=__version__,
        uptime_seconds=round(services.uptime(), 3),
        draining=services.engine.draining,
        requests_running=sum(running for running, _ in depths.values()),
        requests_waiting=sum(waiting for _, waiting in depths.values()),
        lines=[
            Line(model_id=model_id, lane=lane, caller=caller, requests=requests)
            for model_id, line in services.engine.lines().items()
            for lane, caller, requests in line
        ],
        models=[_model_status(model, depths.get(model.id, (0, 0))) for model in services.residency.snapshot()],
        imports=[
            ImportStatus(model_id=model_id, done_bytes=progress.done_bytes, total_bytes=progress.total_bytes)
            for model_id, progress in services.models.imports().items()
        ],
        memory=_memory(services),
    )


@router.get("/memory")
async def get_memory(request: Request) -> Memory:
    """The machine's memory, the cap, and who holds what."""
    return _memory(request.app.state.services)


def _failures(services: Services, wanted: set[str | None]) -> list[str]:
    """What is known of wanted models that are out of memory against expectation."""
    gone = (ModelState.FAILED, ModelState.ABSENT)
    return [
        f"{model.id}: {model.reason}"
        for model in services.residency.snapshot()
        if model.id in wanted and model.state in gone and model.reason
    ]


def _not_ready(services: Services) -> LmxError | None:
    """Why a request might not be served now; only models named in ``models.auto_load`` are waited for."""
    if services.engine.draining:
        return Draining("The server is shutting down and takes no new work.")
    wanted = set(services.config.models.auto_load)
    loading = [
        model.id
        for model in services.residency.snapshot()
        if model.id in wanted and (model.state is ModelState.LOADING or model.waiters)
    ]
    if loading:
        return ModelLoading(f"Still loading: {', '.join(loading)}.")
    stalled = [
        f"{model.id} has made no step for {model.stalled_seconds:.0f} seconds"
        for model in services.residency.snapshot()
        if model.stalled_seconds
    ]
    if stalled:
        return Busy(f"Stalled: {'; '.join(stalled)}.")
    failures = _failures(services, {*wanted})
    return Busy(f"Not loaded: {'; '.join(failures)}") if failures else None


def _model_status(model: ResidentModel, depths: tuple[int, int]) -> ModelStatus:
    return ModelStatus(
        id=model.id,
        state=model.state,
        pid=model.pid,
        memory_bytes=model.memory_bytes,
        requests_running=depths[0],
        requests_waiting=depths[1],
        restarts=model.restarts,
        reason=model.reason,
    )


def _memory(services: Services) -> Memory:
    ledger = services.memory.ledger()
    needs = [model.need for model in services.residency.snapshot() if model.need is not None]
    in_use = sum(need.weights_bytes + need.overhead_bytes for need in needs)
    return Memory(
        total_gb=to_gib(ledger.total_bytes),
        used_gb=to_gib(ledger.used_bytes),
        available_gb=to_gib(ledger.total_bytes - ledger.used_bytes),
        limit_gb=to_gib(ledger.limit_bytes),
        threshold_percent=services.config.memory.max_memory_percent,
        ledger=Ledger(
            total_bytes=ledger.total_bytes,
            used_bytes=ledger.used_bytes,
            limit_bytes=ledger.limit_bytes,
            limited_by=ledger.bound.value,
            free_bytes=ledger.free_bytes,
            weights_bytes=sum(need.weights_bytes for need in needs),
            kv_reserved_bytes=sum(need.kv_bytes for need in needs),
            prefix_cache_bytes=sum(need.prefix_cache_bytes for need in needs),
            reservations_bytes=ledger.reserved_bytes,
            other_processes_bytes=max(0, ledger.used_bytes - in_use),
        ),
    )
