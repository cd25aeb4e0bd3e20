"""What the samples mean: one row a number, computed the same way for the table and for JSON; pure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from tests.load.bench.book import Book, Key
from tests.load.bench.profiles import Profile

RAW: Final = "raw"
BARE: Final = "bare"

Unit: TypeAlias = Literal["ms", "s", "MB", "ratio", "count", "tok/s", "percent"]
# From seconds, bytes and fractions.
_SCALE: Final[Mapping[Unit, float]] = {"ms": 1000, "MB": 1e-6, "percent": 100}

Compute: TypeAlias = Callable[[Book, str], float | None]


@dataclass(frozen=True, slots=True)
class Row:
    """A number by its name; ``compute`` gives it in seconds, bytes or plain, None where it was not measured."""

    label: str
    unit: Unit
    compute: Compute


def in_unit(value: float, unit: Unit) -> float:
    """A value as its unit counts."""
    return value * _SCALE.get(unit, 1)


def decode_rows(batch: int) -> Sequence[Row]:
    """What is known at one number of streams; of raw mlx-lm and the bare loop the speed alone."""
    at = f"@{batch}"
    rate = f"tok_s{at}"
    return (
        Row("tokens/s", "tok/s", _median(rate)),
        Row("÷ raw mlx-lm", "ratio", _over(rate, RAW)),
        Row("÷ bare loop", "ratio", _over(rate, BARE)),
        Row("÷ its own at 1", "ratio", _ratio(rate, "tok_s@1")),
        Row("TTFT p50", "ms", _median(f"ttft_p50{at}")),
        Row("TTFT p95", "ms", _median(f"ttft_p95{at}")),
        Row("ITL p50", "ms", _median(f"itl_p50{at}")),
        Row("ITL p95", "ms", _median(f"itl_p95{at}")),
        Row("prompt tokens cached", "percent", _median(f"cached{at}")),
        Row("tokens an event", "ratio", _median(f"tokens_per_event{at}")),
        Row("CPU client, of a core", "percent", _median(f"cpu_client{at}")),
        Row("CPU server, of a core", "percent", _median(f"cpu_server{at}")),
        Row("CPU workers, of a core", "percent", _median(f"cpu_workers{at}")),
        Row("errors", "count", _total(f"errors{at}")),
        Row("wrong texts", "count", _total(f"wrong{at}")),
    )


def single_rows(profile: Profile) -> Sequence[Row]:
    """Everything that is one number a server."""
    return (
        Row("one token: p50", "ms", _median("call_p50")),
        Row("one token: p99", "ms", _median("call_p99")),
        Row("one token: added at p50", "ms", _minus_raw("call_p50")),
        Row("one token: added at p99", "ms", _minus_raw("call_p99")),
        Row(f"prefix of {profile.prefix_tokens:,} tokens: TTFT cold", "ms", _median("prefix_cold")),
        Row("prefix: TTFT of the chat's second turn", "ms", _median("prefix_second")),
        Row("prefix: cold ÷ second turn", "ratio", _ratio("prefix_cold", "prefix_second")),
        Row("prefix: TTFT of another question", "ms", _median("prefix_later")),
        Row("prefix: cold ÷ another question", "ratio", _ratio("prefix_cold", "prefix_later")),
        Row("prefix: wrong texts", "count", _total("wrong_prefix")),
        Row(f"chat of {profile.turns} turns: sum of TTFT", "ms", _median("chat_sum")),
        Row("chat: TTFT of the last turn ÷ first", "ratio", _ratio("chat_last", "chat_first")),
        Row("chat: wrong texts", "count", _total("wrong_chat")),
        Row(f"prompt of {profile.long_tokens:,} tokens among 4 streams: TTFT", "ms", _median("long_ttft")),
        Row("long prompt: TTFT ÷ raw alone", "ratio", _over("long_ttft", RAW)),
        Row("long prompt: its slowest chunk of 512", "ms", _median("chunk")),
        Row("long prompt: streams' median ITL before", "ms", _median("stream_itl")),
        Row("long prompt: streams' worst gap", "ms", _median("worst_gap")),
        Row("long prompt: worst gap ÷ raw prefill", "ratio", _worst_gap),
        Row("short behind two long: TTFT", "ms", _median("behind_ttft")),
        Row("short behind two long: TTFT of the later long", "ms", _median("behind_long_ttft")),
        Row(f"{profile.sampled_batch} streams: temperature ÷ greedy", "ratio", _sampled("temperature")),
        Row(f"{profile.sampled_batch} streams: temperature, top-p, top-k ÷ greedy", "ratio", _sampled("top_p_top_k")),
        Row("disconnect to idle: stream", "ms", _median("leave_stream")),
        Row("disconnect to idle: whole answer", "ms", _median("leave_whole")),
        Row("exec to /v1/models", "s", _median("start_listed")),
        Row("exec to first token", "s", _median("start_token")),
        Row("RSS of server: started", "MB", _median("rss_server@start")),
        Row("RSS of server: model loaded", "MB", _median("rss_server@loaded")),
        Row("RSS of server: at the end", "MB", _median("rss_server@end")),
        Row("RSS of worker: model loaded", "MB", _median("rss_worker@loaded")),
        Row("RSS of worker: at the end", "MB", _median("rss_worker@end")),
    )


def _median(metric: str) -> Compute:
    return lambda book, subject: book.median(subject, metric)


def _total(metric: str) -> Compute:
    return lambda book, subject: book.total(subject, metric)


def _ratio(over: str, under: str) -> Compute:
    return lambda book, subject: book.ratio(Key(subject, over), Key(subject, under))


def _over(metric: str, other: str) -> Compute:
    """By another subject's same metric; only down the order server, raw, bare."""
    above = {RAW: (RAW, BARE), BARE: (BARE,)}[other]
    return lambda book, subject: None if subject in above else book.ratio(Key(subject, metric), Key(other, metric))


def _worst_gap(book: Book, subject: str) -> float | None:
    return book.ratio(Key(subject, "worst_gap"), Key(RAW, "long_ttft"))


def _minus_raw(metric: str) -> Compute:
    return lambda book, subject: None if subject == RAW else book.difference(Key(subject, metric), Key(RAW, metric))


def _sampled(word: str) -> Compute:
    return _ratio(f"tok_s@{word}", "tok_s@greedy")
