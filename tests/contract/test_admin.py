"""The admin routes: health, readiness, status, memory, loading and unloading."""

import httpx
import pytest

from opta_lmx import __version__
from opta_lmx.errors import Conflict, LoadFailed, MemoryLimit
from opta_lmx.manager.importing import ImportProgress
from opta_lmx.types import Lane, ModelState
from tests.fakes import GIB, World, make_world, resident


@pytest.fixture
def world() -> World:
    """One model wanted from the start."""
    return make_world({"models": {"auto_load": ["tiny"], "default_model": "acme/small-4bit"}})


async def test_health(client: httpx.AsyncClient) -> None:
    """Nothing but the state and the version when all is well."""
    assert (await client.get("/admin/health")).json() == {"status": "ok", "version": __version__}


@pytest.mark.parametrize("state", [ModelState.FAILED, ModelState.ABSENT])
async def test_health_is_degraded_by_a_wanted_model(client: httpx.AsyncClient, world: World, state: ModelState) -> None:
    """A model the operator counts on and does not have is worth a page; still 200, since restarting would not help."""
    world.residency.residents = (
        resident("acme/small-4bit", state, reason="exit code 9"),
        resident("x", state, reason="y"),
    )
    response = await client.get("/admin/health")
    assert (response.status_code, response.json()["status"]) == (200, "degraded")
    assert response.json()["reason"] == "acme/small-4bit: exit code 9"


async def test_ready(client: httpx.AsyncClient, world: World) -> None:
    """With the wanted models in memory, a request would be served now."""
    world.residency.residents = (resident("tiny"), resident("other", ModelState.LOADING))
    response = await client.get("/admin/ready")
    assert (response.status_code, response.json()) == (200, {"status": "ready"})


@pytest.mark.parametrize(
    ("state", "draining", "code", "words"),
    [
        (ModelState.READY, True, "draining", "shutting down"),
        (ModelState.LOADING, False, "model_loading", "Still loading: tiny."),
        (ModelState.FAILED, False, "overloaded", "tiny: bad file"),
    ],
)
async def test_not_ready(
    client: httpx.AsyncClient, world: World, state: ModelState, draining: bool, code: str, words: str
) -> None:
    """Status 503 with the reason, in the shape of an error too."""
    world.residency.residents = (resident("tiny", state, reason="bad file" if state is ModelState.FAILED else None),)
    world.engine.draining = draining
    response = await client.get("/admin/ready")
    body = response.json()
    assert (response.status_code, body["status"], body["error"]["code"]) == (503, "not_ready", code)
    assert words in body["reason"]
    assert body["error"]["message"] == body["reason"]
    assert response.headers["retry-after"] == "1"


async def test_status(client: httpx.AsyncClient, world: World) -> None:
    """One look tells who is in memory, what runs, what waits."""
    world.residency.residents = (resident("tiny"), resident("acme/small-4bit", ModelState.FAILED, reason="bad"))
    world.engine.depths = {"tiny": (3, 2), "acme/small-4bit": (0, 1)}
    world.engine.waiting = {"tiny": [(Lane.INTERACTIVE, "", 1), (Lane.BATCH, "nightly", 1)]}
    body = (await client.get("/admin/status")).json()
    assert body["version"] == __version__
    assert (body["uptime_seconds"], body["draining"]) == (12.5, False)
    assert (body["requests_running"], body["requests_waiting"]) == (3, 3)
    assert body["lines"] == [
        {"model_id": "tiny", "lane": "interactive", "caller": "", "requests": 1},
        {"model_id": "tiny", "lane": "batch", "caller": "nightly", "requests": 1},
    ]
    assert body["models"] == [
        {
            "id": "tiny",
            "state": "ready",
            "pid": 4711,
            "memory_bytes": 2 * GIB + GIB // 4 + GIB // 8,
            "requests_running": 3,
            "requests_waiting": 2,
            "restarts": 2,
            "reason": None,
        },
        {
            "id": "acme/small-4bit",
            "state": "failed",
            "pid": None,
            "memory_bytes": 0,
            "requests_running": 0,
            "requests_waiting": 1,
            "restarts": 2,
            "reason": "bad",
        },
    ]
    assert body["imports"] == []
    assert body["memory"] == (await client.get("/admin/memory")).json()


async def test_status_tells_of_imports(client: httpx.AsyncClient, world: World) -> None:
    """A GGUF that is being imported is listed with how far it is."""
    world.models.importing = {"acme/new": ImportProgress(5, 20)}
    body = (await client.get("/admin/status")).json()
    assert body["imports"] == [{"model_id": "acme/new", "done_bytes": 5, "total_bytes": 20}]


