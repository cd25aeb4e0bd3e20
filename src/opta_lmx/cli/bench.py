"""``opta-lmx bench``: how fast a running server answers, as a client of the OpenAI API sees it.

For users who ask what their machine does with a model; ``scripts/bench`` holds the server against its engine.
"""

import json
import random
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, Final

from opta_lmx.cli.arguments import Arguments
from opta_lmx.cli.failure import ExitCode, Failure
from opta_lmx.cli.remote import Remote, find_inference, follow, show_line, table

_ROUTE: Final = "/v1/chat/completions"

_HINTS: Final = {
    401: "give an API key with --api-key or $OPTA_LMX_API_KEY",
    429: "ask for fewer at a time with --concurrency, or let more wait: scheduling.max_waiting",
}

# Of each turn, so that the last ones, which have the machine to themselves, do not decide.
_REQUESTS_EACH: Final = 4

# Short and frequent: a token each to most tokenizers. Two prompts of them part within a few words.
_WORDS: Final = ("time", "way", "day", "man", "thing", "life", "hand", "part", "place", "case", "week", "work", "fact")


@dataclass(slots=True)
class Answer:
    """What one request took, in seconds from its start; ``arrivals`` are those of pieces of text."""

    started: float
    arrivals: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """What some requests took, so many at a time. Seconds; None where nothing was measured.

    ``tokens_per_second`` is of all of them together, from the first's start to the last's end; ITL is the gap between
    pieces of text of one answer, each of which may hold several tokens where the server is faster than its reader.
    """

    concurrency: int
    requests: int
    errors: int
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    tokens_per_second: float
    ttft_p50_seconds: float | None
    ttft_p95_seconds: float | None
    itl_p50_seconds: float | None
    itl_p95_seconds: float | None


def run_bench(arguments: Arguments, environ: Mapping[str, str]) -> int:
    """Measure turn by turn and print a row for each. Raises Failure where a request failed, after the rows."""
    remote = find_inference(arguments, environ)
    # Not those of another run, which the server's prefix cache may still know.
    seed = random.SystemRandom().getrandbits(64)
    show_line(f"{arguments.model}: the first request, which may load it")
    first = _answer(remote, arguments, seed)
    if first.failure is not None:
        show_line("")
        raise first.failure
    turns: list[Turn] = []
    failures: list[Failure] = []
    for concurrency in arguments.concurrency:
        count = arguments.requests or _REQUESTS_EACH * concurrency
        show_line(f"{arguments.model}: {count} requests, {concurrency} at a time")
        answers, seconds = _ask_all(remote, arguments, concurrency, range(seed + 1, seed + 1 + count))
        seed += count
        turns.append(summarise(concurrency, answers, seconds))
        failures += [answer.failure for answer in answers if answer.failure is not None]
    show_line("")
    if arguments.json:
        print(json.dumps({"model": arguments.model, "turns": [asdict(turn) for turn in turns]}, indent=2))
    else:
        print("\n".join(table([_row(turn) for turn in turns])), flush=True)
    if failures:
        raise Failure(f"{len(failures)} requests failed, the first so: {failures[0]}", failures[0].hint)
    return ExitCode.DONE


def _ask_all(
    remote: Remote, arguments: Arguments, concurrency: int, seeds: Sequence[int]
) -> tuple[list[Answer], float]:
    """All answers, and the seconds they took together."""
    started = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        answers = list(pool.map(partial(_answer, remote, arguments), seeds))
    return answers, time.perf_counter() - started


def _answer(remote: Remote, arguments: Arguments, seed: int) -> Answer:
    """One answer, whatever becomes of it."""
    words = random.Random(seed)
    body = {
        "model": arguments.model,
        "messages": [{"role": "user", "content": " ".join(words.choices(_WORDS, k=arguments.prompt_words))}],
        "max_tokens": arguments.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    answer = Answer(time.perf_counter())
    try:
        for event in follow(remote, _ROUTE, body, _HINTS):
            if _has_text(event):
                answer.arrivals.append(time.perf_counter() - answer.started)
            if usage := event.get("usage"):
                answer.prompt_tokens, answer.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
            if "error" in event:
                raise Failure(event["error"]["message"], "the server's log tells more")
    except Failure as failure:
        answer.failure = failure
    return answer


def _has_text(event: Mapping[str, Any]) -> bool:
    deltas = (choice["delta"] for choice in event.get("choices", ()))
    return any(value for delta in deltas for name, value in delta.items() if name != "role")


def summarise(concurrency: int, answers: Sequence[Answer], seconds: float) -> Turn:
    """The figures of one turn; tokens of answers that failed are not in them."""
    whole = [answer for answer in answers if answer.failure is None]
    first = [answer.arrivals[0] for answer in whole if answer.arrivals]
    gaps = [later - earlier for answer in whole for earlier, later in pairwise(answer.arrivals)]
    tokens = sum(answer.completion_tokens for answer in whole)
    return Turn(
        concurrency=concurrency,
        requests=len(answers),
        errors=len(answers) - len(whole),
        prompt_tokens=sum(answer.prompt_tokens for answer in whole),
        completion_tokens=tokens,
        seconds=round(seconds, 3),
        tokens_per_second=round(tokens / seconds, 1),
        ttft_p50_seconds=percentile(50, first),
        ttft_p95_seconds=percentile(95, first),
        itl_p50_seconds=percentile(50, gaps),
        itl_p95_seconds=percentile(95, gaps),
    )


def percentile(percent: int, values: Sequence[float]) -> float | None:
    """The least of ``values`` that is not below ``percent`` of them, to the microsecond; None of none."""
    if not values:
        return None
    rank = -(-len(values) * percent // 100)
    return round(sorted(values)[rank - 1], 6)


def _row(turn: Turn) -> dict[str, str]:
    times = {
        "TTFT p50": turn.ttft_p50_seconds,
        "TTFT p95": turn.ttft_p95_seconds,
        "ITL p50": turn.itl_p50_seconds,
        "ITL p95": turn.itl_p95_seconds,
    }
    return {
        "at a time": str(turn.concurrency),
        "requests": str(turn.requests),
        "errors": str(turn.errors),
        "tok/s": f"{turn.tokens_per_second:.1f}",
        **{name: "-" if seconds is None else f"{seconds * 1000:.1f} ms" for name, seconds in times.items()},
    }
