"""One model from its making to its last sample: servers and mlx-lm start, rounds alternate between them, texts compare."""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from tests.load.bench.book import Book
from tests.load.bench.client import connected
from tests.load.bench.engine import raw_engine
from tests.load.bench.interference import long_prompt, short_behind_long
from tests.load.bench.latency import growing_chat, one_token, shared_prefix
from tests.load.bench.lifecycle import cold_start, disconnect, memory
from tests.load.bench.processes import BenchError, own_python, run_to_end
from tests.load.bench.profiles import Profile
from tests.load.bench.session import Bench, Said
from tests.load.bench.targets import Target, own_server, running_elsewhere, started, vllm_mlx_server
from tests.load.bench.throughput import concurrency, sampling, warm_up
from tests.load.bench.workload import Ask, Prompts

_SCENARIOS: Final[Sequence[Callable[[Bench], Awaitable[None]]]] = (
    concurrency,
    sampling,
    one_token,
    shared_prefix,
    growing_chat,
    long_prompt,
    short_behind_long,
    disconnect,
    cold_start,
)

# Model ids that are not made here: the server imports them from an installed wheel itself.
_STARTERS: Final = {"smollm2": "smollm2-135m-instruct"}

_BUILD_SECONDS: Final = 120.0

# Seconds: an import of a starter model included.
_LOAD_SECONDS: Final = 300.0


@dataclass(frozen=True, slots=True)
class Run:
    """How the measurements are made. ``vllm_mlx`` is the interpreter that serves it, None to leave it out."""

    rounds: int
    seed: int
    vllm_mlx: str | None = None


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """A server somebody else runs, and its model's directory if mlx-lm itself is to be measured beside it."""

    url: str
    model: str
    directory: Path | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """One model's samples; ``facts`` say what kind of model it is, ``servers`` who was measured with it."""

    model: str
    profile: Profile
    book: Book
    servers: list[str]
    facts: dict[str, Any]


async def measure_model(name: str, profile: Profile, run: Run, home: Path) -> Measured:
    """Our server, and vllm-mlx's if wanted, on one of our models. Raises BenchError if nothing could start."""
    models = home / "models"
    model = _STARTERS.get(name, name)
    directory = models / model
    models.mkdir(parents=True)
    if name not in _STARTERS:
        _say(f"{name}: building the model")
        command = own_python("-m", "tests.load.bench.models", name, str(directory))
        await run_to_end(command, home, home / "build.log", _BUILD_SECONDS)
    launches = [own_server(home, models, model, starter=name in _STARTERS)]
    if run.vllm_mlx is not None:
        launches.append(vllm_mlx_server(home, directory, model, run.vllm_mlx))
    async with AsyncExitStack() as stack:
        bench = Bench(profile, Prompts(run.seed), Book(), [], None)
        # One after another: the first imports the model the others are given.
        for launch in launches:
            _say(f"{name}: starting {launch.name}")
            target = await stack.enter_async_context(started(launch))
            await _load(bench, target)
            bench.targets = [*bench.targets, target]
        bench.engine = await stack.enter_async_context(raw_engine(directory, home))
        await _run_rounds(bench, name, run.rounds)
    return Measured(name, profile, bench.book, [launch.name for launch in launches], read_facts(directory))


async def measure_elsewhere(server: Elsewhere, profile: Profile, run: Run, home: Path) -> Measured:
    """A server that runs already. Raises BenchError if it does not answer."""
    home.mkdir(parents=True)
    async with AsyncExitStack() as stack:
        target = await running_elsewhere(server.url, server.model)
        bench = Bench(profile, Prompts(run.seed), Book(), [target], None)
        await _load(bench, target)
        if server.directory is not None:
            bench.engine = await stack.enter_async_context(raw_engine(server.directory, home))
        await _run_rounds(bench, server.model, run.rounds)
    facts = read_facts(server.directory) if server.directory is not None else {}
    return Measured(server.model, profile, bench.book, [target.name], facts)


def read_facts(directory: Path) -> dict[str, Any]:
    """What a model is, from its config.json and the size of its weights."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    keys = ("model_type", "num_hidden_layers", "hidden_size", "vocab_size", "quantization")
    weights = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    return {key: config[key] for key in keys if config.get(key) is not None} | {"weights_bytes": weights}


async def _load(bench: Bench, target: Target) -> None:
    """Has a server load its model by its first request; its memory is taken before and after."""
    await memory(bench, target, "start")
    try:
        async with asyncio.timeout(_LOAD_SECONDS), connected(target.host, target.port, 1) as [connection]:
            await target.ask(connection, Ask(bench.question(), 1))
    except TimeoutError:
        raise BenchError(f"{target.name} did not load {target.model} in {_LOAD_SECONDS:.0f} s") from None
    await memory(bench, target, "loaded")


async def _run_rounds(bench: Bench, name: str, rounds: int) -> None:
    await warm_up(bench)
    for bench.book.round in range(rounds):
        for scenario in _SCENARIOS:
            _say(f"{name}: round {bench.book.round + 1} of {rounds}, {scenario.__name__.replace('_', ' ')}")
            await scenario(bench)
    for target in bench.targets:
        await memory(bench, target, "end")
    _say(f"{name}: comparing {len(bench.said)} texts")
    await _compare_texts(bench)


async def _compare_texts(bench: Bench) -> None:
    """Counts, for each round, the texts that differ from the same prompt's alone: by mlx-lm, else by the server."""
    for answer_tokens, group in groupby(sorted(bench.said, key=_answer_tokens), key=_answer_tokens):
        said = list(group)
        if bench.engine is None:
            alone = await _alone_by_server(bench, said)
        else:
            prompts = {_identity(one): one.ask.messages for one in said}
            async with bench.attempt("raw", "texts alone"):
                texts = await bench.engine.alone(list(prompts.values()), answer_tokens)
            alone = dict(zip(prompts, texts, strict=True))
        for one in said:
            if one.text != alone.get(_identity(one), one.text):
                bench.book.round = one.round
                bench.book.add(one.target.name, one.metric, bench.book.sample(one.target.name, one.metric) + 1)


async def _alone_by_server(bench: Bench, said: Sequence[Said]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for one in said:
        async with bench.attempt(one.target.name, "texts alone"):
            async with connected(one.target.host, one.target.port, 1) as [connection]:
                texts[_identity(one)] = (await one.target.ask(connection, one.ask)).text
    return texts


def _answer_tokens(said: Said) -> int:
    return said.ask.max_tokens


def _identity(said: Said) -> str:
    return json.dumps(said.ask.messages)


def _say(progress: str) -> None:
    sys.stderr.write(f"{progress}\n")
    sys.stderr.flush()
