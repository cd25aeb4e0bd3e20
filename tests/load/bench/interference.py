"""Long prompts among others: how long running streams stand still, and how long a short request waits behind them."""

import asyncio
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import median
from typing import Final

from tests.load.bench.answer import Answer, read_answer
from tests.load.bench.client import Exchange, connected, no_garbage_collection
from tests.load.bench.processes import BenchError
from tests.load.bench.session import Bench
from tests.load.bench.targets import Target
from tests.load.bench.workload import Ask, Conversation

_STREAMS: Final = 4

# Reads after which a stream is taken to have found its pace; the median gap is taken over them.
_SETTLED_READS: Final = 30

# The server's own default for the most prompt tokens in one step (config.yaml).
CHUNK_TOKENS: Final = 512

# Seconds after the long prompts at which the short one comes: the first of them is under way by then.
_BEHIND_SECONDS: Final = 0.02

# Enough to see that the answer goes on.
_SHORT_ANSWER: Final = 4


async def long_prompt(bench: Bench) -> None:
    """A long prompt arrives while four streams run."""
    prompt = bench.prompts.question(bench.profile.long_tokens)
    streams = [bench.question() for _ in range(_STREAMS)]
    if bench.engine is not None:
        async with bench.attempt("raw", "long prompt"):
            [seconds] = await bench.engine.calls([prompt])
            bench.book.add("raw", "long_ttft", seconds)
            bench.book.add("raw", "chunk", max(await bench.engine.chunks(prompt, CHUNK_TOKENS)))
    for target in bench.turns():
        async with bench.attempt(target.name, "long prompt against streams"):
            await _against_streams(bench, target, prompt, streams)


async def short_behind_long(bench: Bench) -> None:
    """A short request arrives just behind two long ones, at an idle server."""
    long = [bench.prompts.question(bench.profile.long_tokens) for _ in range(2)]
    short = bench.question()
    for target in bench.turns():
        async with bench.attempt(target.name, "short behind long"), connected(target.host, target.port, 3) as them:
            requests = [target.to_http(Ask(prompt, _SHORT_ANSWER)) for prompt in (*long, short)]
            with no_garbage_collection():
                started = [connection.send(request) for connection, request in zip(them[:2], requests, strict=False)]
                await asyncio.sleep(_BEHIND_SECONDS)
                started.append(them[2].send(requests[2]))
                answers = [_whole(await done) for _, done in started]
            bench.book.add(target.name, "behind_ttft", answers[2].ttft)
            bench.book.add(target.name, "behind_long_ttft", max(answer.ttft for answer in answers[:2]))


async def _against_streams(bench: Bench, target: Target, prompt: Conversation, streams: list[Conversation]) -> None:
    requests = [target.to_http(Ask(stream, bench.profile.background_tokens)) for stream in streams]
    last = target.to_http(Ask(prompt, _SHORT_ANSWER))
    async with connected(target.host, target.port, _STREAMS + 1) as [*connections, own]:
        with no_garbage_collection():
            running = [
                connection.send(request, mark=_SETTLED_READS)[0]
                for connection, request in zip(connections, requests, strict=True)
            ]
            for exchange in running:
                await exchange.under_way.wait()
            sent, done = own.send(last)
            answer = _whole(await done)
    settled, worst = gaps_around([read_answer(exchange) for exchange in running], sent.sent_at, answer.arrivals[0])
    bench.book.add(target.name, "stream_itl", median(settled))
    bench.book.add(target.name, "worst_gap", worst)
    bench.book.add(target.name, "long_ttft", answer.ttft)


def gaps_around(streams: Sequence[Answer], since: float, until: float) -> tuple[list[float], float]:
    """Seconds between arrivals before ``since``, and the longest such gap that touches ``since`` to ``until``.

    Raises BenchError if a stream had ended before ``until``: its gap would be of its own making.
    """
    settled: list[float] = []
    worst = 0.0
    for stream in streams:
        if not stream.arrivals or stream.arrivals[-1] < until:
            raise BenchError("a stream ended before the long prompt's first token")
        for before, after in _distinct_pairs(stream):
            if after <= since:
                settled.append(after - before)
            elif before < until:
                worst = max(worst, after - before)
    if not settled:
        raise BenchError("no gap between tokens was seen before the long prompt came")
    return settled, worst


def _distinct_pairs(stream: Answer) -> Iterator[tuple[float, float]]:
    return pairwise(sorted(set(stream.arrivals)))


def _whole(exchange: Exchange) -> Answer:
    answer = read_answer(exchange)
    if answer.problem is not None or not answer.arrivals:
        raise BenchError(answer.problem or "an answer without text")
    return answer
