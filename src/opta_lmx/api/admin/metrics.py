"""/admin/metrics: what the server has done and does, for Prometheus and as JSON.

A start need not wait for prometheus_client, so ``monitoring/metrics.py`` is imported by the first scrape.
"""

from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response

from opta_lmx import __version__
from opta_lmx.api.errors import json_response
from opta_lmx.api.routing import Router
from opta_lmx.api.services import Services
from opta_lmx.types import ModelState

if TYPE_CHECKING:
    from opta_lmx.monitoring.metrics import ServerCollector

router = Router(prefix="/admin/metrics", tags=["admin"])


@router.get("", response_class=Response, responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
async def get_metrics(request: Request) -> Response:
    """Every metric in Prometheus's text format."""
    from opta_lmx.monitoring.metrics import CONTENT_TYPE, as_text  # noqa: PLC0415

    text = as_text(_collector(request.app.state.services))
    return Response(text, headers={"content-type": CONTENT_TYPE})


@router.get("/json")
async def get_metrics_json(request: Request) -> Response:
    """The same as JSON: name to type, help and samples."""
    from opta_lmx.monitoring.metrics import as_json  # noqa: PLC0415

    return json_response(as_json(_collector(request.app.state.services)))


def _collector(services: Services) -> "ServerCollector":
    """Asks every owner; a model that is only on disk is absent."""
    from opta_lmx.monitoring.metrics import Facts, ServerCollector  # noqa: PLC0415

    known = services.residency.snapshot()
    on_disk = {files.id: ModelState.ABSENT for files in services.models.list_available()}
    ledger = services.memory.ledger()
    facts = Facts(
        version=__version__,
        depths=services.engine.queue_depths(),
        states=on_disk | {model.id: model.state for model in known},
        restarts={model.id: model.restarts for model in known},
        memory={model.id: model.memory_bytes for model in known if model.memory_bytes},
        downloads=sum(not download.state.is_last for download in services.downloads.list()),
        used_bytes=ledger.used_bytes,
        limit_bytes=ledger.limit_bytes,
        reserved_bytes=ledger.reserved_bytes,
    )
    return ServerCollector(services.requests, facts)
