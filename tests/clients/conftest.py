"""One real server for all clients, and a way to run a client's program against it."""

import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import pytest

from opta_lmx.types import EchoOptions
from tests.clients.environments import HERE, python_environment
from tests.integration.conftest import RunningServer, servers

if TYPE_CHECKING:
    from tests.tiny_models import Family

STARTER: Final = "smollm2-135m-instruct"

# A name the tools know, for the starter cut short at the first of these, none of which stands in compact JSON: what is
# examined is the shape of the answers. The name is of those llm-comply takes for a reasoning model. It sends an image
# to every model: this preset has it noted.
SHORT: Final = "gpt-5"
_SHORTENED: Final = {
    "model": STARTER,
    "sampling": {"temperature": 0, "stop": [".", ", ", "'", "\n"]},
    "media": "note",
}

# Seconds for one program: a few are usual, ten on a busy machine.
_RUN_BOUND: Final = 120


@pytest.fixture(scope="module")
def client_server(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: "Callable[[Family], Path]"
) -> Iterator[RunningServer]:
    """The starter, an encoder, a model of random weights (``tiny``) and two echo models, one of them ``slow``."""
    with servers(tmp_path_factory.mktemp("clients")) as start:
        yield start(
            {"tiny": tiny_model("llama"), "echo": EchoOptions(), "slow": EchoOptions(token_seconds=0.05)},
            models={"starter": True, "presets": {SHORT: _SHORTENED}},
            scheduling={"prefix_cache": {"ram_bytes": "auto"}},
        )


class RunClient(Protocol):
    """Runs a program in a home of its own and gives what it printed; fails with its words if it fails."""

    def __call__(self, command: Sequence[str | Path], *, expected: int = 0) -> str: ...


@pytest.fixture
def run_client(client_server: RunningServer, tmp_path: Path) -> RunClient:
    """Of the environment a client sees nothing but where the server is."""

    def run(command: Sequence[str | Path], *, expected: int = 0) -> str:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "OPENAI_BASE_URL": f"{client_server.url}/v1",
            "OPENAI_API_KEY": "any",
            # Else it asks a foreign host what models cost.
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        }
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=_RUN_BOUND, check=False
        )
        assert done.returncode == expected, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


@pytest.fixture(scope="session")
def pythons() -> dict[str, Path]:
    """The interpreter of each Python client's environment; those that are missing are made side by side."""
    names = sorted(path.stem for path in HERE.glob("*.txt") if path.stem != "node")
    with ThreadPoolExecutor() as builders:
        return dict(zip(names, builders.map(python_environment, names), strict=True))
