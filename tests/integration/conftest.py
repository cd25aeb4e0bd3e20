"""A real server in a process of its own, over a models directory made for the test."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import httpx
import msgspec
import psutil
import pytest
import yaml

from opta_lmx.types import EchoOptions
from tests.load.bench.processes import is_running

# Id -> what it is: an echo model, or a model directory to copy.
Models: TypeAlias = Mapping[str, EchoOptions | Path]

# Seconds. Far above what a start or a stop takes on a busy two-core machine, far below a test's own limit.
_START_BOUND = 20.0
_STOP_BOUND = 15.0


@dataclass(slots=True)
class RunningServer:
    """One server process. ``log`` is the file both its output streams go to."""

    url: str
    port: int
    process: subprocess.Popen[bytes]
    log: Path
    seen: set[psutil.Process] = field(default_factory=set)

    @property
    def pid(self) -> int:
        """The server's own process id."""
        return self.process.pid

    def children(self) -> list[psutil.Process]:
        """Its live descendants; those seen once must be gone at the end, whatever became of the server.

        Call it before killing the server by SIGKILL: afterwards nobody can tell whose children they were.
        """
        try:
            found = psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        self.seen.update(found)
        return found

    def client(self) -> httpx.Client:
        """A client of this server that no proxy setting of the machine can lead astray."""
        return httpx.Client(base_url=self.url, trust_env=False, timeout=30)

    def wait_ready(self) -> None:
        """Returns once /v1/models answers, 401 where keys are set; fails with the log if it ends or is late."""
        deadline = time.monotonic() + _START_BOUND
        with self.client() as client:
            while time.monotonic() < deadline:
                if self.process.poll() is not None:
                    pytest.fail(f"the server ended with {self.process.returncode}:\n{self.log.read_text()}")
                try:
                    if client.get("/v1/models", timeout=5).status_code in (200, 401):
                        return
                except httpx.TransportError:
                    time.sleep(0.02)
        pytest.fail(f"no answer within {_START_BOUND} s:\n{self.log.read_text()}")

    def stop(self) -> None:
        """SIGTERM, then wait for the server and every child ever seen; kills and fails on what is left."""
        self.children()
        self.process.terminate()
        try:
            self.process.wait(_STOP_BOUND)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(_STOP_BOUND)
            pytest.fail(f"the server outlived SIGTERM by {_STOP_BOUND} s:\n{self.log.read_text()}")
        finally:
            left = wait_gone(self.seen)
            for child in left:
                child.kill()
        assert not left, f"children outlived the server: {left}\n{self.log.read_text()}"


def wait_gone(processes: Iterable[psutil.Process], seconds: float = 5.0) -> list[psutil.Process]:
    """Those of some processes that still run after at most so many seconds; one nobody has reaped runs no more."""
    deadline = time.monotonic() + seconds
    left = [process for process in processes if is_running(process)]
    while left and time.monotonic() < deadline:
        time.sleep(0.01)
        left = [process for process in left if is_running(process)]
    return left


@pytest.fixture
def children() -> Callable[[], set[psutil.Process]]:
    """The processes this one has started since the test began and has not reaped; earlier ones are other tests'."""

    def present() -> set[psutil.Process]:
        return set(psutil.Process().children())

    earlier = present()
    return lambda: present() - earlier


class StartServer(Protocol):
    """Starts a server over some models; ``sections`` are merged over the test's own config."""

    def __call__(self, models: Models | None = None, /, **sections: dict[str, Any]) -> RunningServer: ...


@contextmanager
def servers(directory: Path) -> Iterator[StartServer]:
    """Starts servers with their homes in a directory; at the end each is stopped and leaves no child."""
    with ExitStack() as running:

        def start(models: Models | None = None, /, **sections: dict[str, Any]) -> RunningServer:
            home = directory / f"server-{len(list(directory.glob('server-*')))}"
            started = _start(home, models or {}, sections)
            running.callback(started.stop)
            started.wait_ready()
            return started

        yield start


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StartServer]:
    """Every server started is stopped and leaves no child: ``server({"a": EchoOptions()}, memory={...})``."""
    with servers(tmp_path) as start:
        yield start


def _start(home: Path, models: Models, sections: Mapping[str, dict[str, Any]]) -> RunningServer:
    models_directory = home / "models"
    models_directory.mkdir(parents=True)
    for id, model in models.items():
        _put(models_directory / id, model)
    port = free_port()
    config: dict[str, dict[str, Any]] = {
        "server": {"host": "127.0.0.1", "port": port, "drain_seconds": 2},
        # A spare would import MLX beside every test, and a prefix cache would take room no echo model uses.
        "models": {"models_directory": str(models_directory), "starter": False, "spare_worker": False},
        "scheduling": {"prefix_cache": {"ram_bytes": 0}},
    }
    for name, section in sections.items():
        config[name] = config.get(name, {}) | section
    config_path = home / "config.yaml"
    config_path.write_text(yaml.safe_dump(config))
    log = home / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "opta_lmx", "--config", str(config_path)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(home),
            cwd=home,
        )
    return RunningServer(f"http://127.0.0.1:{port}", port, process, log)


def _put(directory: Path, model: EchoOptions | Path) -> None:
    if isinstance(model, Path):
        shutil.copytree(model, directory)
        return
    directory.mkdir(parents=True)
    (directory / "echo.json").write_bytes(msgspec.json.encode(model))


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def _environment(home: Path) -> dict[str, str]:
    """This process's environment without its settings of the server and with an empty home."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OPTA_LMX")}
    return kept | {"HOME": str(home), "TMPDIR": str(temporary_directory(home))}


def temporary_directory(home: Path) -> Path:
    """Where a server with this home, and everything it starts, keeps its temporary files."""
    directory = home / "tmp"
    directory.mkdir(exist_ok=True)
    return directory
