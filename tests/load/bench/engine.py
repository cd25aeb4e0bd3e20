"""The parent's side of ``engine_child``: mlx-lm's own speed, taken between the server's turns."""

import asyncio
import json
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.load.bench.processes import BenchError, own_python, running, tail
from tests.load.bench.workload import Conversation

# Seconds: importing MLX and reading a model from a cold disk.
_LOAD_SECONDS = 120.0

# Results are one line each; 32 long texts fit many times over.
_LINE_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Rate:
    """Tokens and the seconds they took; rates of several runs add up."""

    tokens: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Rate") -> "Rate":
        return Rate(self.tokens + other.tokens, self.seconds + other.seconds)

    @property
    def per_second(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


class RawEngine:
    """One loaded model; every method returns when the child is idle again, or raises BenchError.

    A caller that stops waiting ends the child: it cannot be told to stop, and must not work while others are measured.
    """

    def __init__(self, process: Process, log: Path) -> None:
        self._process = process
        self._log = log

    async def batch(self, prompts: Sequence[Conversation], max_tokens: int) -> Rate:
        """mlx-lm's BatchGenerator over all prompts at once."""
        return Rate(**await self._do("batch", prompts=prompts, max_tokens=max_tokens))

    async def bare(self, prompts: Sequence[Conversation], max_tokens: int) -> Rate:
        """One forward and one argmax a step, for as many rows."""
        return Rate(**await self._do("bare", prompts=prompts, max_tokens=max_tokens))

    async def alone(self, prompt: Conversation, max_tokens: int) -> str:
        """The greedy text of one prompt by itself, which every server must give."""
        return str((await self._do("alone", prompt=prompt, max_tokens=max_tokens))["text"])

    async def calls(self, prompts: Sequence[Conversation]) -> list[float]:
        """Seconds to the first token of each prompt, one after another."""
        return list((await self._do("calls", prompts=prompts))["seconds"])

    async def chunks(self, prompt: Conversation, chunk_tokens: int) -> list[float]:
        """Seconds of each piece of a prompt."""
        return list((await self._do("chunks", prompt=prompt, chunk_tokens=chunk_tokens))["seconds"])

    async def ready(self) -> None:
        """Waits until the model is loaded."""
        try:
            async with asyncio.timeout(_LOAD_SECONDS):
                await self._result()
        except TimeoutError:
            raise BenchError(f"raw mlx-lm did not load the model in {_LOAD_SECONDS:.0f} s") from None

    async def _do(self, job: str, **arguments: Any) -> dict[str, Any]:
        stdin = self._process.stdin
        assert stdin is not None
        # uvloop raises RuntimeError for a write to a pipe it knows to be closed.
        if not stdin.is_closing():
            stdin.write(json.dumps({"job": job, **arguments}).encode() + b"\n")
        # A pipe that breaks now shows as the end of the results.
        return await self._result()

    async def _result(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        try:
            line = await self._process.stdout.readline()
        except asyncio.CancelledError:
            self._process.kill()
            raise
        if not line:
            raise BenchError(f"raw mlx-lm ended: {tail(self._log)}")
        result: dict[str, Any] = json.loads(line)
        return result


@asynccontextmanager
async def raw_engine(model: Path, home: Path) -> AsyncIterator[RawEngine]:
    """mlx-lm with a model loaded, in a process of its own; raises BenchError."""
    log = home / "engine.log"
    command = own_python("-m", "tests.load.bench.engine_child", str(model))
    async with running(command, home, log, piped=True, limit_bytes=_LINE_BYTES) as process:
        engine = RawEngine(process, log)
        await engine.ready()
        yield engine
