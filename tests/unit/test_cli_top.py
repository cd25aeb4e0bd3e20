"""``opta-lmx top``: the figures over several looks, and the lines they become."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opta_lmx.cli import main
from opta_lmx.cli.failure import ExitCode
from opta_lmx.cli.memory_bar import holders_bar
from opta_lmx.cli.top import Watch, frame, quantile
from tests.cli_server import FakeServer, server
from tests.fake_workers import Clock

__all__ = ["server"]

GIB = 2**30

LEDGER = {
    "total_bytes": 100 * GIB,
    "limit_bytes": 90 * GIB,
    "used_bytes": 30 * GIB,
    "other_processes_bytes": 10 * GIB,
    "kv_reserved_bytes": 4 * GIB,
    "prefix_cache_bytes": 5 * GIB,
    "reservations_bytes": 12 * GIB,
}
REQUEST = {
    "request_id": "req_0123456789abcdef0123456789abcdef",
    "model_id": "acme/small-4bit",
    "phase": "decode",
    "age_seconds": 75.25,
    "queue_seconds": 0.001,
    "ttft_seconds": 0.25,
    "prompt_tokens": 812,
    "cached_tokens": 768,
    "completion_tokens": 187,
    "tokens_per_second": 42.0,
    "choices": 1,
}
WAITING = REQUEST | dict.fromkeys(("queue_seconds", "ttft_seconds", "prompt_tokens", "tokens_per_second"))
WAITING |= {"phase": "queue", "completion_tokens": 0, "age_seconds": 0.5, "request_id": "req_2"}
MODEL = {"id": "acme/small-4bit", "state": "ready", "requests_running": 1, "requests_waiting": 1}
MODEL |= {"memory_bytes": 3 * GIB, "restarts": 0, "pid": 7, "reason": None}


def answers(tokens: float = 0, buckets: Mapping[str, int] | None = None, *rows: Mapping[str, Any]) -> dict[str, Any]:
    """All that top asks for, in one."""
    histogram = [{"labels": {"model": "m"}, "count": 0, "sum": 0.0, "buckets": buckets}] if buckets else []
    return {
        "version": "1.2.3",
        "uptime_seconds": 3725.5,
        "draining": False,
        "requests_running": 1,
        "requests_waiting": 1,
        "models": [MODEL],
        "memory": {"ledger": LEDGER},
        "requests": list(rows),
        "lmx_generation_tokens_total": {"samples": [{"labels": {"model": "m"}, "value": tokens}]},
        "lmx_time_to_first_token_seconds": {"samples": histogram},
    }


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith("OPTA_LMX")]:
        monkeypatch.delenv(name)


def test_rates_and_percentiles_are_those_of_lately() -> None:
    """The first look takes the requests' own rates and all first tokens; later ones the last seconds' and minute's."""
    clock, now = Clock(), answers(1000, {"0.1": 10, "1.0": 10, "+Inf": 10}, REQUEST, WAITING)
    watch = Watch(lambda path: now, clock)
    first = watch.look()
    assert (first["tokens_per_second"], first["ttft_window_seconds"]) == (42.0, None)
    assert first["ttft_p50_seconds"] == pytest.approx(0.05)
    now = answers(1100, {"0.1": 10, "1.0": 12, "+Inf": 12})
    clock.seconds += 2
    second = watch.look()
    assert (second["tokens_per_second"], second["ttft_window_seconds"]) == (50.0, 2)
    assert second["ttft_p50_seconds"] == pytest.approx(0.55)
    clock.seconds += 61
    third = watch.look()
    assert third["ttft_p50_seconds"] is not None, "nothing is left to compare with: all there were"


def test_another_server_begins_anew() -> None:
    """One that has run for less time than before was just started: its counters are compared with nothing."""
    clock, now = Clock(), answers(1000, {"1.0": 10, "+Inf": 10})
    watch = Watch(lambda path: now, clock)
    watch.look()
    clock.seconds += 1
    now = answers(3000, {"1.0": 1, "+Inf": 1}, REQUEST) | {"uptime_seconds": 0.5}
    figures = watch.look()
    assert (figures["tokens_per_second"], figures["ttft_window_seconds"]) == (42.0, None)


def test_quantiles_are_prometheus_s() -> None:
    """Linear inside a bucket, its lower bound in the last one, nothing of nothing."""
    inf = float("inf")
    assert quantile(0.5, {0.1: 0, 1.0: 4, inf: 4}) == pytest.approx(0.55)
    assert quantile(0.95, {0.1: 2, 1.0: 4, inf: 8}) == 1.0
    assert quantile(0.5, {0.1: 0, inf: 0}) is None
    assert quantile(0.5, {}) is None


@given(columns=st.integers(13, 250))
def test_no_line_is_wider_than_the_terminal(columns: int) -> None:
    """Whatever its width; colours take no room and change no letter."""
    figures = Watch(lambda path: answers(5, {"1.0": 1, "+Inf": 1}, REQUEST, WAITING), Clock()).look()
    plain = list(frame(figures, columns, colour=False))
    assert max(map(len, plain)) <= columns
    coloured = [re.sub(r"\x1b\[\d+m", "", line) for line in frame(figures, columns, colour=True)]
    assert coloured == plain


def test_a_row_for_each_model_and_request() -> None:
    """What is not known yet is a dash; a narrow terminal keeps the id, the phase and the speed."""
    figures = Watch(lambda path: answers(5, {"1.0": 1, "+Inf": 1}, REQUEST, WAITING), Clock()).look()
    lines = [" ".join(line.split()) for line in frame(figures, 120, colour=False)]
    assert lines[0] == "opta-lmx 1.2.3 up 1:02:05"
    assert lines[1] == "1 running 1 waiting 42.0 tok/s TTFT p50 500 ms p95 950 ms (since its start)"
    assert "acme/small-4bit ready 1 1 3.0 GiB 0" in lines
    assert lines[-2].endswith("acme/small-4bit decode 812 768 187 42.0 250 ms 1:15")
    assert lines[-1] == "req_2 acme/small-4bit queue - - 0 - - 500 ms"
    narrow = [" ".join(line.split()) for line in frame(figures, 60, colour=False)]
    assert narrow[-3] == "REQUEST PHASE TOKENS TOK/S"


def test_the_bar_shows_who_holds_memory() -> None:
    """One cell a GiB here; what is reserved beyond caches is promised to loads."""
    bar, legend = holders_bar(LEDGER, 100, colour=False)
    assert bar == f"[{'#' * 10}{'W' * 20}{'K' * 4}{'P' * 5}{'=' * 3}{'.' * 48}|{'.' * 10}]"
    assert legend == "| cap 90.0 of 100.0 GiB  # others 10.0  W models 20.0  K KV 4.0  P prefix 5.0  = promised 3.0"


def test_without_a_terminal_it_is_told_once(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    """Plain lines, or JSON; nothing of a screen."""
    server.answer(answers(5, None, REQUEST))
    assert main(["top", "--url", server.url]) == ExitCode.DONE
    told = capsys.readouterr().out
    assert "req_0123456789abcdef" in told
    assert "\x1b" not in told
    assert main(["top", "--json", "--url", server.url]) == ExitCode.DONE
    shown = json.loads(capsys.readouterr().out)
    assert shown["requests"] == [REQUEST]
    assert (shown["ttft_p50_seconds"], shown["memory"]) == (None, LEDGER)
