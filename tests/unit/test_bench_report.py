"""scripts/bench: how answers are read, samples joined, and promises judged and shown. No server, no model."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.load.bench.answer import Answer, read_answer
from tests.load.bench.book import Book, Key, percentile
from tests.load.bench.client import Connection, Exchange
from tests.load.bench.interference import gaps_around
from tests.load.bench.measure import Measured
from tests.load.bench.processes import BenchError
from tests.load.bench.profiles import FULL, fitting
from tests.load.bench.promises import verdicts
from tests.load.bench.report import show, table, to_json, to_text
from tests.load.bench.summary import BARE, RAW
from tests.load.bench.workload import Ask, Prompts

_STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _event(payload: dict[str, Any] | str, end: bytes = b"\n\n") -> bytes:
    return b"data: " + (payload if isinstance(payload, str) else json.dumps(payload)).encode() + end


def _delta(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}}]}


_USAGE = {
    "choices": [],
    "usage": {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}},
}
_PIECES = [
    _STREAM_HEAD,
    _chunk(_event(_delta(""))),
    _chunk(_event(_delta("Hel"))),
    _chunk(_event(_delta("lo")) + _event(_USAGE)),
    _chunk(_event("[DONE]")) + b"0\r\n\r\n",
]


def _exchange(*reads: tuple[float, bytes], lost: bool = False) -> Exchange:
    return Exchange(mark=1, sent_at=1.0, reads=list(reads), lost=lost)


def _book(samples: Mapping[str, Sequence[float]]) -> Book:
    """Samples by "subject metric", one a round."""
    book = Book()
    for name, values in samples.items():
        subject, _, metric = name.partition(" ")
        for book.round, value in enumerate(values):
            book.add(subject, metric, value)
    return book


def _measured(book: Book, model: str = "nano") -> Measured:
    facts = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 4096, "weights_bytes": 1e6}
    return Measured(model, FULL, book, ["lmx"], facts)


# -- answers ----------------------------------------------------------------------------------------


def test_a_stream_is_read_with_the_time_of_each_text() -> None:
    """The role's empty chunk is no token, and the first token's time is that of the read that completed its event."""
    reads = [(1.0 + number, piece) for number, piece in enumerate(_PIECES, start=1)]
    answer = read_answer(_exchange(*reads))
    assert (answer.text, answer.problem) == ("Hello", None)
    assert answer.arrivals == (4.0, 5.0)
    assert (answer.ttft, answer.seconds, answer.gaps) == (3.0, 5.0, [1.0])
    assert (answer.usage.prompt, answer.usage.cached, answer.usage.completion) == (9, 4, 2)


@given(st.data())
def test_the_cuts_of_the_network_do_not_change_the_text(data: st.DataObject) -> None:
    """However the bytes are cut into reads, the same text arrives, never before its bytes."""
    raw = b"".join(_PIECES)
    cuts = sorted({*data.draw(st.lists(st.integers(1, len(raw) - 1), max_size=20)), 0, len(raw)})
    reads = [(1.0 + end, raw[start:end]) for start, end in pairwise(cuts)]
    answer = read_answer(_exchange(*reads))
    assert (answer.text, answer.problem, len(answer.arrivals)) == ("Hello", None, 2)
    assert list(answer.arrivals) == sorted(answer.arrivals)
    assert answer.arrivals[0] >= 1.0 + len(b"".join(_PIECES[:2]))


def test_events_read_together_arrived_once() -> None:
    """Texts of one read make no gap of zero seconds."""
    together = _STREAM_HEAD + _chunk(_event(_delta("a")) + _event(_delta("b")))
    last = _chunk(_event(_delta("c"))) + _chunk(_event("[DONE]")) + b"0\r\n\r\n"
    assert read_answer(_exchange((2.0, together), (2.5, last))).gaps == [0.5]


def test_events_may_end_with_carriage_returns() -> None:
    """Other servers separate events by CR LF; their answers count the same."""
    body = _event(_delta("a"), b"\r\n\r\n") + _event("[DONE]", b"\r\n\r\n")
    assert read_answer(_exchange((2.0, _STREAM_HEAD + _chunk(body) + b"0\r\n\r\n"))).text == "a"


@pytest.mark.parametrize(
    ("raw", "lost", "problem"),
    [
        (b"", True, "no answer"),
        (b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 4\r\n\r\nbusy", False, "status 429: busy"),
        (_STREAM_HEAD + _chunk(_event(_delta("a"))), True, "the connection was lost"),
        (_STREAM_HEAD + _chunk(_event(_delta("a"))) + b"0\r\n\r\n", False, "the stream ended without [DONE]"),
        (_STREAM_HEAD + _chunk(_event({"error": {"message": "gone"}})), False, "error event: {'message': 'gone'}"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", False, "not a chat completion"),
    ],
)
def test_what_is_no_answer_says_why(raw: bytes, lost: bool, problem: str) -> None:
    """Every way an answer can fail is a problem, never an exception and never silence."""
    assert read_answer(_exchange((2.0, raw), lost=lost)).problem == problem


def test_a_whole_answer_is_read() -> None:
    """Without a stream the text comes at the end."""
    choice = {"message": {"content": "Hi"}}
    body = json.dumps({"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}).encode()
    answer = read_answer(_exchange((2.5, b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)))
    assert (answer.text, answer.problem, answer.usage.completion, answer.ttft) == ("Hi", None, 1, 1.5)


class _Wire(asyncio.Transport):
    """A transport that goes nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.closing = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.sent += bytes(data)

    def is_closing(self) -> bool:
        return self.closing


