"""Several prompts of one request, generated at once and read as one generation."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from anyio import CancelScope, CapacityLimiter, create_task_group

from opta_lmx.errors import LmxError
from opta_lmx.inference.engine import Generation, InferenceEngine
from opta_lmx.types import CacheReport, Delta, GenerateRequest


class JointGeneration(Generation):
    """The generations of requests with ``n`` choices each; choice k of request i is choice ``i * n + k`` here."""

    def __init__(self, first: Generation, size: int, n: int) -> None:
        self.request_id = first.request_id
        self.model_id = first.model_id
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
        """Nothing: ``joined`` closes each of them."""

    async def opened(self) -> None:
        """Wait for the first token of every prompt; raises the first refusal."""
        while len(self._parts) < self._size:
            if self._error is not None:
                raise self._error
            await self._next()

    async def read(self, place: int, generation: Generation) -> None:
        """Takes in the generation of request ``place`` to its end, and closes it."""
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
async def joined(
    engine: InferenceEngine, first: Generation, others: Sequence[GenerateRequest], most_at_once: int
) -> AsyncIterator[Generation]:
    """``first`` together with the generations of ``others``, once each of them has its first token.

    Of a long list at most ``most_at_once`` are open at any moment, so that one client's list cannot fill the queue.
    Raises what ``engine.open`` raises; on every way out all of them are closed.
    """
    if not others:
        yield first
        return
    joint = JointGeneration(first, len(others) + 1, others[0].sampling.n)
    places = CapacityLimiter(most_at_once)

    async def run(place: int, wanted: GenerateRequest | None) -> None:
        try:
            async with places:
                await joint.read(place, first if wanted is None else await engine.open(wanted))
        except LmxError as error:
            joint.fail(error)

    try:
        async with create_task_group() as tasks:
            for place, wanted in enumerate((None, *others)):
                tasks.start_soon(run, place, wanted)
            try:
                await joint.opened()
                yield joint
            finally:
                tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        # The group's wrapping is an accident of the readers; callers want the error itself.
        if len(group.exceptions) > 1:
            raise
        raise group.exceptions[0] from None
