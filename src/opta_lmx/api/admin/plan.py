"""/admin/models/plan: whether a load would fit, with the arithmetic a refusal would carry."""

from starlette.requests import Request

from opta_lmx.api.admin.models import named_model_id
from opta_lmx.api.admin.wire import PlanRequest, to_gib
from opta_lmx.api.openapi import errors, request_body
from opta_lmx.api.parsing import read_object
from opta_lmx.api.routing import Router
from opta_lmx.api.services import Services
from opta_lmx.api.validation import validate
from opta_lmx.types import JsonObject

router = Router(prefix="/admin/models", tags=["admin"])


@router.post(
    "/plan",
    openapi_extra=request_body(PlanRequest, the_starter={"model_id": "smollm2-135m-instruct", "context_length": 4096}),
    responses=errors(404, 422),
)
async def plan_model(request: Request) -> JsonObject:
    """What a load would need and do now; changes nothing. A refused load has the same keys in ``error.plan``."""
    wanted = validate(PlanRequest, await read_object(request))
    services: Services = request.app.state.services
    with named_model_id():
        plan = services.engine.plan_model(wanted.model_id, wanted.context_length).as_dict()
    sizes = {name: size for name, size in plan.items() if name.endswith("_bytes") and isinstance(size, int)}
    return plan | {f"{name.removesuffix('_bytes')}_gb": to_gib(size) for name, size in sizes.items()}
