"""/admin/requests: what is being worked on now, request by request. Never a word of a prompt or an answer."""

from starlette.requests import Request

from opta_lmx.api.admin.wire import LiveRequest, LiveRequests
from opta_lmx.api.routing import Router
from opta_lmx.api.services import Services
from opta_lmx.monitoring import timing

router = Router(prefix="/admin/requests", tags=["admin"])


@router.get("")
async def list_requests(request: Request) -> LiveRequests:
    """Every request that has come and not ended, the oldest first: how far it is, and how fast."""
    services: Services = request.app.state.services
    return LiveRequests(requests=[_shown(live) for live in services.requests.live()])


def _shown(live: timing.LiveRequest) -> LiveRequest:
    return LiveRequest(
        request_id=live.request_id,
        model_id=live.model_id,
        phase=live.phase,
        age_seconds=live.age_seconds,
        queue_seconds=live.queue_seconds,
        ttft_seconds=live.ttft_seconds,
        prompt_tokens=live.prompt_tokens,
        cached_tokens=live.cached_tokens,
        completion_tokens=live.completion_tokens,
        tokens_per_second=live.tokens_per_second,
        choices=live.choices,
    )
