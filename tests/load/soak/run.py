"""One soak: a server over tiny models, warmed up, under load and trouble, and then the books."""

import json
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import anyio
import httpx
import msgspec
import psutil

from opta_lmx.types import EchoOptions
from tests.load.bench.processes import descendants, is_running, own_python
from tests.load.bench.targets import HOST, Launch, started
from tests.load.soak.sheet import End, Reading, Sheet
from tests.load.soak.traffic import ADMIN_KEY, ECHO, ENCODER, KEYS, MODELS, TALKERS, draw
from tests.load.soak.trouble import kill_workers
from tests.load.soak.verdict import send
from tests.load.soak.watch import compare, read, settled, until, watch

_ADMIN: Final = {"x-admin-key": ADMIN_KEY}
# Seconds. Traffic is over by then: what is left is a back-off, a load and a drain.
_SETTLE: Final = 60.0
# Seconds for connections to close and a spare worker to start.
_REST: Final = 3.0
# Requests the engine never saw are refused before it: only these kinds reach it.
_INFERENCE: Final = frozenset(
    {"chat", "long prompt", "tools", "schema", "completion", "embeddings", "rerank", "leaver"}
)


@dataclass(frozen=True, slots=True)
class Plan:
    """How long, by how many clients, and how often a worker is killed; seconds."""

    seed: int
    seconds: float
    clients: int
    kill_every: float


async def soak(plan: Plan, home: Path) -> Sheet:
    """Everything, in ``home``; raises BenchError if the server does not even start."""
    sheet = Sheet(plan.seed, plan.seconds)
    temporary = home / "tmp"
    temporary.mkdir()
    launch = Launch("soak", ECHO, home, lambda port: ["env", f"TMPDIR={temporary}", *_command(port, home)])
    async with started(launch) as target:
        assert target.pid is not None
        process = psutil.Process(target.pid)
        base = f"http://{HOST}:{target.port}"
        before, counted = await _warm_up(base, process)
        during: list[Reading] = []
        async with anyio.create_task_group() as watching:
            watching.start_soon(watch, process, during)
            await _traffic(plan, sheet, base, target.port)
            watching.cancel_scope.cancel()
        await _close_books(sheet, base, counted)
        compare(sheet, before, await settled(process, before), during)
        await _stop(sheet, process)
    # MLX keeps what it has compiled for the CPU, for the next process.
    left = [path.name for path in temporary.iterdir() if path.name != "mlx"]
    sheet.hold("temporary files left", left or 0, 0, holds=not left)
    _read_log(sheet, home / f"soak-{target.port}.log")
    sheet.balance()
    return sheet


def build_models(directory: Path) -> None:
    """Writes the models that ``traffic`` asks for; imports MLX."""
    from tests.tiny_encoders import build_tiny_encoder
    from tests.tiny_models import build_tiny_model

    build_tiny_model(directory / TALKERS[0], "llama")
    build_tiny_model(directory / TALKERS[1], "gemma3_text")
    build_tiny_encoder(directory / ENCODER)
    (directory / ECHO).mkdir()
    (directory / ECHO / "echo.json").write_bytes(msgspec.json.encode(EchoOptions(token_seconds=0.002)))


def _command(port: int, home: Path) -> list[str]:
    callers = {
        name: {"key": key, "weight": weight, "lane": lane}
        for name, key, weight, lane in (
            ("one", KEYS[0], 1, "interactive"),
            ("two", KEYS[1], 2, "interactive"),
            ("night", KEYS[2], 1, "batch"),
        )
    }
    sections: dict[str, Any] = {
        "server": {"host": HOST, "port": port, "drain_seconds": 5, "max_body_bytes": 200_000},
        "models": {"models_directory": str(home / "models"), "starter": False},
        "scheduling": {"max_running": 8, "max_waiting": 12, "max_running_total": 20, "max_waiting_total": 24},
        # Workers are killed more often than any operator would put up with.
        "workers": {"restart_limit": 1000},
        "logging": {"level": "INFO", "format": "json"},
        "security": {"admin_key": ADMIN_KEY, "callers": callers},
    }
    # JSON is YAML.
    (home / "config.yaml").write_text(json.dumps(sections))
    return own_python("-m", "opta_lmx", "--config", str(home / "config.yaml"))


@asynccontextmanager
async def _connected(base: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=base, trust_env=False, timeout=None, verify=False) as client:
        yield client


async def _warm_up(base: str, process: psutil.Process) -> tuple[Reading, int]:
    """Every route is used and every model loaded and unloaded, so that what is made once is made.

    How the process is then, and the answers the server has counted.
    """
    rng = random.Random(0)
    async with _connected(base) as client:
        for _ in range(150):
            sending = draw(rng)
            if sending.raw is None and sending.leave_after is None:
                await send(client, sending, "", 0)
        await _unload_all(client)
        counted = _answers(await _get(client, "/admin/metrics/json"))
    await anyio.sleep(_REST)
    return read(process), counted