@pytest.mark.parametrize(
    "raw", [b"".join(_PIECES), b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"], ids=["chunks", "length"]
)
@pytest.mark.parametrize("size", [1, 7, 10_000])
async def test_an_answer_ends_with_its_last_byte(raw: bytes, size: int) -> None:
    """The connection knows the end of a body of either kind, in reads of any size, and is then free again."""
    connection = Connection()
    wire = _Wire()
    connection.connection_made(wire)
    for _ in range(2):
        exchange, done = connection.send(b"GET")
        head_end = raw.index(b"\r\n\r\n") + 4
        # A server writes its head at once.
        connection.data_received(raw[:head_end])
        for at in range(head_end, len(raw), size):
            assert not done.done()
            connection.data_received(raw[at : at + size])
        assert await done is exchange
        assert not exchange.lost
    assert wire.sent == b"GETGET"


async def test_a_broken_connection_ends_its_answer() -> None:
    """Whether it breaks before or while an answer comes, the wait is over and the answer is lost."""
    connection = Connection()
    wire = _Wire()
    connection.connection_made(wire)
    _, done = connection.send(b"GET")
    connection.connection_lost(None)
    assert (await done).lost
    wire.closing = True
    _, done = connection.send(b"GET")
    assert (await done).lost


# -- samples ----------------------------------------------------------------------------------------


def test_ratios_are_taken_within_a_round() -> None:
    """A machine that is twice as slow in one round changes no ratio of that round."""
    book = _book({"raw x": [100, 50, 200], "lmx x": [90, 45, 100]})
    assert book.ratio(Key("lmx", "x"), Key("raw", "x")) == 0.9
    assert book.difference(Key("raw", "x"), Key("lmx", "x")) == 10
    assert (book.median("raw", "x"), book.total("raw", "x")) == (100, 350)


def test_a_missing_sample_leaves_its_round_out() -> None:
    """A round in which one side failed says nothing; without any common round there is no ratio."""
    book = _book({"raw x": [100, 100], "lmx x": [80]})
    assert book.ratio(Key("lmx", "x"), Key("raw", "x")) == 0.8
    assert book.ratio(Key("lmx", "y"), Key("raw", "x")) is None
    assert book.median("nobody", "x") is None


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 100))
def test_a_percentile_lies_among_the_values(values: list[float], percent: float) -> None:
    """It never leaves the range of the values, and its ends are theirs."""
    assert min(values) <= percentile(values, percent) <= max(values)
    assert (percentile(values, 0), percentile(values, 100)) == (min(values), max(values))


def test_the_median_is_the_middle() -> None:
    """Between two ranks the value lies in proportion."""
    assert percentile([4, 1, 2, 3], 50) == 2.5


def _stream_of(*arrivals: float) -> Answer:
    return Answer(sent_at=0, ended_at=arrivals[-1], arrivals=arrivals)


def test_the_worst_gap_is_the_one_the_long_prompt_made() -> None:
    """Gaps before it came are the stream's own pace; later ones, and those after its first token, are not judged."""
    streams = [_stream_of(1.0, 1.1, 1.2, 1.6, 1.7, 9.0), _stream_of(1.0, 1.1, 1.25, 1.5, 1.65, 1.7)]
    settled, worst = gaps_around(streams, since=1.25, until=1.65)
    assert settled == pytest.approx([0.1, 0.1, 0.1, 0.15])
    assert worst == pytest.approx(0.4)


def test_a_stream_that_ended_too_soon_is_no_evidence() -> None:
    """A stream with nothing left to say would hide the gap."""
    with pytest.raises(BenchError, match="ended before"):
        gaps_around([_stream_of(1.0, 1.1, 1.2)], since=1.1, until=1.5)


# -- workload ---------------------------------------------------------------------------------------


def test_prompts_differ_within_a_run_and_are_the_same_for_a_seed() -> None:
    """No prompt finds itself in the prefix cache, and a run can be repeated."""
    first, again = Prompts(7), Prompts(7)
    made = [json.dumps(first.question(24)) for _ in range(500)]
    assert len(set(made)) == 500
    assert made == [json.dumps(again.question(24)) for _ in range(500)]