async def test_memory(client: httpx.AsyncClient, world: World) -> None:
    """GiB for people, exact bytes for arithmetic, and every byte used has an owner."""
    world.residency.residents = (resident("tiny"),)
    world.memory.reserve("tiny", GIB // 4)
    assert (await client.get("/admin/memory")).json() == {
        "total_gb": 16.0,
        "used_gb": 4.0,
        "available_gb": 12.0,
        "limit_gb": 14.4,
        "threshold_percent": 90,
        "ledger": {
            "total_bytes": 16 * GIB,
            "used_bytes": 4 * GIB,
            "limit_bytes": 15_461_882_265,
            "limited_by": "max_memory_percent",
            "free_bytes": 15_461_882_265 - 4 * GIB - GIB // 4,
            "weights_bytes": 2 * GIB,
            "kv_reserved_bytes": GIB // 4,
            "prefix_cache_bytes": 0,
            "reservations_bytes": GIB // 4,
            "other_processes_bytes": 2 * GIB - GIB // 8,
        },
    }


async def test_models_in_memory(client: httpx.AsyncClient, world: World) -> None:
    """Each with what decides about its stay."""
    world.residency.residents = (resident("tiny"),)
    assert (await client.get("/admin/models")).json() == {
        "models": [
            {
                "id": "tiny",
                "state": "ready",
                "memory_bytes": 2 * GIB + GIB // 4 + GIB // 8,
                "loaded_at": 1_700_000_100.0,
                "last_used_at": 1_700_000_200.0,
                "request_count": 7,
                "pinned": False,
                "leases": 1,
                "ttl": 3600.0,
                "reason": None,
            }
        ]
    }


async def test_models_on_disk(client: httpx.AsyncClient) -> None:
    """With what one needs to choose."""
    models = (await client.get("/admin/models/available")).json()["models"]
    assert models[1] == {
        "id": "acme/small-4bit",
        "path": "/models/acme/small-4bit",
        "size_bytes": 1000,
        "format": "mlx",
        "quantization": "4-bit",
        "context_length": 2048,
        "verified": False,
        "problem": None,
    }


async def test_load_and_unload(client: httpx.AsyncClient, world: World) -> None:
    """Both answer with what was measured."""
    loaded = await client.post("/admin/models/load", json={"model_id": "acme/small-4bit"})
    assert (loaded.status_code, loaded.json()) == (
        200,
        {"success": True, "model_id": "acme/small-4bit", "memory_after_load_gb": 1.5, "time_to_load_ms": 250.0},
    )
    unloaded = await client.post("/admin/models/unload", json={"model_id": "acme/small-4bit"})
    assert unloaded.json() == {"success": True, "model_id": "acme/small-4bit", "memory_freed_gb": 2.0}
    assert world.engine.loads == world.engine.unloads == ["acme/small-4bit"]


@pytest.mark.parametrize("verb", ["load", "unload"])
@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({}, 400, "missing_required_parameter", "model_id"),
        ({"model_id": None}, 400, "missing_required_parameter", "model_id"),
        ({"model_id": 5}, 400, "invalid_type", "model_id"),
        ({"model_id": ""}, 400, "string_below_min_length", "model_id"),
        ({"model_id": "tiny", "pined": True}, 400, "unknown_parameter", "pined"),
        ({"model_id": "tiny", "pined": None}, 400, "unknown_parameter", "pined"),
        ({"model_id": "tiny", "<x": None}, 400, "unknown_parameter", "<x"),
        ({"model_id": "tinny"}, 404, "model_not_found", "model_id"),
    ],
)
async def test_a_wrong_wish(
    client: httpx.AsyncClient, verb: str, body: dict[str, object], status: int, code: str, param: str
) -> None:
    """An operator's typo is refused by name."""
    response = await client.post(f"/admin/models/{verb}", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param)


@pytest.mark.parametrize(
    ("refusal", "status"),
    [(MemoryLimit("tiny", 9, 8, {}), 507), (LoadFailed("tiny", "bad"), 422), (Conflict("pinned"), 409)],
)
async def test_what_cannot_be_done_is_said(
    client: httpx.AsyncClient, world: World, refusal: MemoryLimit | LoadFailed | Conflict, status: int
) -> None:
    """Admin errors come from the same table."""
    world.engine.refusal = refusal
    for verb in ("load", "unload"):
        response = await client.post(f"/admin/models/{verb}", json={"model_id": "tiny"})
        assert (response.status_code, response.json()["error"]["message"]) == (status, str(refusal))
