"""A server alone in its directory: the next one is refused, a dead one is no obstacle, other users see nothing."""

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from opta_lmx.cli import main
from opta_lmx.cli.failure import ExitCode
from opta_lmx.service.lock import LOCK_NAME
from opta_lmx.service.permissions import find_lax
from opta_lmx.types import EchoOptions
from tests.hub_server import HubServer, Repo, running_hub
from tests.integration.chatting import until
from tests.integration.conftest import RunningServer, StartServer

REPO = "acme/parrot"
WEIGHTS = "model.safetensors"

# Of <linux/prctl.h>.
_PR_SET_CHILD_SUBREAPER = 36


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A hub with one model, of the kind that echoes."""
    with running_hub() as hub:
        files = {"echo.json": msgspec.json.encode(EchoOptions()), WEIGHTS: bytes(100_000)}
        hub.repos[REPO] = Repo(files, large={WEIGHTS})
        yield hub


def start_another(running: RunningServer, *flags: str) -> subprocess.CompletedProcess[str]:
    """A second server with the settings of the first; runs until it ends."""
    config = running.log.parent / "config.yaml"
    return subprocess.run(
        [sys.executable, "-m", "opta_lmx", "--config", str(config), *flags],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
        env={**os.environ, "HOME": str(running.log.parent)},
    )


def test_a_second_server_is_refused_at_once(server: StartServer) -> None:
    """On another port over the same models it ends with 1, names the holder and how to stop it, and harms nothing."""
    running = server({"a": EchoOptions()})
    second = start_another(running, "--port", "0")
    assert second.returncode == ExitCode.REFUSED
    error, hint = second.stderr.splitlines()
    models = running.log.parent / "models"
    assert error == f"error: the models directory {models} is in use by another server (pid {running.pid})"
    assert hint.startswith(f"hint: stop it (kill {running.pid}, or opta-lmx service stop)")
    with running.client() as client:
        assert client.post("/admin/models/load", json={"model_id": "a"}).status_code == 200


@pytest.fixture
def orphans() -> Iterator[None]:
    """Processes whose parent dies become this one's, where the system can: what becomes of them is seen here alone."""
    adopts = sys.platform == "linux"
    if adopts:
        assert ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    yield
    if adopts:
        assert ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) == 0


@pytest.mark.usefixtures("orphans")
def test_a_killed_server_leaves_no_lock(server: StartServer, tmp_path: Path) -> None:
    """Not even where a worker that cannot run outlives it for a while: a new one starts over the same models."""
    directory = tmp_path / "models"
    (directory / "a").mkdir(parents=True)
    (directory / "a" / "echo.json").write_bytes(b"{}")
    first = server({}, models={"models_directory": str(directory), "starter": False, "spare_worker": False})
    with first.client() as client:
        assert client.post("/admin/models/load", json={"model_id": "a"}).status_code == 200
    (worker,) = first.children()
    worker.suspend()
    try:
        first.process.kill()
        assert first.process.wait(10) == -signal.SIGKILL
        second = server({}, models={"models_directory": str(directory), "starter": False, "spare_worker": False})
        assert worker.status() == psutil.STATUS_STOPPED, f"it ended with {worker.wait(1)}"
        with second.client() as client:
            assert client.post("/admin/models/load", json={"model_id": "a"}).status_code == 200
    finally:
        worker.resume()
    worker.wait(5)  # raises if it lives on


@pytest.mark.mlx
async def test_what_a_server_creates_is_its_users_alone(server: StartServer, hub: HubServer, tmp_path: Path) -> None:
    """Log, lock, models.lock, an import and a download: files 0600, directories 0700, whatever the shell's umask."""
    data = tmp_path / "data"
    log = data / "logs" / "server.log"
    running = server(
        {},
        models={"models_directory": str(data / "models"), "starter": True, "spare_worker": False},
        downloads={"endpoint": hub.url},
        logging={"file": str(log)},
    )
    assert main(["pull", REPO, "--url", running.url]) == ExitCode.DONE

    async def logged() -> str:
        return log.read_text()

    await until(logged, lambda text: "gguf_imported" in text)
    made = {path.relative_to(data).parts[:2] for path in data.rglob("*") if path.is_file()}
    expected = ("acme", "smollm2-135m-instruct", "models.lock", LOCK_NAME)
    assert made == {("logs", "server.log"), *(("models", name) for name in expected)}
    modes = {str(path.relative_to(data)): path.stat().st_mode & 0o777 for path in (data, *data.rglob("*"))}
    assert {name: f"{mode:o}" for name, mode in modes.items() if mode not in (0o600, 0o700)} == {}
    assert find_lax(data) == []


def test_doctor_sees_a_running_server(server: StartServer, capsys: pytest.CaptureFixture[str]) -> None:
    """With the server up doctor knows it by its port and its lock, and lists what is loaded."""
    running = server({"a": EchoOptions()})
    with running.client() as client:
        assert client.post("/admin/models/load", json={"model_id": "a"}).status_code == 200
    config = running.log.parent / "config.yaml"
    assert main(["doctor", "--json", "--config", str(config)]) == ExitCode.DONE
    found = {finding["check"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert found["port"]["what"] == f"the server at {running.url} is well"
    assert found["lock"]["what"] == f"the server (pid {running.pid}) holds the models directory"
    assert found["workers"]["what"] == "loaded: a"
    # The directory itself was made by the test, with the usual umask.
    assert found["permissions"]["remedy"] == f"chmod -R go-rwx {running.log.parent / 'models'}"
