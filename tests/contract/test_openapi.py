"""The OpenAPI document."""

import re

import httpx

from tests.contract.conftest import connect
from tests.fakes import make_world


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


async def test_every_route_documents_its_errors(client: httpx.AsyncClient) -> None:
    """In our shape, not in FastAPI's."""
    document = (await client.get("/openapi.json")).json()
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert len(operations) >= 10
    for operation in operations:
        assert {"200", "4XX", "5XX"} == set(operation["responses"])
    assert "HTTPValidationError" not in document["components"]["schemas"]


async def test_docs_can_be_turned_off() -> None:
    """Then neither the page nor the document is there."""
    async with connect(make_world()) as client:
        assert (await client.get("/docs")).status_code == 200
    async with connect(make_world({"server": {"docs": False}})) as client:
        assert (await client.get("/docs")).status_code == 404
        assert (await client.get("/openapi.json")).status_code == 404
