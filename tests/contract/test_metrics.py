"""/admin/metrics over HTTP: formats, the key, and what the owners say at that moment."""

from dataclasses import replace

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from opta_lmx import __version__
from opta_lmx.api.routes import build_app
from opta_lmx.monitoring.timing import Outcome, RequestBook, Timeline
from opta_lmx.types import ModelState
from tests.contract.conftest import connect
from tests.fakes import GIB, World, make_world, resident


async def test_the_text_is_prometheus_s(client: httpx.AsyncClient) -> None:
    """It has the content type of the format, and a parser of the format reads every line."""
    response = await client.get("/admin/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    assert families["lmx_build_info"].samples[0].labels == {"version": __version__}


async def test_gauges_are_read_from_their_owners(client: httpx.AsyncClient, world: World) -> None:
    """Each scrape shows what is so now: queues, states of models in memory and on disk, memory, restarts."""
    world.engine.depths = {"tiny": (2, 1)}
    world.residency.residents = (resident("tiny"), resident("gone", ModelState.FAILED, reason="bad file"))
    shown = (await client.get("/admin/metrics/json")).json()

    def values(name: str) -> dict[tuple[str, ...], float]:
        return {tuple(sample["labels"].values()): sample["value"] for sample in shown[name]["samples"]}

    assert values("lmx_requests_running") == {("tiny",): 2}
    assert values("lmx_requests_waiting") == {("tiny",): 1}
    states = [labels for labels, value in values("lmx_model_state").items() if value]
    assert sorted(states) == [("acme/small-4bit", "absent"), ("gone", "failed"), ("tiny", "ready")]
    assert values("lmx_worker_restarts_total")["tiny",] == 2
    assert values("lmx_memory_used_bytes")[()] == 4 * GIB
    assert values("lmx_memory_limit_bytes")[()] == world.memory.limit_bytes
    world.engine.depths = {"tiny": (0, 0)}
    again = (await client.get("/admin/metrics/json")).json()
    assert again["lmx_requests_running"]["samples"] == [{"labels": {"model": "tiny"}, "value": 0.0}]


async def test_the_book_of_requests_is_shown(world: World) -> None:
    """Requests that ended are counted under their model."""
    books = RequestBook()
    timeline = Timeline(books, "req", 1)
    timeline.resolved("tiny")
    timeline.end(Outcome.STOP)
    app = build_app(replace(world.services, requests=books))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        text = (await client.get("/admin/metrics")).text
    assert 'lmx_requests_total{model="tiny",outcome="stop"} 1.0' in text


@pytest.mark.parametrize("path", ["/admin/metrics", "/admin/metrics/json"])
async def test_metrics_need_the_admin_key(path: str) -> None:
    """What models run and how busy they are is the operator's business."""
    async with connect(make_world({"security": {"admin_key": "boss"}})) as client:
        assert (await client.get(path)).status_code == 401
        assert (await client.get(path, headers={"x-admin-key": "boss"})).status_code == 200
        assert (await client.get(path, headers={"authorization": "Bearer boss"})).status_code == 200
