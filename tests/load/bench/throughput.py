"""Many streams at once: tokens a second, times to the first token and between tokens, whose CPU it took."""

from collections.abc import Mapping, Sequence
from itertools import chain
from time import perf_counter, process_time
from typing import Any, Final

from tests.load.bench.answer import Answer, read_answer
from tests.load.bench.book import percentile
from tests.load.bench.client import connected, exchange_all
from tests.load.bench.processes import BenchError
from tests.load.bench.session import Bench
from tests.load.bench.targets import Target
from tests.load.bench.workload import GREEDY, Ask

# Each by the word its metric carries.
SAMPLINGS: Final[Mapping[str, Mapping[str, Any]]] = {
    "greedy": GREEDY,
    "temperature": {"temperature": 0.8},
    "top_p_top_k": {"temperature": 0.8, "top_p": 0.9, "top_k": 40},
}


async def concurrency(bench: Bench) -> None:
    """Every batch size: raw mlx-lm, the bare loop and the servers, all with the same prompts."""
    tokens = bench.profile.answer_tokens
    for batch in bench.profile.batches:
        prompts = [bench.question() for _ in range(batch)]
        if bench.engine is not None:
            async with bench.attempt("raw", f"batch {batch}"):
                bench.book.add("raw", f"tok_s@{batch}", await bench.engine.batch(prompts, tokens))
                bench.book.add("bare", f"tok_s@{batch}", await bench.engine.bare(prompts, tokens))
        for target in bench.turns():
            async with bench.attempt(target.name, f"{batch} streams"):
                asks = [Ask(prompt, tokens) for prompt in prompts]
                answers = await _stream(bench, target, asks, f"@{batch}")
                for ask, answer in list(zip(asks, answers, strict=True))[: bench.profile.checked]:
                    bench.remember(target, f"wrong@{batch}", ask, answer.text)


async def sampling(bench: Bench) -> None:
    """The cost of sampling: one batch greedy, by temperature, and by temperature, top-p and top-k."""
    profile = bench.profile
    for target in bench.turns():
        for word, parameters in SAMPLINGS.items():
            async with bench.attempt(target.name, f"sampling {word}"):
                asks = [
                    Ask(bench.question(), profile.answer_tokens, sampling=parameters)
                    for _ in range(profile.sampled_batch)
                ]
                await _stream(bench, target, asks, f"@{word}")


async def warm_up(bench: Bench) -> None:
    """Everybody once at the largest batch, so that no first time is measured."""
    prompts = [bench.question() for _ in range(max(bench.profile.batches))]
    if bench.engine is not None:
        async with bench.attempt("raw", "warm-up"):
            await bench.engine.batch(prompts, 4)
            await bench.engine.bare(prompts, 4)
    for target in bench.targets:
        async with bench.attempt(target.name, "warm-up"):
            await _exchange(bench, target, [Ask(prompt, 4) for prompt in prompts], "@warm_up")


async def _stream(bench: Bench, target: Target, asks: Sequence[Ask], at: str) -> list[Answer]:
    """Streams at once, their numbers noted under metrics that end with ``at``; raises BenchError if none is whole."""
    answers = await _exchange(bench, target, asks, at)
    whole = [
        answer
        for ask, answer in zip(asks, answers, strict=True)
        if answer.problem is None and answer.completion_tokens == ask.max_tokens and answer.arrivals
    ]
    add, name = bench.book.add, target.name
    add(name, f"errors{at}", len(answers) - len(whole))
    if not whole:
        raise BenchError(answers[0].problem or f"{answers[0].completion_tokens} tokens, not {asks[0].max_tokens}")
    seconds = max(answer.ended_at for answer in answers) - min(answer.sent_at for answer in answers)
    add(name, f"tok_s{at}", sum(answer.completion_tokens for answer in answers) / seconds)
    ttfts = [answer.ttft for answer in whole]
    gaps = list(chain.from_iterable(answer.gaps for answer in whole)) or [0.0]
    for percent in (50, 95):
        add(name, f"ttft_p{percent}{at}", percentile(ttfts, percent))
        add(name, f"itl_p{percent}{at}", percentile(gaps, percent))
    events = sum(len(answer.arrivals) for answer in whole)
    add(name, f"tokens_per_event{at}", sum(answer.completion_tokens for answer in whole) / events)
    return answers


async def _exchange(bench: Bench, target: Target, asks: Sequence[Ask], at: str) -> list[Answer]:
    """All asks at once; notes how much of a core each side of the conversation used."""
    requests = [target.to_http(ask) for ask in asks]
    async with connected(target.host, target.port, len(requests)) as connections:
        theirs, ours, started = target.cpu_seconds(), process_time(), perf_counter()
        exchanges = await exchange_all(connections, requests)
        elapsed = perf_counter() - started
        bench.book.add(target.name, f"cpu_client{at}", (process_time() - ours) / elapsed)
        for part, before, after in zip(("server", "workers"), theirs, target.cpu_seconds(), strict=True):
            if target.pid is not None:
                bench.book.add(target.name, f"cpu_{part}{at}", (after - before) / elapsed)
    return [read_answer(exchange) for exchange in exchanges]
