"""The servers that are measured: ours, vllm-mlx's own beside it, or any that already runs."""

import asyncio
import json
import os
import shutil
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Final
from urllib.parse import urlsplit

import psutil

from tests.load.bench.answer import Answer, read_answer, read_json
from tests.load.bench.client import Connection, connected
from tests.load.bench.processes import BenchError, descendants, own_python, running, tail
from tests.load.bench.workload import Ask, to_get

HOST: Final = "127.0.0.1"
OWN: Final = "lmx"
VLLM_MLX: Final = "vllm-mlx"

# Seconds. A server beside other work has taken 20 to import what it needs.
_START_SECONDS: Final = 120.0

# Between two looks at a server that starts: short against the second that is promised, long against a look's cost.
_POLL_SECONDS: Final = 0.005


@dataclass(frozen=True, slots=True)
class Launch:
    """How a server is started: ``command`` is given the port, ``home`` is where it lives and logs."""

    name: str
    model: str
    home: Path
    command: Callable[[int], list[str]]


@dataclass(frozen=True, slots=True)
class Target:
    """A running server and the model it is asked for.

    ``pid`` and ``launch`` are None where it was not started here; ``started_at`` is when its process was, and
    ``listed_at`` when it first answered /v1/models. ``has_status`` if it has our /admin/status.
    """

    name: str
    host: str
    port: int
    model: str
    has_status: bool
    pid: int | None = None
    launch: Launch | None = None
    started_at: float = 0.0
    listed_at: float = 0.0

    def to_http(self, ask: Ask) -> bytes:
        """A request as bytes for this server."""
        return ask.to_http(f"{self.host}:{self.port}", self.model)

    async def ask(self, connection: Connection, ask: Ask) -> Answer:
        """The answer to one request; raises BenchError if there is none."""
        _, done = connection.send(self.to_http(ask))
        answer = read_answer(await done)
        if answer.problem is not None:
            raise BenchError(answer.problem)
        return answer

    async def get(self, connection: Connection, path: str) -> tuple[int, Any]:
        """Status and JSON of a GET."""
        _, done = connection.send(to_get(f"{self.host}:{self.port}", path))
        return read_json(await done)

    def cpu_seconds(self) -> tuple[float, float]:
        """CPU time so far of the server's own process and of its children; zeros where it was not started here."""
        if self.pid is None:
            return 0.0, 0.0
        return _cpu(psutil.Process(self.pid)), sum(map(_cpu, descendants(self.pid)))

    async def resident_bytes(self) -> tuple[int | None, int | None]:
        """Memory of the server's own process and of its loaded workers; None for what is not there to be seen."""
        if self.pid is None:
            return None, None
        worker = None
        if self.has_status:
            async with connected(self.host, self.port, 1) as [connection]:
                _, status = await self.get(connection, "/admin/status")
            pids = [model["pid"] for model in status["models"] if model["pid"] is not None]
            worker = sum(psutil.Process(pid).memory_info().rss for pid in pids) if pids else None
        return psutil.Process(self.pid).memory_info().rss, worker


def own_server(home: Path, models: Path, model: str, *, starter: bool) -> Launch:
    """Our server as its users start it, silent and with a short drain, over the files of ``models``.

    They are linked into a directory of its own, because two servers never share one.
    """

    def command(port: int) -> list[str]:
        own = _own_models(home, port)
        _link_tree(models, own)
        config = home / f"config-{port}.yaml"
        sections = {
            "server": {"host": HOST, "port": port, "drain_seconds": 2},
            "models": {"models_directory": str(own), "default_model": model, "starter": starter},
            "logging": {"level": "WARNING"},
        }
        # JSON is YAML.
        config.write_text(json.dumps(sections))
        return own_python("-m", "opta_lmx", "--config", str(config))

    return Launch(OWN, model, home, command)


def link_imported(target: Target, models: Path) -> None:
    """Puts a model that our server imported among ``models``, for all that come after it."""
    assert target.launch is not None
    _link_tree(_own_models(target.launch.home, target.port) / target.model, models / target.model)


def _own_models(home: Path, port: int) -> Path:
    return home / f"models-{port}"


def _link_tree(source: Path, target: Path) -> None:
    """A new directory with the same files, no byte of them copied."""
    shutil.copytree(source, target, copy_function=os.link)


def vllm_mlx_server(home: Path, directory: Path, model: str, python: str) -> Launch:
    """vllm-mlx's own server with continuous batching, else as it comes."""

    def command(port: int) -> list[str]:
        serve = [python, "-m", "vllm_mlx.cli", "serve", str(directory), "--served-model-name", model]
        return [*serve, "--continuous-batching", "--host", HOST, "--port", str(port)]

    return Launch(VLLM_MLX, model, home, command)


@asynccontextmanager
async def started(launch: Launch) -> AsyncIterator[Target]:
    """A server that answers /v1/models; on leaving it has ended. Raises BenchError if it does not start."""
    port = _free_port()
    command = launch.command(port)
    log = launch.home / f"{launch.name}-{port}.log"
    started_at = perf_counter()
    async with running(command, launch.home, log) as process:
        try:
            async with asyncio.timeout(_START_SECONDS):
                while not await _lists_models(port):
                    if process.returncode is not None:
                        raise BenchError(f"{launch.name} ended with {process.returncode}: {tail(log)}")
                    await asyncio.sleep(_POLL_SECONDS)
        except TimeoutError:
            raise BenchError(f"{launch.name} did not start in {_START_SECONDS:.0f} s: {tail(log)}") from None
        listed_at = perf_counter()
        yield Target(
            name=launch.name,
            host=HOST,
            port=port,
            model=launch.model,
            has_status=launch.name == OWN,
            pid=process.pid,
            launch=launch,
            started_at=started_at,
            listed_at=listed_at,
        )


async def running_elsewhere(url: str, model: str) -> Target:
    """A server somebody else runs, by its URL with or without /v1; raises BenchError if it does not answer."""
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname is None or parts.path.rstrip("/") not in ("", "/v1"):
        raise BenchError(f"{url!r} is no server this client can reach: write it as http://HOST:PORT")
    target = Target(parts.netloc, parts.hostname, parts.port or 80, model, has_status=False)
    try:
        async with asyncio.timeout(10), connected(target.host, target.port, 1) as [connection]:
            status, _ = await target.get(connection, "/admin/status")
    except (OSError, TimeoutError) as error:
        raise BenchError(f"no server answers at {url}: {str(error) or 'it is silent'}") from None
    return Target(target.name, target.host, target.port, model, has_status=status == 200)


async def can_serve_vllm_mlx(python: str) -> str | None:
    """None if vllm-mlx's server can be imported by an interpreter, else what it misses."""
    try:
        process = await asyncio.create_subprocess_exec(
            *(python, "-c", "import vllm_mlx.server"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        return str(error)
    try:
        async with asyncio.timeout(_START_SECONDS):
            _, errors = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        return "its import did not end"
    lines = errors.decode(errors="replace").strip().splitlines()
    return None if process.returncode == 0 else (lines[-1] if lines else f"exit code {process.returncode}")


def this_python() -> str:
    """The interpreter this process runs in."""
    return sys.executable


async def _lists_models(port: int) -> bool:
    try:
        async with connected(HOST, port, 1) as [connection]:
            _, done = connection.send(to_get(HOST, "/v1/models"))
            status, _ = read_json(await done)
    except OSError:
        return False
    # 401: it is up and has keys.
    return status in (200, 401)


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def _cpu(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)