async def _traffic(plan: Plan, sheet: Sheet, base: str, port: int) -> None:
    async with _connected(base) as client, anyio.create_task_group() as troubles:
        rng = random.Random(f"{plan.seed} trouble")
        troubles.start_soon(kill_workers, client, rng, sheet, plan.kill_every)
        deadline = anyio.current_time() + plan.seconds
        async with anyio.create_task_group() as clients:
            for number in range(plan.clients):
                clients.start_soon(_be_client, sheet, base, port, random.Random(f"{plan.seed} {number}"), deadline)
        troubles.cancel_scope.cancel()


async def _be_client(sheet: Sheet, base: str, port: int, rng: random.Random, deadline: float) -> None:
    async with _connected(base) as client:
        while anyio.current_time() < deadline:
            sending = draw(rng)
            sheet.sent[sending.kind] += 1
            sheet.add(sending.kind, await send(client, sending, HOST, port))
            if rng.random() < 0.2:
                await anyio.sleep(rng.uniform(0, 0.1))


async def _close_books(sheet: Sheet, base: str, counted_before: int) -> None:
    """What the server says it holds, and what it says it has done."""
    async with _connected(base) as client:
        await until(lambda: _is_idle(client), _SETTLE)
        status = await _get(client, "/admin/status")
        sheet.hold("running", status["requests_running"], 0, holds=not status["requests_running"])
        sheet.hold("waiting", status["requests_waiting"], 0, holds=not status["requests_waiting"])
        held = sum(model["leases"] for model in (await _get(client, "/admin/models"))["models"])
        sheet.hold("requests that hold a model", held, 0, holds=not held)
        under_way = (await _get(client, "/admin/requests"))["requests"]
        sheet.hold("requests under way", len(under_way), 0, holds=not under_way)
        leases = (await _get(client, "/admin/leases"))["leases"]
        sheet.hold("leases", len(leases), 0, holds=not leases)
        counted = _answers(await _get(client, "/admin/metrics/json")) - counted_before
        _compare_counts(sheet, counted)
        await _unload_all(client)
        reserved = (await _get(client, "/admin/memory"))["ledger"]["reservations_bytes"]
        sheet.hold("bytes reserved with nothing loaded", reserved, 0, holds=not reserved)


async def _is_idle(client: httpx.AsyncClient) -> bool:
    status, models = await _get(client, "/admin/status"), await _get(client, "/admin/models")
    if status["requests_running"] or status["requests_waiting"] or any(model["leases"] for model in models["models"]):
        return False
    return all(model["state"] in ("ready", "absent", "failed") for model in status["models"])


def _answers(metrics: dict[str, Any]) -> int:
    """Answers the server has counted since its start."""
    samples = metrics["lmx_requests_total"]["samples"]
    return sum(int(one["value"]) for one in samples if one["labels"]["outcome"] in ("stop", "length"))


def _compare_counts(sheet: Sheet, counted: int) -> None:
    """The server's own count of answers against the clients'; one who leaves at the end may count as either."""
    answered, cancelled = (sum(sheet.ends[kind, end] for kind in _INFERENCE) for end in (End.ANSWERED, End.CANCELLED))
    wanted = f"{answered} to {answered + cancelled}"
    sheet.hold("answers by the server's count", counted, wanted, holds=answered <= counted <= answered + cancelled)


async def _unload_all(client: httpx.AsyncClient) -> None:
    for model in MODELS:
        await client.post("/admin/models/unload", json={"model_id": model, "force": True}, headers=_ADMIN)


async def _get(client: httpx.AsyncClient, path: str) -> dict[str, Any]:
    answer: dict[str, Any] = (await client.get(path, headers=_ADMIN)).json()
    return answer


async def _stop(sheet: Sheet, process: psutil.Process) -> None:
    children = descendants(process.pid)
    process.send_signal(signal.SIGTERM)

    async def has_ended() -> bool:
        return not is_running(process)

    await until(has_ended, _SETTLE)
    left = [child.pid for child in children if is_running(child)]
    sheet.hold("processes left after SIGTERM", left or 0, 0, holds=not left)


def _read_log(sheet: Sheet, log: Path) -> None:
    """No bug told of itself, and the server ended as it should."""
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    strange = [line for line in lines if "exception" in line or line["level"] == "critical"]
    sheet.hold("tracebacks in the log", len(strange), 0, holds=not strange)
    sheet.faults += [f"log: {json.dumps(line)[:600]}" for line in strange]
    codes = [line["exit_code"] for line in lines if line["event"] == "server_stopped"]
    sheet.hold("exit code", codes, [0], holds=codes == [0])