def test_a_request_says_its_length() -> None:
    """The body is as long as the header has it, and asks for what the scenario wants."""
    head, _, body = Ask(Prompts(1).question(8), 5).to_http("h:1", "m").partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head.split(b"\r\n")
    wanted = json.loads(body)
    assert (wanted["model"], wanted["max_tokens"], wanted["temperature"], wanted["ignore_eos"]) == ("m", 5, 0, True)
    assert wanted["stream_options"] == {"include_usage": True}


def test_sizes_follow_the_speed() -> None:
    """A faster machine is never asked for less."""
    sizes = [fitting(speed).long_tokens for speed in (5, 50, 200, 1000, 100_000)]
    assert sizes == sorted(sizes)
    assert sizes[-1] == FULL.long_tokens
    assert FULL.quick().long_tokens == FULL.long_tokens


# -- the report -------------------------------------------------------------------------------------


def test_promises_are_judged_by_what_was_measured() -> None:
    """Kept, missed and unknown are three different things."""
    book = _book({"raw tok_s@1": [100.0], "lmx tok_s@1": [85.0], "lmx errors@1": [0]})
    by_name = {verdict.what: verdict for verdict in verdicts(_measured(book))}
    assert by_name["nano: tokens/s ÷ raw, worst of all batches"].kept is True
    assert by_name["nano: errors"].kept is True
    assert by_name["nano: wrong texts"].kept is None
    assert by_name["exec to first 200 on /v1/models"].kept is None
    others = {verdict.what: verdict for verdict in verdicts(_measured(book, "micro"))}
    assert others["micro: tokens/s ÷ raw, worst of all batches"].kept is False
    assert "exec to first 200 on /v1/models" not in others


def test_a_bound_is_made_from_the_same_run() -> None:
    """The worst gap is held against this run's own chunk and pace."""
    book = _book({"raw chunk": [0.1], "lmx stream_itl": [0.005], "lmx worst_gap": [0.109]})
    [verdict] = [verdict for verdict in verdicts(_measured(book)) if verdict.what.startswith("worst gap")]
    assert verdict.bound == pytest.approx(0.11)
    assert verdict.kept is True


def test_the_table_shows_ratios_failures_and_conditions() -> None:
    """What a reader needs to trust a number stands beside it."""
    book = _book({"raw tok_s@1": [100.0], "bare tok_s@1": [200.0], "lmx tok_s@1": [85.0], "lmx wrong@1": [2]})
    book.failures.append("lmx: cold start, round 1: no answer")
    text = to_text([_measured(book)], {"CPU": "a small one"})
    lines = {line.strip().partition("  ")[0]: line.split() for line in text.splitlines()}
    assert lines["lmx ÷ raw mlx-lm"][4] == "0.85"
    assert lines["raw mlx-lm ÷ bare loop"][5] == "0.50"
    assert lines["lmx wrong texts"][3] == "2"
    assert lines["nano: wrong texts"][-1] == "MISS"
    assert "nano: lmx: cold start, round 1: no answer" in text
    assert "CPU: a small one" in text


def test_json_holds_every_sample_and_the_summary() -> None:
    """Another program can compute its own ratios; subjects and batches are named, not numbered."""
    book = _book({"raw tok_s@1": [100.0, 110.0], "lmx tok_s@1": [85.0, 90.0], "lmx ttft_p50@1": [0.004, 0.006]})
    content = json.loads(json.dumps(to_json([_measured(book)], {})))
    [model] = content["models"]
    assert model["samples"]["lmx"]["tok_s@1"] == [85.0, 90.0]
    wanted = {"what": "TTFT p50", "batch": 1, "subject": "lmx", "unit": "ms", "value": 5.0}
    assert wanted in model["summary"]
    assert not [row for row in model["summary"] if row["subject"] == BARE]
    assert {row["what"] for row in model["summary"] if row["subject"] == RAW} == {"tokens/s", "÷ its own at 1"}
    assert content["promises"][0]["model"] == "nano"


def test_columns_are_aligned() -> None:
    """The first column stands to the left, numbers to the right; no rows make no table."""
    assert list(table(["", "1"], [["speed", "1,000"], ["x", "-"]])) == [
        "             1",
        "  speed  1,000",
        "  x          -",
    ]
    assert list(table(["a", "b"], [])) == ["  a  b"]


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (None, "ms", "-"),
        (0.00487, "ms", "4.87"),
        (0.1234, "ms", "123.4"),
        (12.5, "ms", "12,500"),
        (2.0, "count", "2"),
        (68_400_000, "MB", "68"),
        (0.07, "percent", "7"),
    ],
)
def test_numbers_are_shown_with_the_digits_that_mean_something(value: float | None, unit: Any, shown: str) -> None:
    """About three digits, in the unit of the label."""
    assert show(value, unit) == shown
