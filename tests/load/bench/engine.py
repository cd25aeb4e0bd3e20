"""The parent's side of ``engine_child``: mlx-lm's own speed, taken between the server's turns."""

import asyncio
import json
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.load.bench.processes import BenchError, own_python, running, tail
from tests.load.bench.workload import Conversation

# Seconds: importing MLX and reading a model from a cold disk.
_LOAD_SECONDS = 120.0

# Results are one line each; 32 long texts fit many times over.
_LINE_BYTES = 16 * 2**20


class RawEngine:
    """One loaded model; every method returns when the child is idle again. Raises BenchError if it fails."""

    def __init__(self, process: Process, log: Path, bound_seconds: float) -> None:
        self._process = process
        self._log = log
        self._bound_seconds = bound_seconds

    async def batch(self, prompts: Sequence[Conversation], max_tokens: int) -> float:
        """Tokens a second of mlx-lm's BatchGenerator over all prompts at once."""
        result = await self._do("batch", prompts=prompts, max_tokens=max_tokens)
        return float(result["tokens"] / result["seconds"])

    async def bare(self, prompts: Sequence[Conversation], max_tokens: int) -> float:
        """Tokens a second of one forward and one argmax a step, for as many rows."""
        result = await self._do("bare", prompts=prompts, max_tokens=max_tokens)
        return float(result["tokens"] / result["seconds"])

    async def alone(self, prompts: Sequence[Conversation], max_tokens: int) -> list[str]:
        """The greedy text of each prompt by itself."""
        return list((await self._do("alone", prompts=prompts, max_tokens=max_tokens))["texts"])

    async def calls(self, prompts: Sequence[Conversation]) -> list[float]:
        """Seconds to the first token of each prompt, one after another."""
        return list((await self._do("calls", prompts=prompts))["seconds"])

    async def chunks(self, prompt: Conversation, chunk_tokens: int) -> list[float]:
        """Seconds of each piece of a prompt."""
        return list((await self._do("chunks", prompt=prompt, chunk_tokens=chunk_tokens))["seconds"])

    async def ready(self) -> None:
        """Waits until the model is loaded."""
        await self._result(_LOAD_SECONDS)

    async def _do(self, job: str, **arguments: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"job": job, **arguments}).encode() + b"\n")
        await self._process.stdin.drain()
        return await self._result(self._bound_seconds)

    async def _result(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        async with asyncio.timeout(seconds):
            line = await self._process.stdout.readline()
        if not line:
            raise BenchError(f"raw mlx-lm ended: {tail(self._log)}")
        result: dict[str, Any] = json.loads(line)
        return result


@asynccontextmanager
async def raw_engine(model: Path, home: Path, bound_seconds: float) -> AsyncIterator[RawEngine]:
    """mlx-lm with a model loaded, in a process of its own; raises BenchError."""
    log = home / "engine.log"
    command = own_python("-m", "tests.load.bench.engine_child", str(model))
    async with running(command, home, log, piped=True, limit_bytes=_LINE_BYTES) as process:
        engine = RawEngine(process, log, bound_seconds)
        await engine.ready()
        yield engine
