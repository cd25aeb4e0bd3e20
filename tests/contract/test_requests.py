"""/admin/requests: what is under way, as the books have it."""

from dataclasses import replace

import httpx
import pytest

from opta_lmx.api.routes import build_app
from opta_lmx.monitoring.timing import Outcome, RequestBook, Timeline
from tests.contract.conftest import connect
from tests.fake_workers import Clock
from tests.fakes import World, make_world


async def test_requests_are_shown_while_they_last(world: World) -> None:
    """The oldest first, with what is known of each; one that has ended is gone."""
    books, clock = RequestBook(), Clock()
    old, new = Timeline(books, "old", 2, clock), Timeline(books, "new", 1, clock)
    old.resolved("tiny")
    old.admitted()
    clock.seconds += 0.5
    old.leased()
    app = build_app(replace(world.services, requests=books))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        first, second = (await client.get("/admin/requests")).json()["requests"]
        assert first == {
            "request_id": "old",
            "model_id": "tiny",
            "phase": "prefill",
            "age_seconds": 0.5,
            "queue_seconds": 0.5,
            "ttft_seconds": None,
            "prompt_tokens": None,
            "cached_tokens": None,
            "completion_tokens": 0,
            "tokens_per_second": None,
            "choices": 2,
        }
        assert (second["request_id"], second["model_id"], second["phase"]) == ("new", None, "queue")
        for timeline in (old, new):
            timeline.end(Outcome.STOP)
        assert (await client.get("/admin/requests")).json() == {"requests": []}


@pytest.mark.parametrize("headers", [{}, {"x-admin-key": "wrong"}])
async def test_requests_need_the_admin_key(headers: dict[str, str]) -> None:
    """Who asks what is the operator's business."""
    async with connect(make_world({"security": {"admin_key": "boss"}})) as client:
        assert (await client.get("/admin/requests", headers=headers)).status_code == 401
        assert (await client.get("/admin/requests", headers={"x-admin-key": "boss"})).status_code == 200
