"""How much is asked of a model: enough to measure, little enough for the machine it runs on."""

from dataclasses import dataclass, replace
from typing import Final


@dataclass(frozen=True, slots=True)
class Profile:
    """Sizes of the scenarios, in tokens unless said.

    ``batches`` are numbers of concurrent requests; ``calls`` the one-token requests of a round; ``background_tokens``
    what the streams are allowed that run while a long prompt arrives; ``checked`` the most texts a batch size that are
    compared with the same prompt alone; ``least_tokens`` what a batch size must make in a round, by repetition, since a
    tenth of a second says nothing; ``bound_seconds`` what no scenario of one round may pass.
    """

    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    prompt_tokens: int = 24
    answer_tokens: int = 128
    least_tokens: int = 2048
    sampled_batch: int = 16
    sampled_repeats: int = 3
    calls: int = 100
    prefix_tokens: int = 1500
    turns: int = 8
    turn_tokens: int = 32
    long_tokens: int = 2000
    background_tokens: int = 3000
    checked: int = 32
    bound_seconds: float = 120.0

    def repeats(self, batch: int) -> int:
        """How often a batch of so many requests is sent in one round."""
        return max(1, self.least_tokens // (batch * self.answer_tokens))

    def quick(self) -> "Profile":
        """The same scenarios in a fraction of the time: for seeing that everything works, not for numbers."""
        return replace(
            self,
            batches=tuple(batch for batch in self.batches if batch in (1, 4, 16, 32)),
            answer_tokens=max(self.answer_tokens // 2, 8),
            least_tokens=self.least_tokens // 4,
            sampled_repeats=1,
            calls=max(self.calls // 5, 3),
            turns=min(self.turns, 4),
        )


# The sizes the promises are made for.
FULL: Final = Profile()

_SMALL: Final = Profile(
    answer_tokens=64,
    least_tokens=256,
    sampled_repeats=1,
    calls=20,
    prefix_tokens=300,
    turns=4,
    long_tokens=600,
    bound_seconds=240.0,
)

_TINY: Final = Profile(
    batches=(1, 4),
    prompt_tokens=4,
    answer_tokens=16,
    least_tokens=0,
    sampled_batch=4,
    sampled_repeats=1,
    calls=3,
    prefix_tokens=100,
    turns=3,
    turn_tokens=8,
    long_tokens=128,
    background_tokens=200,
    checked=2,
    bound_seconds=600.0,
)


def fitting(prefill_tokens_per_second: float) -> Profile:
    """The largest sizes that take minutes, not hours, where prompts are processed at this speed."""
    if prefill_tokens_per_second >= 500:
        return FULL
    return _SMALL if prefill_tokens_per_second >= 100 else _TINY
