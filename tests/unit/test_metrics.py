"""ServerCollector: the books and the owners' facts as Prometheus reads them."""

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from opta_lmx.monitoring.metrics import Facts, ServerCollector, as_json, as_text
from opta_lmx.monitoring.timing import Outcome, RequestBook, Timeline
from opta_lmx.types import Delta, ModelState
from tests.fake_workers import Clock

FACTS = Facts(
    version="1.2.3",
    depths={"a": (3, 2)},
    states={"a": ModelState.READY, 'acme/"odd"': ModelState.ABSENT},
    restarts={"a": 4},
    memory={"a": 6},
    downloads=1,
    used_bytes=10,
    limit_bytes=90,
    reserved_bytes=5,
)


@pytest.fixture
def books() -> RequestBook:
    """One answered request of model a, which was loaded and evicted, and one for a name that is no model's."""
    books, clock = RequestBook(), Clock()
    books.loaded("a", 2.0)
    timeline = Timeline(books, "req", 1, clock)
    timeline.resolved("a")
    clock.seconds += 0.25
    timeline.leased()
    timeline.first_token(1)
    timeline.looked([Delta(0, "x", 1)])
    clock.seconds += 0.5
    timeline.looked([Delta(0, "y", 5)])
    timeline.prompt_tokens, timeline.cached_tokens, timeline.completion_tokens = 7, 4, 6
    timeline.end(Outcome.LENGTH)
    Timeline(books, "req", 1, clock).end(Outcome.REFUSED)
    books.stopped("a", "evicted")
    books.stopped("a", "unloaded")
    books.load_failed("a")
    books.downloads["completed"] += 3
    return books


def samples(books: RequestBook) -> dict[tuple[str, ...], float]:
    """Every sample of the text that is not 0, by its name and the values of its labels."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(as_text(ServerCollector(books, FACTS)).decode())
        for sample in family.samples
        if sample.value and not sample.name.endswith("_bucket")
    }


def test_a_parser_of_the_format_reads_all_of_it(books: RequestBook) -> None:
    """Every count, time and fact is there under its name, with its labels, and nothing else is."""
    assert samples(books) == {
        ("lmx_time_to_first_token_seconds_count", "a"): 1,
        ("lmx_time_to_first_token_seconds_sum", "a"): 0.25,
        ("lmx_inter_token_latency_seconds_count", "a"): 5,
        ("lmx_inter_token_latency_seconds_sum", "a"): 0.5,
        ("lmx_request_queue_seconds_count", "a"): 1,
        ("lmx_request_queue_seconds_sum", "a"): 0.25,
        ("lmx_e2e_request_latency_seconds_count", "a"): 1,
        ("lmx_e2e_request_latency_seconds_sum", "a"): 0.75,
        ("lmx_model_load_seconds_count", "a"): 1,
        ("lmx_model_load_seconds_sum", "a"): 2,
        ("lmx_prompt_tokens_total", "a"): 7,
        ("lmx_prompt_tokens_cached_total", "a"): 4,
        ("lmx_generation_tokens_total", "a"): 6,
        ("lmx_requests_total", "a", "length"): 1,
        ("lmx_requests_total", "", "refused"): 1,
        ("lmx_evictions_total", "a", "evicted"): 1,
        ("lmx_worker_restarts_total", "a"): 4,
        ("lmx_model_load_failures_total", "a"): 1,
        ("lmx_downloads_total", "completed"): 3,
        ("lmx_model_memory_bytes", "a"): 6,
        ("lmx_downloads_running",): 1,
        ("lmx_requests_running", "a"): 3,
        ("lmx_requests_waiting", "a"): 2,
        ("lmx_model_state", "a", "ready"): 1,
        ("lmx_model_state", 'acme/"odd"', "absent"): 1,
        ("lmx_memory_used_bytes",): 10,
        ("lmx_memory_limit_bytes",): 90,
        ("lmx_memory_reserved_bytes",): 5,
        ("lmx_build_info", "1.2.3"): 1,
    }


def test_rates_start_at_zero(books: RequestBook) -> None:
    """Every outcome and every state of a known model is shown, 0 included, so that a first event is an increase."""
    shown = as_json(ServerCollector(books, FACTS))
    outcomes = [s for s in shown["lmx_requests_total"]["samples"] if s["labels"]["model"] == "a"]
    assert {s["labels"]["outcome"]: s["value"] for s in outcomes} == {o.value: float(o == "length") for o in Outcome}
    states = [s for s in shown["lmx_model_state"]["samples"] if s["labels"]["model"] == "a"]
    assert {s["labels"]["state"]: s["value"] for s in states} == {s.value: float(s == "ready") for s in ModelState}


def test_json_says_what_the_text_says(books: RequestBook) -> None:
    """A histogram is one sample with cumulative buckets; its last is its count."""
    shown = as_json(ServerCollector(books, FACTS))
    gaps = shown["lmx_inter_token_latency_seconds"]
    assert gaps["type"] == "histogram"
    [sample] = gaps["samples"]
    assert sample["labels"] == {"model": "a"}
    assert (sample["count"], sample["sum"]) == (5, 0.5)
    assert (sample["buckets"]["0.05"], sample["buckets"]["0.1"], sample["buckets"]["+Inf"]) == (0, 5, 5)
    assert shown["lmx_memory_used_bytes"]["samples"] == [{"labels": {}, "value": 10.0}]


def test_nothing_is_registered_globally(books: RequestBook) -> None:
    """A second server in one process, or a library with metrics of its own, meets none of ours."""
    as_text(ServerCollector(books, FACTS))
    assert [family.name for family in REGISTRY.collect() if family.name.startswith("lmx_")] == []
