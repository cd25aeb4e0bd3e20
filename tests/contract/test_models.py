"""GET /v1/models and /v1/models/{id}."""

import httpx
import pytest

from opta_lmx.types import ModelState
from tests.contract.conftest import connect
from tests.fakes import World, make_world, model_files, resident

ALIASES = {"gpt-4o": "tiny", "gpt": "gpt-4o", "lost": "gone", "claude-*": "tiny", "tiny": "acme/small-4bit"}
PRESETS = {"coder": {"model": "acme/small-4bit"}}


@pytest.fixture
def world() -> World:
    """Aliases of every kind, a preset, and a model that cannot be used."""
    world = make_world({"models": {"aliases": ALIASES, "presets": PRESETS}})
    world.models.available += (model_files("broken", problem="no tokenizer"),)
    return world


async def listed(client: httpx.AsyncClient) -> list[str]:
    """The ids in their order."""
    body = (await client.get("/v1/models")).json()
    assert body["object"] == "list"
    return [card["id"] for card in body["data"]]


async def test_every_usable_name_is_listed_once(client: httpx.AsyncClient) -> None:
    """Models, then aliases and presets that lead to one; no globs, no broken models, no dead ends."""
    assert await listed(client) == ["tiny", "acme/small-4bit", "gpt-4o", "gpt", "coder"]


async def test_a_card_is_openais(client: httpx.AsyncClient) -> None:
    """The publisher owns a model; an alias is shown as the model it stands for."""
    assert (await client.get("/v1/models")).json()["data"][1] == {
        "id": "acme/small-4bit",
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "acme",
    }
    assert (await client.get("/v1/models/coder")).json()["owned_by"] == "acme"
    assert (await client.get("/v1/models/gpt")).json()["owned_by"] == "opta-lmx"


@pytest.mark.parametrize("path", ["acme/small-4bit", "acme%2Fsmall-4bit"])
async def test_a_slash_may_be_sent_either_way(client: httpx.AsyncClient, path: str) -> None:
    """SDKs differ in how they quote ids."""
    response = await client.get(f"/v1/models/{path}")
    assert (response.status_code, response.json()["id"]) == (200, "acme/small-4bit")


@pytest.mark.parametrize("name", ["tinny", "broken", "lost", "acme", "", "x" * 5000])
async def test_an_unknown_model(client: httpx.AsyncClient, name: str) -> None:
    """Status 404, with near names where there are any."""
    response = await client.get(f"/v1/models/{name}")
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert ("Did you mean 'tiny'" in error["message"]) == (name == "tinny")


async def test_what_a_glob_catches_is_a_model(client: httpx.AsyncClient) -> None:
    """Clients that look their model up before they use it find what they would get."""
    assert (await client.get("/v1/models/claude-sonnet")).json()["id"] == "claude-sonnet"


async def test_without_jit_only_loaded_models_are_listed() -> None:
    """A request for any other would be refused."""
    world = make_world({"models": {"jit": False, "aliases": {"gpt": "tiny"}}})
    world.residency.residents = (resident("tiny"), resident("acme/small-4bit", ModelState.LOADING))
    async with connect(world) as client:
        assert await listed(client) == ["tiny"]
        assert (await client.get("/v1/models/acme/small-4bit")).status_code == 404
