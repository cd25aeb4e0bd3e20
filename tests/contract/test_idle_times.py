"""``ttl``, LM Studio's field, on every route that may load a model; and the names of one model that meet in a load."""

from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from tests.contract.conftest import connect
from tests.contract.encoders import make_encoder_world
from tests.contract.test_admin_models import desk
from tests.fakes import World

BODIES: dict[str, dict[str, Any]] = {
    "chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]},
    "completions": {"model": "tiny", "prompt": "Hi"},
    "embeddings": {"model": "tiny", "input": "Hi"},
    "rerank": {"model": "tiny", "query": "Hi", "documents": ["a"]},
}


@pytest.mark.parametrize("route", BODIES)
@pytest.mark.parametrize(("ttl", "seconds"), [(90, 90.0), (0.5, 0.5), (None, None)])
async def test_a_request_says_how_long_its_model_may_idle(
    client: httpx.AsyncClient, world: World, route: str, ttl: float | None, seconds: float | None
) -> None:
    """Seconds, whole or not; null is the same as nothing."""
    encoders, engine = make_encoder_world()
    engine.scores = (0.5,)
    async with connect(encoders) as encoder_client:
        asks = client if "completions" in route else encoder_client
        response = await asks.post(f"/v1/{route}", json=BODIES[route] | {"ttl": ttl})
    assert response.status_code == 200, response.text
    asked = world.request if asks is client else engine.asked
    assert asked is not None
    assert asked.ttl_seconds == seconds


@pytest.mark.parametrize("route", BODIES)
@pytest.mark.parametrize("ttl", [0, -1, "60", True, [], 2**31])
async def test_an_idle_time_that_is_none_is_refused_by_name(client: httpx.AsyncClient, route: str, ttl: object) -> None:
    """Nothing, less than nothing, and what is no number: 400 with the field's name."""
    response = await client.post(f"/v1/{route}", json=BODIES[route] | {"ttl": ttl})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == "ttl"


async def test_the_names_of_one_model_join_one_load(tmp_path: Path) -> None:
    """An alias, a glob's catch and the id are one model: one load, one record, one process."""
    async with desk(tmp_path) as lmx:
        lmx.house.machine.load_gate.clear()
        async with anyio.create_task_group() as tasks:
            for name in ("a", "fast"):
                tasks.start_soon(load, lmx.client, name)
            with anyio.fail_after(5):
                while sum(model.waiters for model in lmx.house.residency.snapshot()) < 2:
                    await anyio.lowlevel.checkpoint()
            lmx.house.machine.load_gate.set()
        assert lmx.house.machine.loads == ["a"]
        assert list(await lmx.shown()) == ["a"]
        assert (await lmx.shown())["a"]["ttl"] == 3600.0


async def load(client: httpx.AsyncClient, name: str) -> None:
    """Load a model by some name of it; the answer has its id."""
    response = await client.post("/admin/models/load", json={"model_id": name})
    assert response.json()["model_id"] == "a", response.text
