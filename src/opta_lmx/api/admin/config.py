"""/admin/config: the settings in force, and reading them again."""

from starlette.requests import Request

from opta_lmx.api.admin.wire import ConfigReload
from opta_lmx.api.routing import Router
from opta_lmx.api.services import Services
from opta_lmx.config import ConfigError
from opta_lmx.errors import InvalidRequest
from opta_lmx.types import JsonObject

router = Router(prefix="/admin/config", tags=["admin"])


@router.get("")
async def get_config(request: Request) -> JsonObject:
    """All settings with their sources merged, each key a row of asterisks."""
    services: Services = request.app.state.services
    return services.config.public()


@router.post("/reload")
async def reload_config(request: Request) -> ConfigReload:
    """Read the settings again and take what a running server can: all of it, or nothing."""
    services: Services = request.app.state.services
    try:
        changes = await services.reload()
    except ConfigError as error:
        raise InvalidRequest(str(error), param=error.key, code="invalid_config") from error
    return ConfigReload(
        success=True,
        updated=list(changes.updated),
        applied=list(changes.applied),
        at_next_load=list(changes.at_next_load),
        restart_required=list(changes.restart_required),
    )
