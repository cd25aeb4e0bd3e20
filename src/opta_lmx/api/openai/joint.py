"""Several prompts of one request, generated at once and read as one generation."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeAlias

from anyio import CancelScope, CapacityLimiter, create_task_group

from opta_lmx.errors import LmxError
from opta_lmx.inference.engine import Generation, InferenceEngine
from opta_lmx.types import CacheReport, Delta, GenerateRequest

Join: TypeAlias = Callable[[Generation], Awaitable[Generation]]


class JointGeneration(Generation):
    """The generations of requests with ``n`` choices each; choice k of request i is choice ``i * n + k`` here."""

    def __init__(self, size: int, n: int) -> None:
        self._parts: list[Generation] = []
        self._size = size
        self._n = n
        self._ended = 0
        self._deltas: list[Delta] = []
        self._error: LmxError | None = None
        self._news = asyncio.Event()

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(part.prompt_tokens for part in self._parts)

    @property
    def cache(self) -> CacheReport:
        """What the prefix cache served of all prompts; where it stopped, each has its own answer."""
        return CacheReport(sum(part.cache.hit_tokens for part in self._parts), 0, "several_prompts")

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        """Everything that has arrived for any of them; raises the first error, after what came before it."""
        while True:
            deltas, self._deltas = self._deltas, []
            if deltas:
                yield deltas
            elif self._error is not None:
                raise self._error
            elif self._ended == self._size:
                return
            else:
                await self._next()

    async def aclose(self) -> None:
        """Nothing: ``joining`` closes each of them."""

    async def opened(self) -> None:
        """Wait for the first token of every prompt; raises the first refusal."""
        while len(self._parts) < self._size:
            if self._error is not None:
                raise self._error
            await self._next()

    async def read(self, place: int, generation: Generation) -> None:
        """Takes in the generation of request ``place`` to its end, and closes it."""
        self.request_id, self.model_id = generation.request_id, generation.model_id
        self._parts.append(generation)
        self._news.set()
        try:
            async for deltas in generation:
                first = place * self._n
                self._deltas += [
                    Delta(first + delta.choice, delta.text, delta.token_count, delta.finish, delta.logprobs)
                    for delta in deltas
                ]
                self._news.set()
            self._ended += 1
        finally:
            self._news.set()
            with CancelScope(shield=True):
                await generation.aclose()

    def fail(self, error: LmxError) -> None:
        """End with the first error of any of them."""
        self._error = self._error or error
        self._news.set()

    async def _next(self) -> None:
        self._news.clear()
        await self._news.wait()


@asynccontextmanager
async def joining(engine: InferenceEngine, others: Sequence[GenerateRequest], most_at_once: int) -> AsyncIterator[Join]:
    """Starts ``others``; gives the function that joins the generation of a first request to theirs.

    That function returns once each has its first token, and raises what ``engine.open`` raises. Of a long list at most
    ``most_at_once`` are open at any moment, so that one client's list cannot fill the queue. On every way out of the
    block all of them are closed.
    """
    joint = JointGeneration(len(others) + 1, others[0].sampling.n if others else 1)
    # The first has the one place that is missing here.
    places = CapacityLimiter(max(most_at_once - 1, 1))

    async def read(place: int, wanted: GenerateRequest) -> None:
        try:
            async with places:
                await joint.read(place, await engine.open(wanted))
        except LmxError as error:
            joint.fail(error)

    async def read_first(first: Generation) -> None:
        try:
            await joint.read(0, first)
        except LmxError as error:
            joint.fail(error)

    async def join(first: Generation) -> Generation:
        if not others:
            return first
        tasks.start_soon(read_first, first)
        await joint.opened()
        return joint

    try:
        async with create_task_group() as tasks:
            for place, wanted in enumerate(others, start=1):
                tasks.start_soon(read, place, wanted)
            try:
                yield join
            finally:
                tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        # The group's wrapping is an accident of the readers; callers want the error itself.
        if len(group.exceptions) > 1:
            raise
        raise group.exceptions[0] from None
