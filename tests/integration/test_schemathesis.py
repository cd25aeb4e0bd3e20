"""Requests made from OpenAPI documents, ours and OpenAI's, against a real server: no answer is undocumented.

Schemathesis makes them, valid ones and broken ones, in a process of its own. The long run is on demand:
``scripts/test -m load tests/integration/test_schemathesis.py``.
"""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from pydantic import TypeAdapter

from opta_lmx.types import EchoOptions, JsonObject
from tests.integration.conftest import RunningServer, StartServer

# The names in the document's own examples.
MODELS: Final = {"smollm2-135m-instruct": EchoOptions(), "all-minilm-l6-v2": EchoOptions()}

# Two streams that end when the client leaves, not before; and a hub that is not there.
_ENDLESS: Final = ("/admin/events", "/admin/models/download/{download_id}/progress", "/admin/models/download")

_CHECKS: Final = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"

_SEED: Final = 20261126

REFERENCE: Final = "#/components/schemas/{model}"


_BY_NAME: Final[JsonObject] = {
    "type": "object",
    "properties": {"error": {"type": "object", "required": ["param"], "properties": {"param": {"type": "string"}}}},
    "required": ["error"],
}


def openai_document(ours: JsonObject) -> JsonObject:
    """OpenAI's requests as the types of its own client have them, with our answers to these paths.

    What its client can express is answered, or refused by the name of the field: never with a 422, no 400 without.
    """
    paths: JsonObject = {
        path: {"get": operations["get"]} for path, operations in ours["paths"].items() if path.startswith("/v1/models")
    }
    schemas: JsonObject = dict(ours["components"]["schemas"])
    requests: dict[str, Any] = {
        "/v1/chat/completions": chat_create_params.CompletionCreateParams,
        "/v1/completions": completion_create_params.CompletionCreateParams,
        "/v1/embeddings": embedding_create_params.EmbeddingCreateParams,
    }
    for number, (path, request) in enumerate(requests.items()):
        # Each under names of its own: the three documents use some twice.
        template = REFERENCE.format(model=f"OpenAI{number}_{{model}}")
        schema = TypeAdapter(request).json_schema(ref_template=template)
        schemas |= {f"OpenAI{number}_{name}": part for name, part in schema.pop("$defs", {}).items()}
        post = {**ours["paths"][path]["post"]}
        post["responses"] = {status: answer for status, answer in post["responses"].items() if status != "422"}
        post["responses"]["400"] = {"description": "By name.", "content": {"application/json": {"schema": _BY_NAME}}}
        post["requestBody"] = {"required": True, "content": {"application/json": {"schema": _with_our_model(schema)}}}
        paths[path] = {"post": post}
    return {**ours, "paths": paths, "components": {**ours["components"], "schemas": schemas}}


def _with_our_model(schema: JsonObject) -> JsonObject:
    """OpenAI's list of its models among the values of ``model``, with one of ours: most requests must get further."""
    return {"allOf": [schema, {"type": "object", "properties": {"model": {"enum": [*MODELS, "gpt-5"]}}}]}


def run_schemathesis(
    server: RunningServer, document: JsonObject, folder: Path, *, examples: int, seed: int, mode: str = "all"
) -> None:
    """Fails with schemathesis's report, which names the seed and a curl command for each failure."""
    path = folder / "openapi.json"
    path.write_text(json.dumps(document))
    command = [sys.executable, "-m", "schemathesis.cli", "run", str(path), "--url", server.url, "--no-color"]
    command += ["--checks", _CHECKS, "--phases", "examples,coverage,fuzzing", "--mode", mode]
    command += ["--max-examples", str(examples), "--seed", str(seed), "--generation-database", "none"]
    command += [
        "--continue-on-failure",
        "--suppress-health-check",
        "all",
        "--warnings",
        "off",
        "--request-timeout",
        "20",
    ]
    for endless in _ENDLESS:
        command += ["--exclude-path", endless]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def own_document(server: RunningServer) -> JsonObject:
    """What the server says of itself."""
    with server.client() as client:
        document: JsonObject = client.get("/openapi.json").json()
    return document


@pytest.mark.timeout(180)
def test_our_own_document_holds(server: StartServer, tmp_path: Path) -> None:
    """No answer to what it allows, or nearly allows, is a 5xx, of an undocumented status, type or shape."""
    running = server(MODELS)
    run_schemathesis(running, own_document(running), tmp_path, examples=8, seed=_SEED)


@pytest.mark.timeout(180)
def test_openais_document_holds(server: StartServer, tmp_path: Path) -> None:
    """The same for requests that OpenAI's own client can express; a refusal names the field."""
    running = server(MODELS)
    document = openai_document(own_document(running))
    run_schemathesis(running, document, tmp_path, examples=40, seed=_SEED, mode="positive")


@pytest.mark.load
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("whose", ["ours", "openai's"])
def test_the_documents_hold_for_long(server: StartServer, tmp_path: Path, whose: str) -> None:
    """Both, with thousands of examples and a seed of the day."""
    running = server(MODELS)
    document, mode = own_document(running), "all"
    if whose == "openai's":
        document, mode = openai_document(document), "positive"
    run_schemathesis(running, document, tmp_path, examples=2000, seed=random.randrange(2**31), mode=mode)
