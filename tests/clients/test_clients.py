"""Each client, as its own documentation says it is used, gets from a real server what it expects of OpenAI's."""

import json
import shutil
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.clients.conftest import SHORT, STARTER, RunClient
from tests.clients.environments import HERE, node_environment
from tests.integration.conftest import RunningServer

# Seconds. On a machine that has no environment yet, the first test also waits for its making.
pytestmark = [pytest.mark.mlx, pytest.mark.timeout(400)]


@pytest.mark.parametrize("name", ["agents", "langchain", "litellm"])
def test_a_python_client(name: str, pythons: dict[str, Path], run_client: RunClient) -> None:
    """Every check of its script holds: chats, streams, tools, structured output, embeddings, errors, cancelling."""
    run_client([pythons[name], HERE / f"{name}_client.py"])


@pytest.mark.parametrize("name", ["openai", "ai"])
def test_a_javascript_client(name: str, run_client: RunClient) -> None:
    """Likewise; of the official client its helpers for streams, zod and running tools, of the AI SDK its objects."""
    # Packages are looked for beside the script.
    script = shutil.copy(HERE / f"{name}_node.mjs", node_environment())
    run_client(["node", script])


def test_the_llm_command(
    pythons: dict[str, Path], run_client: RunClient, client_server: RunningServer, tmp_path: Path
) -> None:
    """Named in extra-openai-models.yaml, a model answers whole and streamed, goes on talking, and fills in a schema."""
    settings = tmp_path / ".config" / "io.datasette.llm"
    settings.mkdir(parents=True)
    rows = [
        f"- {{model_id: {name}, model_name: {model}, api_base: '{client_server.url}/v1', supports_schema: true}}\n"
        for name, model in {"starter": STARTER, "random": "tiny", "absent": "no-such-model"}.items()
    ]
    (settings / "extra-openai-models.yaml").write_text("".join(rows))
    llm = pythons["llm"].with_name("llm")
    asked = ["prompt", "-m", "starter", "-o", "temperature", "0", "What is the capital of France?"]
    assert run_client([llm, *asked, "--no-stream"]) == "The capital of France is Paris.\n"
    assert run_client([llm, *asked]) == "The capital of France is Paris.\n"
    assert run_client([llm, "prompt", "--continue", "-o", "max_tokens", "2", "Of Italy?"]).strip()
    schema = {"type": "object", "properties": {"capital": {"type": "boolean"}}, "required": ["capital"]}
    filled = run_client([llm, "prompt", "-m", "random", "--schema", json.dumps(schema), "Paris"])
    assert isinstance(json.loads(filled)["capital"], bool)
    run_client([llm, "prompt", "-m", "absent", "Hi"], expected=1)


class RunComply(Protocol):
    """llm-comply's tests for openai-chat with a model, each with its id."""

    def __call__(self, model: str, *options: str, expected: int = 0) -> dict[str, dict[str, Any]]: ...


@pytest.fixture
def run_comply(pythons: dict[str, Path], run_client: RunClient, client_server: RunningServer) -> RunComply:
    """The tool without a network: it brings OpenAI's schema with it."""

    def run(model: str, *options: str, expected: int = 0) -> dict[str, dict[str, Any]]:
        told = ["--format", "openai-chat", "-u", f"{client_server.url}/v1", "-k", "any", "-m", model, "--json"]
        printed = run_client([pythons["comply"].with_name("llm-comply"), *told, *options], expected=expected)
        return {result["id"]: result for result in json.loads(printed)["results"]}

    return run


def test_llm_comply(run_comply: RunComply) -> None:
    """Its suite for openai-chat passes without a failure, and warns of nothing but reasoning the starter has not."""
    results = run_comply(SHORT)
    # The starter does not reason, whatever it is called.
    assert "reasoning_tokens is 0" in results["chat-reasoning-summary"].pop("warnings")[0]
    assert len(results) == 9
    wrong = [result for result in results.values() if result["status"] != "passed" or result.get("warnings")]
    assert not wrong, wrong


def test_llm_comply_with_a_text_model(run_comply: RunComply) -> None:
    """A model that reads only text refuses its image, where no preset has it noted.

    The tool has no way to say that a model reads only text: that test demands 200 of every model.
    """
    results = run_comply(STARTER, "--filter", "chat-image-input", expected=1)
    assert results["chat-image-input"]["errors"][0] == "HTTP 400 (expected [200])"
