"""Metrics are documented, and what is built on them uses only metrics that exist."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import yaml

from opta_lmx.monitoring.metrics import Facts, ServerCollector
from opta_lmx.monitoring.timing import RequestBook
from opta_lmx.types import ModelState
from tests.unit.house.source import ROOT

_MONITORING = ROOT / "docs" / "monitoring"

# Labels that Prometheus adds to whatever it scrapes, and the one of a histogram's buckets.
_ADDED_LABELS = {"instance", "job", "le"}

_WORDS_BEFORE_LABELS = re.compile(r"\b(?:by|on|ignoring|without)\s*\(([^)]*)\)")


@cache
def _exposed() -> dict[str, tuple[str, set[str]]]:
    """Name -> type and labels, of every metric the server has."""
    books = RequestBook()
    books.loaded("a", 1.0)
    book = books.of("a")
    for histogram in (book.queue, book.time_to_first_token, book.inter_token, book.e2e):
        histogram.observe(1.0)
    facts = Facts("1", {"a": (0, 0)}, {"a": ModelState.READY}, {"a": 0}, {"a": 1}, 0, 1, 1, 1)
    return {
        family.name + ("_total" if family.type == "counter" else ""): (
            family.type,
            {label for sample in family.samples for label in sample.labels} - {"le"},
        )
        for family in ServerCollector(books, facts).collect()
    }


def _series() -> dict[str, set[str]]:
    """Name of a series a query may use -> its labels."""
    found: dict[str, set[str]] = {}
    for name, (kind, labels) in _exposed().items():
        names = [name + suffix for suffix in ("_bucket", "_sum", "_count")] if kind == "histogram" else [name]
        found |= dict.fromkeys(names, labels | _ADDED_LABELS)
    return found


def test_every_metric_is_documented_as_it_is() -> None:
    """docs/metrics.md has each name once, with its type and labels, and names none that does not exist."""
    page = (ROOT / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| `(lmx_\w+)` \| (\w+) \| ([^|]*)\|", page, re.MULTILINE)
    assert len(rows) == len(_exposed())
    assert {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows} == _exposed()


def test_a_start_does_not_pay_for_prometheus() -> None:
    """Its client is imported by the first scrape, not by the server."""
    program = "import sys, opta_lmx.api.routes; sys.exit('prometheus_client' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=20, check=False).returncode == 0


def test_names_follow_prometheus() -> None:
    """The unit stands in the name: seconds of a histogram, bytes of memory."""
    for name, (kind, _) in _exposed().items():
        assert re.fullmatch(r"lmx_[a-z0-9_]+", name)
        assert (kind == "histogram") == name.endswith("_seconds")


def _rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((_MONITORING / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def _dashboard() -> dict[str, Any]:
    board: dict[str, Any] = json.loads((_MONITORING / "grafana-dashboard.json").read_text())
    return board


def _queries() -> Iterator[str]:
    yield from (rule["expr"] for rule in _rules())
    board = _dashboard()
    yield from (target["expr"] for panel in board["panels"] for target in panel["targets"])
    yield from (variable["query"] for variable in board["templating"]["list"] if variable["type"] == "query")


@pytest.mark.parametrize("query", [*_queries()])
def test_every_query_is_of_metrics_that_exist(query: str) -> None:
    """Each name it uses is a series of ours (or ``up``), with labels that series has, and values they can take."""
    series = _series()
    names = set(re.findall(r"\b(?:lmx_\w+|up)\b", re.sub(r'"[^"]*"', '""', query)))
    assert names
    assert names - {"up"} <= series.keys()
    for name, matchers in re.findall(r"(\w+)\{([^}]*)\}", query):
        labels = set(re.findall(r"(\w+)\s*[=!]~?", matchers))
        assert labels <= series.get(name, _ADDED_LABELS), name
    known = set().union(*(series.get(name, _ADDED_LABELS) for name in names))
    for words in _WORDS_BEFORE_LABELS.findall(query):
        assert {word.strip() for word in words.split(",")} <= known


def test_every_alert_is_documented() -> None:
    """The guide names each alert and no other; each says what is wrong and what to do."""
    rules = _rules()
    guide = (ROOT / "docs" / "guides" / "monitoring.md").read_text()
    documented = re.findall(r"^\| `(Lmx\w+)` \|", guide, re.MULTILINE)
    assert documented == [rule["alert"] for rule in rules]
    for rule in rules:
        assert set(rule["annotations"]) == {"summary", "remedy"}
        assert rule["labels"]["severity"] in ("critical", "warning")


def test_every_alert_has_a_case_of_its_own() -> None:
    """It fires in one, and is told as written, over series that exist; ``promtool`` runs them in the load tests."""
    cases = yaml.safe_load((_MONITORING / "alerts-test.yaml").read_text())["tests"]
    fired = [alert["alertname"] for case in cases for alert in case["alert_rule_test"] if alert["exp_alerts"]]
    assert fired == [rule["alert"] for rule in _rules()]
    used = {series["series"].partition("{")[0] for case in cases for series in case["input_series"]}
    assert used <= _series().keys() | {"up"}


def test_the_dashboard_shows_every_metric() -> None:
    """What is worth exposing is worth a look."""
    shown = " ".join(target["expr"] for panel in _dashboard()["panels"] for target in panel["targets"])
    assert {name for name in _exposed() if name not in shown} == set()
