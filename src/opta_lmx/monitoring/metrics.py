"""The server's metrics as Prometheus reads them; every name, its help and its labels are declared here.

Nothing is kept here: a scrape reads the request book and what the owners of everything else say at that moment.
Importing this costs prometheus_client's 25 to 50 ms, so the admin route does it at the first scrape.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from opta_lmx.monitoring.timing import Histogram, ModelBook, Outcome, RequestBook
from opta_lmx.types import JsonObject, ModelState

# Every parser of Prometheus's text reads it; our names need nothing newer.
CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

# How a download that was begun can end, in the downloads' own words.
_DOWNLOAD_ENDS = ("completed", "failed", "cancelled")

# Of the causes for which the residency stops a worker, those that were nobody's request.
_EVICTIONS = ("evicted", "expired")

# Label values, in the order of their family's labels -> value.
_Samples: TypeAlias = Mapping[tuple[str, ...], float]


@dataclass(frozen=True, slots=True)
class Facts:
    """What the owners say at a scrape: ``depths`` are requests (running, waiting), all by model id; memory in bytes.

    ``memory`` is what the ledger counts for each model that has a process; ``downloads`` are under way.
    """

    version: str
    depths: Mapping[str, tuple[int, int]]
    states: Mapping[str, ModelState]
    restarts: Mapping[str, int]
    memory: Mapping[str, int]
    downloads: int
    used_bytes: int
    limit_bytes: int
    reserved_bytes: int


class ServerCollector(Collector):
    """Every metric of the server, from its request book and the facts of one moment."""

    def __init__(self, books: RequestBook, facts: Facts) -> None:
        # A model nobody has asked for yet counts from 0: otherwise its first event would be no increase.
        self._books = {id: ModelBook() for id in facts.states} | dict(books.by_model())
        self._downloads = books.downloads
        self._facts = facts

    def collect(self) -> Iterator[Metric]:
        """All families, those without a sample too."""
        yield from self._times()
        yield from self._counts()
        yield from self._present()

    def _times(self) -> Iterator[Metric]:
        yield self._histogram(
            "lmx_time_to_first_token_seconds",
            "Arrival of a request to its first token.",
            lambda book: book.time_to_first_token,
        )
        yield self._histogram(
            "lmx_inter_token_latency_seconds",
            "Time between consecutive tokens of one request, as its reader takes them.",
            lambda book: book.inter_token,
        )
        yield self._histogram(
            "lmx_request_queue_seconds",
            "Arrival of a request to its handing over to the worker, waiting for the model included.",
            lambda book: book.queue,
        )
        yield self._histogram(
            "lmx_e2e_request_latency_seconds",
            "Arrival of a request that reached a worker to the worker's last word on it.",
            lambda book: book.e2e,
        )
        yield self._histogram(
            "lmx_model_load_seconds",
            "Start of a load to the model being ready; loads that succeeded.",
            lambda book: book.load,
        )

    def _counts(self) -> Iterator[Metric]:
        yield self._tokens(
            "lmx_prompt_tokens", "Tokens of prompts that entered a batch, cached ones included.", "prompt_tokens"
        )
        yield self._tokens(
            "lmx_prompt_tokens_cached", "Tokens of prompts that the prefix cache served.", "cached_tokens"
        )
        yield self._tokens(
            "lmx_generation_tokens", "Tokens made, end-of-sequence tokens included.", "completion_tokens"
        )
        yield _counter(
            "lmx_requests",
            "Requests that have ended, by how; those for no known model have an empty model.",
            ("model", "outcome"),
            {(id, outcome.value): book.outcomes[outcome] for id, book in self._books.items() for outcome in Outcome},
        )
        yield _counter(
            "lmx_evictions",
            "Models unloaded to make room for another (evicted) or after their idle time (expired).",
            ("model", "reason"),
            {(id, cause): book.stops[cause] for id, book in self._books.items() if id for cause in _EVICTIONS},
        )
        yield _counter(
            "lmx_model_load_failures",
            "Loads that did not succeed.",
            ("model",),
            {(id,): book.load_failures for id, book in self._books.items() if id},
        )
        yield _counter(
            "lmx_downloads",
            "Downloads of models that have ended, by how.",
            ("outcome",),
            {(end,): self._downloads[end] for end in _DOWNLOAD_ENDS},
        )
        yield _counter(
            "lmx_worker_restarts",
            "Loads that replaced a worker which had died.",
            ("model",),
            {(id,): self._facts.restarts.get(id, 0) for id in self._facts.states},
        )

    def _present(self) -> Iterator[Metric]:
        facts = self._facts
        yield _gauge(
            "lmx_requests_running",
            "Requests with a slot of their model, those waiting for its load included.",
            ("model",),
            {(id,): running for id, (running, _) in facts.depths.items()},
        )
        yield _gauge(
            "lmx_requests_waiting",
            "Requests in line for a slot of their model.",
            ("model",),
            {(id,): waiting for id, (_, waiting) in facts.depths.items()},
        )
        yield _gauge(
            "lmx_model_state",
            "1 for the state a model is in, 0 for the others.",
            ("model", "state"),
            {(id, state.value): state is now for id, now in facts.states.items() for state in ModelState},
        )
        yield _gauge(
            "lmx_model_memory_bytes",
            "What the ledger counts for a model in memory: weights, worker, caches.",
            ("model",),
            {(id,): size for id, size in facts.memory.items()},
        )
        yield _gauge("lmx_downloads_running", "Downloads of models under way.", (), {(): facts.downloads})
        yield _gauge("lmx_memory_used_bytes", "Memory in use on the machine, by anybody.", (), {(): facts.used_bytes})
        yield _gauge("lmx_memory_limit_bytes", "The cap on used and reserved memory.", (), {(): facts.limit_bytes})
        yield _gauge("lmx_memory_reserved_bytes", "Memory promised and not in use yet.", (), {(): facts.reserved_bytes})
        yield _gauge("lmx_build_info", "Always 1; the label has the version.", ("version",), {(facts.version,): 1})

    def _histogram(self, name: str, help: str, of: Callable[[ModelBook], Histogram]) -> Metric:
        family = HistogramMetricFamily(name, help, labels=("model",))
        for id, book in self._books.items():
            histogram = of(book)
            if histogram.count:
                bounds = [*(str(float(bound)) for bound in histogram.bounds), "+Inf"]
                buckets = list(zip(bounds, map(float, accumulate(histogram.counts)), strict=True))
                family.add_metric((id,), buckets, histogram.sum)
        return family

    def _tokens(self, name: str, help: str, field: str) -> Metric:
        counts: _Samples = {(id,): float(getattr(book, field)) for id, book in self._books.items() if id}
        return _counter(name, help, ("model",), counts)


def _counter(name: str, help: str, labels: tuple[str, ...], samples: _Samples) -> Metric:
    """``name`` without the ``_total`` it is shown with."""
    family = CounterMetricFamily(name, help, labels=labels)
    for values, value in samples.items():
        family.add_metric(values, float(value))
    return family


def _gauge(name: str, help: str, labels: tuple[str, ...], samples: _Samples) -> Metric:
    family = GaugeMetricFamily(name, help, labels=labels)
    for values, value in samples.items():
        family.add_metric(values, float(value))
    return family


def as_text(collector: Collector) -> bytes:
    """Prometheus's text, to be sent as CONTENT_TYPE."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    return generate_latest(registry)


def as_json(collector: Collector) -> JsonObject:
    """Name -> type, help and samples, by the name a query uses.

    A sample has ``labels`` and ``value``; that of a histogram ``labels``, ``count``, ``sum`` and ``buckets``, which
    count what was at most each bound, as in the text.
    """
    shown: JsonObject = {}
    for family in collector.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        samples = _histogram_samples(family) if family.type == "histogram" else _plain_samples(family)
        shown[name] = {"type": family.type, "help": family.documentation, "samples": samples}
    return shown


def _plain_samples(family: Metric) -> list[JsonObject]:
    return [{"labels": sample.labels, "value": sample.value} for sample in family.samples]


def _histogram_samples(family: Metric) -> list[JsonObject]:
    found: dict[str, JsonObject] = {}
    for sample in family.samples:
        model = sample.labels["model"]
        entry = found.setdefault(model, {"labels": {"model": model}, "count": 0, "sum": 0.0, "buckets": {}})
        part = sample.name.rpartition("_")[2]
        if part == "bucket":
            entry["buckets"][sample.labels["le"]] = int(sample.value)
        else:
            entry[part] = int(sample.value) if part == "count" else sample.value
    return list(found.values())
