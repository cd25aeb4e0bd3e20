"""What an answer said and when, read from the bytes a connection kept; pure."""

import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

from tests.load.bench.client import Exchange


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens, as the server counts them; ``cached`` ones are part of the prompt's."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer; times are ``perf_counter`` seconds.

    ``arrivals`` has one time for each event with text, the time at which its last byte was read. ``problem`` says
    what was wrong: a status, an error event, a broken connection.
    """

    sent_at: float
    ended_at: float
    text: str = ""
    arrivals: tuple[float, ...] = ()
    usage: Usage = Usage()
    problem: str | None = None

    @property
    def seconds(self) -> float:
        """From the request's first byte to the answer's last."""
        return self.ended_at - self.sent_at

    @property
    def ttft(self) -> float:
        """Seconds to the first text; the whole answer's where it did not stream."""
        return (self.arrivals[0] if self.arrivals else self.ended_at) - self.sent_at

    @property
    def gaps(self) -> list[float]:
        """Seconds between arrivals of text; events that came in one read arrived once."""
        return [after - before for before, after in pairwise(sorted(set(self.arrivals)))]


def read_answer(exchange: Exchange) -> Answer:
    """The answer in an exchange, streamed or whole."""
    raw = b"".join(data for _, data in exchange.reads)
    head, _, body = raw.partition(b"\r\n\r\n")
    status = _status(head)
    failed = Answer(exchange.sent_at, exchange.ended_at)
    if not body:
        return _with_problem(failed, "no answer" if not head else f"status {status} without a body")
    is_chunked = b"transfer-encoding: chunked" in head.lower()
    pieces = list(_chunks(raw, len(head) + 4)) if is_chunked else [(len(head) + 4, len(raw))]
    if status != 200:
        content = b"".join(raw[start:end] for start, end in pieces)
        return _with_problem(failed, f"status {status}: {content[:200].decode(errors='replace')}")
    if b"text/event-stream" not in head.lower():
        return _read_whole(failed, b"".join(raw[start:end] for start, end in pieces), lost=exchange.lost)
    return _read_stream(failed, list(_events(exchange, raw, pieces)), lost=exchange.lost)


def read_json(exchange: Exchange) -> tuple[int, Any]:
    """Status and content of a JSON answer; (0, None) if there was none."""
    raw = b"".join(data for _, data in exchange.reads)
    head, _, body = raw.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" in head.lower():
        body = b"".join(raw[start:end] for start, end in _chunks(raw, len(head) + 4))
    try:
        return _status(head), json.loads(body)
    except ValueError:
        return _status(head), None


def _status(head: bytes) -> int:
    words = head.split(b" ", 2)
    return int(words[1]) if len(words) > 1 and words[1].isdigit() else 0


def _read_whole(empty: Answer, content: bytes, *, lost: bool) -> Answer:
    try:
        answer = json.loads(content)
        text = answer["choices"][0]["message"]["content"] or ""
        usage = answer["usage"]
    except (ValueError, LookupError, TypeError):
        return _with_problem(empty, "the connection was lost" if lost else "not a chat completion")
    return replace(empty, text=text, usage=_usage(usage, 0))


def _read_stream(empty: Answer, events: Sequence[tuple[float, bytes]], *, lost: bool) -> Answer:
    texts: list[str] = []
    arrivals: list[float] = []
    usage: dict[str, Any] = {}
    problem = "the stream ended without [DONE]" if not events or events[-1][1] != b"[DONE]" else None
    if lost and problem:
        problem = "the connection was lost"
    for when, payload in events:
        if payload == b"[DONE]":
            continue
        chunk = json.loads(payload)
        if "error" in chunk:
            problem = f"error event: {chunk['error']}"
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            if text := delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning"):
                texts.append(text)
                arrivals.append(when)
        usage = chunk.get("usage") or usage
    return Answer(
        empty.sent_at,
        empty.ended_at,
        "".join(texts),
        tuple(arrivals),
        # A server that does not count is believed to send one token an event.
        _usage(usage, len(arrivals)),
        problem,
    )


def _usage(usage: Mapping[str, Any], made: int) -> Usage:
    """The counts of an answer; ``made`` where its completion tokens are not told."""
    details = usage.get("prompt_tokens_details") or {}
    return Usage(usage.get("prompt_tokens", 0), details.get("cached_tokens") or 0, usage.get("completion_tokens", made))


def _with_problem(answer: Answer, problem: str) -> Answer:
    return replace(answer, problem=problem)


def _chunks(raw: bytes, at: int) -> Iterator[tuple[int, int]]:
    """Where the data of each whole chunk begins and ends."""
    while (line_end := raw.find(b"\r\n", at)) >= 0:
        size = int(raw[at:line_end].partition(b";")[0], 16)
        start, end = line_end + 2, line_end + 2 + size
        if size == 0 or end > len(raw):
            return
        yield start, end
        at = end + 2


def _events(exchange: Exchange, raw: bytes, pieces: Sequence[tuple[int, int]]) -> Iterator[tuple[float, bytes]]:
    """Each event's data and the time at which the piece that completed it had been read."""
    read_ends = list(accumulate(len(data) for _, data in exchange.reads))
    pending = b""
    for start, end in pieces:
        when = exchange.reads[bisect_left(read_ends, end)][0]
        pending = (pending + raw[start:end]).replace(b"\r\n", b"\n")
        *complete, pending = pending.split(b"\n\n")
        for event in complete:
            for line in event.split(b"\n"):
                if line.startswith(b"data:"):
                    yield when, line[5:].strip()
