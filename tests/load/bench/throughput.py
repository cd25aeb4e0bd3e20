"""Many streams at once: tokens a second, times to the first token and between tokens, whose CPU it took."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from time import process_time
from typing import Any, Final

from tests.load.bench.answer import Answer, read_answer
from tests.load.bench.book import percentile
from tests.load.bench.client import connected, exchange_all
from tests.load.bench.engine import Rate
from tests.load.bench.session import Bench
from tests.load.bench.targets import Target
from tests.load.bench.workload import GREEDY, Ask

# Each by the word its metric carries.
SAMPLINGS: Final[Mapping[str, Mapping[str, Any]]] = {
    "greedy": GREEDY,
    "temperature": {"temperature": 0.8},
    "top_p_top_k": {"temperature": 0.8, "top_p": 0.9, "top_k": 40},
}


@dataclass(frozen=True, slots=True)
class Volley:
    """Requests sent at once and what came back. ``cpu`` is seconds of client, server and its children meanwhile."""

    asks: Sequence[Ask]
    answers: Sequence[Answer]
    cpu: tuple[float, float, float]

    @property
    def seconds(self) -> float:
        """From the first request's first byte to the last answer's last."""
        return max(answer.ended_at for answer in self.answers) - min(answer.sent_at for answer in self.answers)

    @property
    def whole(self) -> list[tuple[Ask, Answer]]:
        """The requests whose answers have all that was asked for."""
        return [
            (ask, answer)
            for ask, answer in zip(self.asks, self.answers, strict=True)
            if answer.problem is None and answer.usage.completion == ask.max_tokens and answer.arrivals
        ]


async def concurrency(bench: Bench) -> None:
    """Every batch size: raw mlx-lm, the bare loop and the servers in turn, all with the same prompts."""
    profile = bench.profile
    tokens = profile.answer_tokens
    for batch in profile.batches:
        raw, bare = Rate(), Rate()
        volleys: dict[str, list[Volley]] = {target.name: [] for target in bench.targets}
        for _ in range(profile.repeats(batch)):
            prompts = [bench.question() for _ in range(batch)]
            if bench.engine is not None:
                async with bench.attempt("raw", f"batch {batch}"):
                    raw += await bench.engine.batch(prompts, tokens)
                    bare += await bench.engine.bare(prompts, tokens)
            for target in bench.turns():
                async with bench.attempt(target.name, f"{batch} streams"):
                    volleys[target.name].append(await _fire(target, [Ask(prompt, tokens) for prompt in prompts]))
        for subject, rate in (("raw", raw), ("bare", bare)):
            if rate.seconds:
                bench.book.add(subject, f"tok_s@{batch}", rate.per_second)
        for target in bench.targets:
            _note(bench, target, volleys[target.name], f"@{batch}")
            said = chain.from_iterable(volley.whole for volley in volleys[target.name])
            for ask, answer in islice(said, profile.checked):
                bench.remember(target, f"wrong@{batch}", ask, answer.text)


async def sampling(bench: Bench) -> None:
    """The cost of sampling: one batch greedy, by temperature, and by temperature, top-p and top-k, in turn."""
    profile = bench.profile
    for target in bench.turns():
        volleys: dict[str, list[Volley]] = {word: [] for word in SAMPLINGS}
        for _ in range(profile.sampled_repeats):
            for word, parameters in SAMPLINGS.items():
                async with bench.attempt(target.name, f"sampling {word}"):
                    prompts = [bench.question() for _ in range(profile.sampled_batch)]
                    asks = [Ask(prompt, profile.answer_tokens, sampling=parameters) for prompt in prompts]
                    volleys[word].append(await _fire(target, asks))
        for word in SAMPLINGS:
            _note(bench, target, volleys[word], f"@{word}")


async def warm_up(bench: Bench) -> None:
    """Everybody once at the largest batch, so that no first time is measured."""
    prompts = [bench.question() for _ in range(max(bench.profile.batches))]
    if bench.engine is not None:
        async with bench.attempt("raw", "warm-up"):
            await bench.engine.batch(prompts, 4)
            await bench.engine.bare(prompts, 4)
    for target in bench.targets:
        async with bench.attempt(target.name, "warm-up"):
            await _fire(target, [Ask(prompt, 4) for prompt in prompts])


async def _fire(target: Target, asks: Sequence[Ask]) -> Volley:
    requests = [target.to_http(ask) for ask in asks]
    async with connected(target.host, target.port, len(requests)) as connections:
        client, (server, children) = process_time(), target.cpu_seconds()
        exchanges = await exchange_all(connections, requests)
        client = process_time() - client
        server_after, children_after = target.cpu_seconds()
    answers = [read_answer(exchange) for exchange in exchanges]
    return Volley(asks, answers, (client, server_after - server, children_after - children))


def _note(bench: Bench, target: Target, volleys: Sequence[Volley], at: str) -> None:
    """The numbers of some volleys together, under metrics that end with ``at``."""
    if not volleys:
        return
    whole = [answer for volley in volleys for _, answer in volley.whole]
    everything = [answer for volley in volleys for answer in volley.answers]
    seconds = sum(volley.seconds for volley in volleys)
    add = partial(bench.book.add, target.name)
    add(f"errors{at}", len(everything) - len(whole))
    if problems := [answer.problem for answer in everything if answer.problem is not None]:
        bench.book.failures.append(f"{target.name}: streams {at}, round {bench.book.round + 1}: {problems[0]}")
    if not whole:
        return
    add(f"tok_s{at}", sum(answer.usage.completion for answer in everything) / seconds)
    ttfts = [answer.ttft for answer in whole]
    gaps = list(chain.from_iterable(answer.gaps for answer in whole)) or [0.0]
    for percent in (50, 95):
        add(f"ttft_p{percent}{at}", percentile(ttfts, percent))
        add(f"itl_p{percent}{at}", percentile(gaps, percent))
    prompt_tokens = sum(answer.usage.prompt for answer in whole)
    if prompt_tokens:
        add(f"cached{at}", sum(answer.usage.cached for answer in whole) / prompt_tokens)
    events = sum(len(answer.arrivals) for answer in whole)
    add(f"tokens_per_event{at}", sum(answer.usage.completion for answer in whole) / events)
    for at_cpu, part in enumerate(("client", "server", "workers")):
        if part == "client" or target.pid is not None:
            add(f"cpu_{part}{at}", sum(volley.cpu[at_cpu] for volley in volleys) / seconds)
