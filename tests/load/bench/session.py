"""What the scenarios of one model share: whom they measure, in which order, and where the samples go."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import psutil

from tests.load.bench.book import Book
from tests.load.bench.engine import RawEngine
from tests.load.bench.processes import BenchError
from tests.load.bench.profiles import Profile
from tests.load.bench.targets import Target
from tests.load.bench.workload import Ask, Conversation, Prompts


@dataclass(frozen=True, slots=True)
class Said:
    """A greedy text a server gave, to be compared with that of the same prompt alone; ``metric`` counts the wrong."""

    round: int
    target: Target
    metric: str
    ask: Ask
    text: str


@dataclass(slots=True)
class Bench:
    """What every scenario is given. A scenario measures one round of all subjects, never two at once.

    ``engine`` is mlx-lm itself, None where the model is not at hand.
    """

    profile: Profile
    prompts: Prompts
    book: Book
    targets: Sequence[Target]
    engine: RawEngine | None
    said: list[Said] = field(default_factory=list)

    def turns(self) -> list[Target]:
        """The servers, another one first in each round."""
        first = self.book.round % max(len(self.targets), 1)
        return [*self.targets[first:], *self.targets[:first]]

    def question(self) -> Conversation:
        """A short prompt nobody has seen."""
        return self.prompts.question(self.profile.prompt_tokens)

    def remember(self, target: Target, metric: str, ask: Ask, text: str) -> None:
        """Have a text compared once all rounds are over."""
        self.said.append(Said(self.book.round, target, metric, ask, text))

    @asynccontextmanager
    async def attempt(self, subject: str, what: str) -> AsyncIterator[None]:
        """Bounds what is inside; if it fails that is noted, and the run goes on without its sample."""
        reason = None
        try:
            async with asyncio.timeout(self.profile.bound_seconds):
                yield
        except TimeoutError:
            reason = f"not done in {self.profile.bound_seconds:.0f} s"
        except (BenchError, OSError, psutil.Error) as error:
            reason = str(error) or type(error).__name__
        if reason is not None:
            self.book.failures.append(f"{subject}: {what}, round {self.book.round + 1}: {reason}")
