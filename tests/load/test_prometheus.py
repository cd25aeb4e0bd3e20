"""Metrics, alert rules and dashboard against a real Prometheus that scrapes a real server.

``scripts/test -m load tests/load/test_prometheus.py``; half a minute. Needs ``prometheus`` and ``promtool``, which
Debian has in the package prometheus.
"""

import json
import math
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
import yaml

from opta_lmx.types import EchoOptions, JsonObject
from tests.integration.chatting import ask, connect, until, words
from tests.integration.conftest import Models, RunningServer, StartServer, free_port, server
from tests.tiny_models import build_tiny_model

__all__ = ["server"]

pytestmark = [pytest.mark.load, pytest.mark.mlx, pytest.mark.timeout(180)]

_MONITORING = Path(__file__).parents[2] / "docs" / "monitoring"
_STOP_SECONDS = 10.0


def promtool(*arguments: str, stdin: bytes = b"") -> None:
    """Runs it; fails with what it says."""
    done = subprocess.run(["promtool", *arguments], input=stdin, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr).decode()


def test_the_rules_fire_when_they_should() -> None:
    """promtool reads every rule, and every case of the rules' own tests holds."""
    promtool("check", "rules", str(_MONITORING / "alerts.yaml"))
    promtool("test", "rules", str(_MONITORING / "alerts-test.yaml"))


@contextmanager
def scraping(lmx: RunningServer, home: Path) -> Iterator[str]:
    """The address of a Prometheus that scrapes the server every second and evaluates the rules as often."""
    home.mkdir()
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(_MONITORING / "alerts.yaml")],
        "scrape_configs": [
            {
                "job_name": "opta-lmx",
                "metrics_path": "/admin/metrics",
                "static_configs": [{"targets": [f"127.0.0.1:{lmx.port}"]}],
            }
        ],
    }
    file = home / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={file}",
                f"--storage.tsdb.path={home / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        yield f"http://{address}/api/v1/"
    finally:
        process.terminate()
        process.wait(_STOP_SECONDS)


async def query(prometheus: httpx.AsyncClient, expression: str) -> list[JsonObject]:
    """The series an expression gives now; empty while Prometheus starts. Fails if it is refused."""
    try:
        answer = await prometheus.get("query", params={"query": expression})
    except httpx.ConnectError:
        return []
    if answer.status_code == 503:
        return []
    assert answer.status_code == 200, f"{expression}: {answer.text}"
    result: list[JsonObject] = answer.json()["data"]["result"]
    return result


async def seen(prometheus: httpx.AsyncClient, expression: str) -> list[JsonObject]:
    """As ``query``, once it gives something."""
    return await until(lambda: query(prometheus, expression), bool)


async def _traffic(lmx: RunningServer, number: int) -> None:
    """Answers, refusals, a full queue, deaths of a worker, a load that fails, an idle time that ends."""
    async with connect(lmx) as client:
        for model in ("tiny", "tiny", "echo", "brief", "crash", "crash", "crash", "bad", "nobody"):
            await ask(client, model, words(10, f"{number}w"), max_tokens=12)
        async with anyio.create_task_group() as group:
            for _ in range(8):
                group.start_soon(ask, client, "full", words(8))


def _queries() -> Iterator[str]:
    board: dict[str, Any] = json.loads((_MONITORING / "grafana-dashboard.json").read_text())
    for panel in board["panels"]:
        for target in panel["targets"]:
            yield target["expr"].replace("$__rate_interval", "1m")
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            labels = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"])
            assert labels is not None
            yield f"count by ({labels[2]}) ({labels[1]})"


async def test_every_query_has_an_answer(server: StartServer, tmp_path: Path, subtests: pytest.Subtests) -> None:
    """On a server that has had all kinds of traffic, each query of the dashboard shows numbers and each rule is sound.

    What was provoked is found by its rule: a model that fails, a worker that keeps dying, errors, refusals, a server
    that is gone.
    """
    models: Models = {
        "tiny": build_tiny_model(tmp_path / "tiny", "llama"),
        "echo": EchoOptions(),
        "brief": EchoOptions(),
        "crash": EchoOptions(exit_at=5),
        "bad": EchoOptions(fail_load="broken on purpose"),
        "full": EchoOptions(token_seconds=0.05),
    }
    lmx = server(
        models,
        models={"per_model": {"brief": {"ttl_seconds": 1}}},
        scheduling={"max_running": 2, "max_waiting": 2, "prefix_cache": {"ram_bytes": 16 * 2**20}},
    )
    with scraping(lmx, tmp_path / "prometheus") as url:
        async with httpx.AsyncClient(base_url=url, trust_env=False) as prometheus:
            await _check(lmx, prometheus, subtests)


async def _check(lmx: RunningServer, prometheus: httpx.AsyncClient, subtests: pytest.Subtests) -> None:
    await seen(prometheus, "lmx_build_info")
    for number in (1, 2):
        await _traffic(lmx, number)
        await seen(prometheus, f'lmx_requests_total{{model="full", outcome="stop"}} >= {4 * number}')
    await seen(prometheus, 'lmx_evictions_total{reason="expired", model="brief"} > 0')
    await seen(prometheus, 'ALERTS{alertname="LmxWorkerRestarts", alertstate="firing"}')
    with lmx.client() as client:
        promtool("check", "metrics", stdin=client.get("/admin/metrics").content)
    for expression in _queries():
        with subtests.test(expression):
            shown = await query(prometheus, expression.replace("$instance", ".*").replace("$model", ".*"))
            assert any(math.isfinite(float(series["value"][1])) for series in shown), shown
    rules = (await prometheus.get("rules")).json()["data"]["groups"][0]["rules"]
    assert {rule["name"]: rule["health"] for rule in rules} == {rule["name"]: "ok" for rule in rules}
    for alert, model in (
        ("LmxModelFailed", "bad"),
        ("LmxRequestErrors", "crash"),
        ("LmxWorkerRestarts", "crash"),
        ("LmxRefusals", "full"),
    ):
        with subtests.test(alert):
            [rule] = [rule for rule in rules if rule["name"] == alert]
            found = await query(prometheus, rule["query"])
            assert model in {series["metric"]["model"] for series in found}
    lmx.stop()
    await seen(prometheus, 'ALERTS{alertname="LmxDown"}')
