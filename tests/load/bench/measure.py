"""One model from its making to its last sample: everything starts, the rounds alternate, the texts are compared."""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.load.bench.book import Book
from tests.load.bench.client import connected
from tests.load.bench.engine import RawEngine, raw_engine
from tests.load.bench.interference import long_prompt, short_behind_long
from tests.load.bench.latency import growing_chat, one_token, shared_prefix
from tests.load.bench.lifecycle import cold_start, disconnect, memory
from tests.load.bench.processes import BenchError, own_python, run_to_end
from tests.load.bench.profiles import FULL, Profile, fitting
from tests.load.bench.session import Bench, Said
from tests.load.bench.targets import Target, link_imported, own_server, running_elsewhere, started, vllm_mlx_server
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

# Made here, by ``models.py``; or imported by the server itself from an installed wheel, under the id it gives them.
_MADE: Final = ("nano", "micro")
_STARTERS: Final = {"smollm2": "smollm2-135m-instruct"}
MODELS: Final = (*_MADE, *_STARTERS)

_BUILD_SECONDS: Final = 120.0

# In one piece: few enough for a model of ten tokens a second.
_TRIAL_TOKENS: Final = 32

# Seconds: an import of a starter model included.
_LOAD_SECONDS: Final = 300.0


@dataclass(frozen=True, slots=True)
class Run:
    """How the measurements are made. ``vllm_mlx`` is the interpreter that serves it, None to leave it out."""

    rounds: int
    seed: int
    quick: bool = False
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


async def measure_model(name: str, run: Run, home: Path) -> Measured:
    """Our server, and vllm-mlx's if wanted, on one of our models. Raises BenchError if nothing could start."""
    models = home / "models"
    model = _STARTERS.get(name, name)
    directory = models / model
    _make(models)
    if name in _MADE:
        _say(f"{name}: building the model")
        command = own_python("-m", "tests.load.bench.models", name, str(directory))
        await run_to_end(command, home, home / "build.log", _BUILD_SECONDS)
    launches = [own_server(home, models, model, starter=name in _STARTERS)]
    if run.vllm_mlx is not None:
        launches.append(vllm_mlx_server(home, directory, model, run.vllm_mlx))
    async with AsyncExitStack() as stack:
        bench = Bench(FULL, Prompts(run.seed), Book(), [], None)
        # One after another: the first imports the model the others are given.
        for launch in launches:
            _say(f"{name}: starting {launch.name}")
            target = await stack.enter_async_context(started(launch))
            await _load(bench, target)
            if not directory.exists():
                link_imported(target, models)
            bench.targets = [*bench.targets, target]
        bench.engine = await stack.enter_async_context(raw_engine(directory, home))
        await _run_rounds(bench, name, run)
    return Measured(name, bench.profile, bench.book, [launch.name for launch in launches], read_facts(directory))


async def measure_elsewhere(server: Elsewhere, run: Run, home: Path) -> Measured:
    """A server that runs already. Raises BenchError if it does not answer."""
    _make(home)
    async with AsyncExitStack() as stack:
        target = await running_elsewhere(server.url, server.model)
        bench = Bench(FULL, Prompts(run.seed), Book(), [target], None)
        await _load(bench, target)
        if server.directory is not None:
            bench.engine = await stack.enter_async_context(raw_engine(server.directory, home))
        await _run_rounds(bench, server.model, run)
    facts = read_facts(server.directory) if server.directory is not None else {}
    return Measured(server.model, bench.profile, bench.book, [target.name], facts)


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


async def _run_rounds(bench: Bench, name: str, run: Run) -> None:
    if bench.engine is not None:
        bench.profile = await _fitting_profile(bench, bench.engine)
    if run.quick:
        bench.profile = bench.profile.quick()
    await warm_up(bench)
    for bench.book.round in range(run.rounds):
        for scenario in _SCENARIOS:
            _say(f"{name}: round {bench.book.round + 1} of {run.rounds}, {scenario.__name__.replace('_', ' ')}")
            await scenario(bench)
    for target in bench.targets:
        await memory(bench, target, "end")
    _say(f"{name}: comparing {len(bench.said)} texts")
    await _compare_texts(bench)


async def _fitting_profile(bench: Bench, engine: RawEngine) -> Profile:
    """By mlx-lm's speed on the first piece of a short prompt, the faster of two: a model's first time is slow."""
    prompts = [bench.prompts.question(_TRIAL_TOKENS) for _ in range(2)]
    async with asyncio.timeout(FULL.bound_seconds):
        seconds = min([(await engine.chunks(prompt, _TRIAL_TOKENS))[0] for prompt in prompts])
    return fitting(_TRIAL_TOKENS / seconds)


async def _compare_texts(bench: Bench) -> None:
    """Counts, for each round, the texts that differ from the same prompt's alone; none where that cannot be had."""
    alone: dict[str, str] = {}
    wrong: dict[tuple[int, str, str], int] = {}
    for said in bench.said:
        key = json.dumps([said.ask.messages, said.ask.max_tokens])
        if key not in alone:
            text = await _text_alone(bench, said)
            if text is None:
                return
            alone[key] = text
        place = (said.round, said.target.name, said.metric)
        wrong[place] = wrong.get(place, 0) + (said.text != alone[key])
    for (bench.book.round, name, metric), count in wrong.items():
        bench.book.add(name, metric, count)


async def _text_alone(bench: Bench, said: Said) -> str | None:
    """What mlx-lm says to the prompt alone, or the same server where mlx-lm cannot be asked; None if neither could."""
    target = said.target
    async with bench.attempt(target.name if bench.engine is None else "raw", "text alone"):
        if bench.engine is not None:
            return await bench.engine.alone(said.ask.messages, said.ask.max_tokens)
        async with connected(target.host, target.port, 1) as [connection]:
            return (await target.ask(connection, said.ask)).text
    return None


def _make(directory: Path) -> None:
    directory.mkdir(parents=True)


def _say(progress: str) -> None:
    sys.stderr.write(f"{progress}\n")
    sys.stderr.flush()
