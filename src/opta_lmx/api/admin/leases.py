"""/admin/leases: models kept in memory for a time, in somebody's name."""

from starlette.requests import Request

from opta_lmx.api.admin.models import named_model_id
from opta_lmx.api.admin.wire import Lease, Leased, LeaseEnded, LeaseRequest, Leases
from opta_lmx.api.openapi import errors, request_body
from opta_lmx.api.parsing import read_object
from opta_lmx.api.routing import Router
from opta_lmx.api.services import Services
from opta_lmx.api.validation import validate
from opta_lmx.errors import LeaseNotFound

router = Router(prefix="/admin/leases", tags=["admin"])


@router.get("")
async def list_leases(request: Request) -> Leases:
    """Every lease that lasts, by model."""
    services: Services = request.app.state.services
    return Leases(
        leases=[
            Lease(lease_id=held.lease_id, model_id=model.id, owner=held.owner, expires_at=held.expires_at)
            for model in services.residency.snapshot()
            for held in model.held
        ]
    )


@router.post(
    "",
    openapi_extra=request_body(
        LeaseRequest, an_hour={"model_id": "smollm2-135m-instruct", "seconds": 3600, "owner": "nightly-report"}
    ),
    responses=errors(404, 409),
)
async def lease_model(request: Request) -> Leased:
    """Protect a model from eviction, idleness and unloading for a time; 409 unless it is loaded or being loaded."""
    wanted = validate(LeaseRequest, await read_object(request))
    services: Services = request.app.state.services
    expires_at: float = request.app.state.wall() + wanted.seconds
    with named_model_id():
        lease_id, model_id = services.engine.hold_model(wanted.model_id, wanted.owner, wanted.seconds)
    return Leased(lease_id=lease_id, model_id=model_id, expires_at=expires_at)


@router.delete("/{lease_id}", responses=errors(404))
async def end_lease(lease_id: str, request: Request) -> LeaseEnded:
    """End a lease before its time; 404 if there is none of this id, or none any more."""
    services: Services = request.app.state.services
    if not services.residency.drop(lease_id):
        raise LeaseNotFound(lease_id)
    return LeaseEnded(lease_id=lease_id)
