"""The OpenAPI document and its page."""

import re
from typing import Any

import httpx
import pytest

from tests.contract.conftest import connect
from tests.contract.encoders import make_encoder_world
from tests.fakes import make_world, model_files

# What may be fetched by a page: attributes of the elements, and what its script names.
_HOSTS = re.compile(r"(?:https?:)?//[\w.-]+", re.IGNORECASE)


def operations_of(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every operation by ``METHOD /path``."""
    return {
        f"{method.upper()} {path}": operation
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    }


async def test_every_reference_leads_somewhere(client: httpx.AsyncClient) -> None:
    """A generator of clients can read it; request bodies are described although FastAPI does not read them."""
    response = await client.get("/openapi.json")
    document = response.json()
    schemas = document["components"]["schemas"]
    references = set(re.findall(r'"\$ref":"#/components/schemas/([^"]+)"', response.text))
    assert references
    assert references <= set(schemas)
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert chat["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/ChatRequest")
    assert {"model", "messages"} == set(schemas["ChatRequest"]["required"])


async def test_every_route_documents_its_answers(client: httpx.AsyncClient) -> None:
    """One success with its content, and each error by its own status, in our shape, not in FastAPI's."""
    document = (await client.get("/openapi.json")).json()
    operations = operations_of(document)
    assert len(operations) >= 30
    for name, operation in operations.items():
        answers = operation["responses"]
        [success] = [status for status in answers if status.startswith("2")]
        assert success == ("202" if name == "POST /admin/models/download" else "200"), name
        assert answers[success]["content"], name
        failures = set(answers) - {success}
        assert {"400", "401", "403", "408", "431", "500", "503"} <= failures, name
        assert all(re.fullmatch(r"[45]\d\d", status) for status in failures), name
        for status in failures:
            schema = answers[status]["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/ErrorBody"}, (name, status)
    assert "HTTPValidationError" not in document["components"]["schemas"]


async def test_every_route_says_what_it_does_and_takes(client: httpx.AsyncClient) -> None:
    """In words, with an example of every body, and 413 for a body that is too large."""
    for name, operation in operations_of((await client.get("/openapi.json")).json()).items():
        assert operation["summary"], name
        assert operation["description"], name
        assert operation["tags"], name
        if name.startswith("POST") and name != "POST /admin/config/reload":
            body = operation["requestBody"]["content"]["application/json"]
            assert body["schema"]["$ref"], name
            assert body["examples"], name
            assert "413" in operation["responses"], name


async def test_streams_are_described(client: httpx.AsyncClient) -> None:
    """Where an answer may be server-sent events, their form is shown."""
    operations = operations_of((await client.get("/openapi.json")).json())
    streaming = {
        name: operation["responses"]["200"]["content"]["text/event-stream"]
        for name, operation in operations.items()
        if "text/event-stream" in operation["responses"].get("200", {}).get("content", {})
    }
    assert {"POST /v1/chat/completions", "POST /v1/completions", "GET /admin/events"} <= set(streaming)
    assert all(stream["example"].endswith("\n\n") for stream in streaming.values())


@pytest.mark.parametrize("keys", [False, True])
async def test_keys_are_described(keys: bool) -> None:
    """Which header opens which room; where no key is configured, none is also an answer."""
    settings = {"security": {"api_keys": ["sk-one"], "admin_key": "boss"}} if keys else {}
    async with connect(make_world(settings)) as client:
        document = (await client.get("/openapi.json")).json()
    operations = operations_of(document)
    free: list[dict[str, list[str]]] = [] if keys else [{}]
    assert operations["POST /v1/chat/completions"]["security"] == [*free, {"bearer": []}, {"api_key": []}]
    assert operations["GET /admin/status"]["security"] == [*free, {"bearer": []}, {"admin_key": []}]
    assert {} in operations["GET /admin/health"]["security"]
    schemes = document["components"]["securitySchemes"]
    assert {name for operation in operations.values() for way in operation["security"] for name in way} == set(schemes)


async def test_every_example_of_inference_works(subtests: pytest.Subtests) -> None:
    """Sent as it stands, on a server with the models it names, it is answered."""
    world, engine = make_encoder_world()
    world.models.available = (model_files("smollm2-135m-instruct"), model_files("all-minilm-l6-v2"))
    engine.scores = (0.1, 0.9)
    async with connect(world) as client:
        operations = operations_of((await client.get("/openapi.json")).json())
        for name, operation in operations.items():
            if not name.startswith("POST /v1/"):
                continue
            examples = operation["requestBody"]["content"]["application/json"]["examples"]
            for title, example in examples.items():
                with subtests.test(f"{name} {title}"):
                    response = await client.post(name.partition(" ")[2], json=example["value"])
                    assert response.status_code == 200, response.text


async def test_docs_can_be_turned_off() -> None:
    """Then neither the page nor its files nor the document is there."""
    paths = ("/docs", "/docs/swagger-ui.css", "/openapi.json")
    async with connect(make_world()) as client:
        assert [(await client.get(path)).status_code for path in paths] == [200, 200, 200]
    async with connect(make_world({"server": {"docs": False}})) as client:
        assert [(await client.get(path)).status_code for path in paths] == [404, 404, 404]


async def test_the_page_needs_no_other_host(client: httpx.AsyncClient) -> None:
    """Every file it asks for comes from here, and its policy forbids the browser any other host."""
    page = await client.get("/docs")
    assert _HOSTS.findall(page.text) == []
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert _HOSTS.findall(policy) == []
    assert '"validatorUrl": null' in page.text
    files = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(files) == 3
    for file in files:
        response = await client.get(file)
        assert response.status_code == 200, file
        assert response.content
    assert "url: '/openapi.json'" in page.text


async def test_only_the_pages_files_are_served(client: httpx.AsyncClient) -> None:
    """No path leads out of the three."""
    for path in ("/docs/redoc.standalone.js", "/docs/..%2Fcore.py", "/docs/", "/docs/x"):
        response = await client.get(path)
        assert response.status_code == 404, path
        assert response.json()["error"]["type"] == "invalid_request_error"
