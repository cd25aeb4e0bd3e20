"""/admin/leases: models kept in memory for a time, in somebody's name."""

from fastapi import APIRouter, Request

from opta_lmx.api.admin.models import named_model_id
from opta_lmx.api.admin.wire import Leased, LeaseEnded, LeaseRequest
from opta_lmx.api.errors import UnknownRoute
from opta_lmx.api.openapi import request_body
from opta_lmx.api.parsing import read_object
from opta_lmx.api.services import Services
from opta_lmx.api.validation import validate

router = APIRouter(prefix="/admin/leases", tags=["admin"])


@router.post("", openapi_extra=request_body(LeaseRequest))
async def lease_model(request: Request) -> Leased:
    """Protect a model from eviction, idleness and unloading for a time; 409 unless it is loaded or being loaded."""
    wanted = validate(LeaseRequest, await read_object(request))
    services: Services = request.app.state.services
    expires_at: float = request.app.state.wall() + wanted.seconds
    with named_model_id():
        lease_id, model_id = services.engine.hold_model(wanted.model_id, wanted.owner, wanted.seconds)
    return Leased(lease_id=lease_id, model_id=model_id, expires_at=expires_at)


@router.delete("/{lease_id}")
async def end_lease(lease_id: str, request: Request) -> LeaseEnded:
    """End a lease before its time; 404 if there is none of this id, or none any more."""
    services: Services = request.app.state.services
    if not services.residency.drop(lease_id):
        unknown = UnknownRoute(request.method, request.scope["path"])
        unknown.param, unknown.code = "lease_id", "lease_not_found"
        raise unknown
    return LeaseEnded(lease_id=lease_id)
