"""Keys: which guard what, how they are sent, and what stays open."""

import httpx
import pytest

from tests.contract.conftest import CHAT, connect
from tests.fakes import World, make_world

KEYED = {"security": {"api_keys": ["sk-one", "sk-two"], "admin_key": "boss"}}


@pytest.fixture
def world() -> World:
    """Two API keys and an admin key."""
    return make_world(KEYED)


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer sk-one"},
        {"authorization": "bearer  sk-two"},
        {"x-api-key": "sk-two"},
        {"authorization": "Bearer wrong", "x-api-key": "sk-one"},
        {"authorization": "Basic eDp5", "x-api-key": "sk-one"},
    ],
)
async def test_any_api_key_opens_v1(client: httpx.AsyncClient, headers: dict[str, str]) -> None:
    """As OpenAI's clients send it, or as Anthropic's do."""
    assert (await client.post("/v1/chat/completions", json=CHAT, headers=headers)).status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/v1/nope", "/v1", "/api/v1/models", "/admin/status", "/admin/models"])
async def test_no_key_opens_nothing(client: httpx.AsyncClient, path: str) -> None:
    """Status 401 without a code, before anything is said about the path."""
    response = await client.get(path)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["code"], error["param"]) == (
        401,
        "invalid_request_error",
        None,
        None,
    )
    assert "didn't provide an API key" in error["message"]
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["x-request-id"] == "req_0123abcd"


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/v1/models", {"authorization": "Bearer sk-three"}),
        ("/v1/models", {"authorization": "Bearer boss"}),
        ("/v1/models", {"x-admin-key": "boss", "x-api-key": "sk-on"}),
        ("/v1/models", {"x-api-key": "sk-one\u00e9"}),
        ("/admin/status", {"authorization": "Bearer sk-one"}),
        ("/admin/status", {"x-admin-key": "bos"}),
        ("/admin/models", {"x-api-key": "boss", "x-admin-key": "BOSS"}),
    ],
)
async def test_a_wrong_key_opens_nothing(client: httpx.AsyncClient, path: str, headers: dict[str, str]) -> None:
    """Nor does the right key at the wrong door; the answer does not repeat it."""
    sent = {name.encode(): value.encode("latin-1") for name, value in headers.items()}
    response = await client.get(path, headers=sent)
    assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
    assert not any(value.split()[-1] in response.text for value in headers.values())


@pytest.mark.parametrize("headers", [{"x-admin-key": "boss"}, {"authorization": "Bearer boss"}])
async def test_the_admin_key_opens_admin(client: httpx.AsyncClient, headers: dict[str, str]) -> None:
    """By its own header or as a bearer."""
    assert (await client.get("/admin/status", headers=headers)).status_code == 200


async def test_health_and_unguarded_paths_need_no_key(client: httpx.AsyncClient) -> None:
    """A monitor asks health; a path of no room is just unknown."""
    assert (await client.get("/admin/health")).status_code == 200
    assert (await client.get("/nope")).status_code == 404
    assert (await client.get("/admin/health/")).status_code == 401


async def test_without_keys_all_is_open() -> None:
    """Clients that must send some key may send any."""
    async with connect(make_world()) as client:
        assert (await client.get("/v1/models", headers={"authorization": "Bearer lm-studio"})).status_code == 200
        assert (await client.get("/admin/status")).status_code == 200


async def test_one_key_does_not_close_the_other_door() -> None:
    """Each room is guarded by its own setting."""
    async with connect(make_world({"security": {"admin_key": "boss"}})) as client:
        assert (await client.get("/v1/models")).status_code == 200
        assert (await client.get("/admin/status")).status_code == 401


async def test_a_preflight_needs_no_key_where_cors_is_on() -> None:
    """Browsers send no key with it; the answer to the request itself names the origin, also when it is an error."""
    origin = {"origin": "https://app.example"}
    async with connect(make_world(KEYED | {"server": {"cors_origins": ["https://app.example"]}})) as client:
        asked = origin | {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        preflight = await client.options("/v1/chat/completions", headers=asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://app.example"
        refused = await client.get("/v1/models", headers=origin)
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://app.example")


async def test_other_origins_get_nothing() -> None:
    """Without the setting no answer invites a browser's script."""
    async with connect(make_world()) as client:
        response = await client.get("/v1/models", headers={"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in response.headers
        assert (await client.options("/v1/models")).status_code == 405
