"""mlx-lm without a server, in a process of its own: ``python -m tests.load.bench.engine_child MODEL_DIRECTORY``.

One JSON object a line on standard input is a job, one on standard output its result; nothing runs in between, so the
process can stay alive beside a server that is being measured. ``engine.py`` is the other side.

A server renders its chat template and tokenises while its clock runs; here that happens before the clock starts. What
a template puts in front of every prompt, a server's prefix cache spares it after the first; here it is left away where
time is taken, so that no server is faster for working less.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any, TypeAlias

import mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import BatchKVCache, make_prompt_cache

from tests.load.bench.workload import Conversation, Prompts

Job: TypeAlias = dict[str, Any]
Result: TypeAlias = dict[str, Any]

# Sequences decoded at once, as many as the server's default.
_BATCH_LIMIT = 32


class Engine:
    """One model and the jobs it can be given; each method is a job by its name."""

    def __init__(self, directory: Path) -> None:
        self._model, self._tokenizer = load(str(directory))
        first, second = (self._render(Prompts(seed).question(8)) for seed in range(2))
        self._shared = next(at for at, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)

    def batch(self, prompts: list[Conversation], max_tokens: int) -> Result:
        """All prompts at once through mlx-lm's BatchGenerator, greedy: seconds and tokens."""
        rows = [self._render(prompt)[self._shared :] for prompt in prompts]
        started = perf_counter()
        made = self._generate(rows, max_tokens)
        return {"seconds": perf_counter() - started, "tokens": sum(map(len, made))}

    def bare(self, prompts: list[Conversation], max_tokens: int) -> Result:
        """The least a step can be: one forward of the whole batch and one argmax, nothing a row.

        The rows are prompts of one length, that of the longest; their prefill is part of the time, as in ``batch``.
        """
        size, length = len(prompts), max(len(self._render(prompt)) - self._shared for prompt in prompts)
        rows = mx.random.randint(0, 256, (size, length))
        cache = [BatchKVCache([0] * size) for _ in self._model.layers]
        mx.eval(rows)
        started = perf_counter()
        self._model(rows[:, :-1], cache=cache)
        mx.eval([layer.state for layer in cache])
        last = rows[:, -1]
        for _ in range(max_tokens):
            last = mx.argmax(self._model(last[:, None], cache=cache)[:, -1], axis=-1)
            mx.eval(last)
        return {"seconds": perf_counter() - started, "tokens": size * max_tokens}

    def alone(self, prompt: Conversation, max_tokens: int) -> Result:
        """One prompt by itself, greedy: its text."""
        [tokens] = self._generate([self._render(prompt)], max_tokens)
        return {"text": self._tokenizer.decode(tokens, skip_special_tokens=True)}

    def calls(self, prompts: list[Conversation]) -> Result:
        """One token for each prompt, one after another: the seconds of each."""
        rows = [self._render(prompt)[self._shared :] for prompt in prompts]
        seconds = []
        for row in rows:
            started = perf_counter()
            self._generate([row], 1)
            seconds.append(perf_counter() - started)
        return {"seconds": seconds}

    def chunks(self, prompt: Conversation, chunk_tokens: int) -> Result:
        """A prompt in pieces of so many tokens: the seconds of each piece."""
        tokens = self._render(prompt)
        cache = make_prompt_cache(self._model)
        seconds = []
        for start in range(0, len(tokens), chunk_tokens):
            piece = mx.array(tokens[start : start + chunk_tokens])[None]
            started = perf_counter()
            self._model(piece, cache=cache)
            mx.eval([layer.state for layer in cache])
            seconds.append(perf_counter() - started)
        return {"seconds": seconds}

    def _render(self, prompt: Conversation) -> list[int]:
        tokens: list[int] = self._tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        return tokens

    def _generate(self, rows: list[list[int]], max_tokens: int) -> list[list[int]]:
        generator = BatchGenerator(self._model, max_tokens=max_tokens, completion_batch_size=_BATCH_LIMIT)
        made: dict[int, list[int]] = {uid: [] for uid in generator.insert(rows)}
        left = len(rows)
        while left:
            for response in generator.next_generated():
                made[response.uid].append(response.token)
                left -= response.finish_reason is not None
        generator.close()
        return list(made.values())


def main() -> None:
    """Load, say so with an empty result, and do jobs until standard input ends."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be read as a result
    engine = Engine(Path(sys.argv[1]))
    jobs: dict[str, Callable[..., Result]] = {
        job.__name__: job for job in (engine.batch, engine.bare, engine.alone, engine.calls, engine.chunks)
    }
    results.write("{}\n")
    results.flush()
    for line in sys.stdin:
        job: Job = json.loads(line)
        result = jobs[job.pop("job")](**job)
        results.write(json.dumps(result) + "\n")
        results.flush()


if __name__ == "__main__":
    main()
