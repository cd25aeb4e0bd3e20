"""Which hosts a request may name, and what pages of other sites may not do."""

from typing import Any

import httpx
import pytest

from tests.contract.conftest import CHAT, connect
from tests.fakes import make_world

KEYS = {"api_keys": ["sk"], "admin_key": "boss"}
OPEN_LAN = {"server": {"host": "0.0.0.0"}, "security": {"allow_open_lan": True}}


async def get(settings: dict[str, Any], host: str, **headers: str) -> httpx.Response:
    """GET /admin/health as ``host``."""
    async with connect(make_world(settings)) as client:
        return await client.get("/admin/health", headers={"host": host, **headers})


@pytest.mark.parametrize("host", ["localhost", "localhost:1234", "LOCALHOST", "127.0.0.1:80", "[::1]", "[::1]:1234"])
async def test_this_machine_may_be_named(host: str) -> None:
    """With any port, in any case."""
    assert (await get({}, host)).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:1234", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1", "[::2]"],
)
async def test_no_other_host_is_served_on_loopback(host: str) -> None:
    """403 in the shape of every error, naming the setting that would change it: a rebound name reads nothing."""
    response = await get({}, host)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (403, "host_not_allowed")
    assert "server.allowed_hosts" in error["message"]
    assert "x-request-id" in response.headers


@pytest.mark.parametrize("host", ["", "user@localhost", "localhost:x", "local host", "localhost/", "[::1"])
async def test_what_is_no_host_is_no_request(host: str) -> None:
    """400, whatever else it says."""
    assert (await get({}, host)).status_code == 400


async def test_configured_hosts_are_served() -> None:
    """Names and globs, besides the usual ones."""
    settings = {"server": {"allowed_hosts": ["host.docker.internal", "*.lan"]}}
    hosts = ("host.docker.internal:1234", "mac.LAN", "localhost", "lan", "evil.example")
    assert [(await get(settings, host)).status_code for host in hosts] == [200, 200, 200, 403, 403]


async def test_with_keys_other_machines_may_use_any_name() -> None:
    """Unless names are configured: then these alone."""
    lan = {"server": {"host": "0.0.0.0"}, "security": KEYS}
    assert (await get(lan, "mac.example")).status_code == 200
    named = lan | {"server": {"host": "0.0.0.0", "allowed_hosts": ["mac.example"]}}
    assert [(await get(named, host)).status_code for host in ("mac.example", "10.0.0.5", "localhost")] == [
        200,
        403,
        200,
    ]


async def test_an_open_server_is_not_called_by_names_others_may_own() -> None:
    """Without keys a page that rebinds its name would be let in: only addresses and the machine's own are served."""
    assert [(await get(OPEN_LAN, host)).status_code for host in ("10.0.0.5:1234", "[fe80::1]", "evil.example")] == [
        200,
        200,
        403,
    ]


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "http://localhost:3000", "null", "http://localhost.evil.example"]
)
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/admin/models/load"), ("DELETE", "/admin/models/tiny"), ("POST", "/v1/chat/completions")],
)
async def test_pages_of_other_sites_change_nothing(origin: str, method: str, path: str) -> None:
    """A page can send text without asking first; what it names as its origin is refused before anything is done."""
    world = make_world()
    async with connect(world) as client:
        headers = {"origin": origin, "content-type": "text/plain"}
        response = await client.request(method, path, content=b'{"model_id": "tiny"}', headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (403, "origin_not_allowed")
    assert (world.engine.loads, world.engine.requests) == ([], [])


@pytest.mark.parametrize("origin", ["http://localhost", "app://obj", "vscode-webview://1a2b", "chrome-extension://abc"])
async def test_the_own_pages_and_programs_with_windows_are_served(origin: str) -> None:
    """/docs sends the server's own origin; what is no page of the web was installed by somebody."""
    async with connect(make_world()) as client:
        assert (await client.post("/v1/chat/completions", json=CHAT, headers={"origin": origin})).status_code == 200


async def test_configured_origins_may_change_things() -> None:
    """By name, or all of them."""
    for origins in (["https://app.example"], ["*"]):
        async with connect(make_world({"server": {"cors_origins": origins}})) as client:
            response = await client.post("/v1/chat/completions", json=CHAT, headers={"origin": "https://app.example"})
            assert response.status_code == 200
            assert "access-control-allow-origin" in response.headers
