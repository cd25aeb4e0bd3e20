"""/admin/config: the settings in force."""

from fastapi import APIRouter, Request

from opta_lmx.api.services import Services
from opta_lmx.types import JsonObject

router = APIRouter(prefix="/admin/config", tags=["admin"])


@router.get("")
async def get_config(request: Request) -> JsonObject:
    """All settings with their sources merged, each key a row of asterisks."""
    services: Services = request.app.state.services
    return services.config.public()
