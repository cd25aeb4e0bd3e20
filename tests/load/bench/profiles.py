"""How much of everything one model is asked for: enough to measure, little enough for a machine of two cores."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final


@dataclass(frozen=True, slots=True)
class Profile:
    """Sizes of one model's scenarios, in tokens unless said.

    ``batches`` are numbers of concurrent requests; ``calls`` the one-token requests of a round; ``background_tokens``
    what the streams are allowed that run while a long prompt arrives; ``checked`` the most texts a batch size that are
    compared with the same prompt alone; ``least_tokens`` what a batch size must make in a round, by repetition, since a
    tenth of a second says nothing; ``efficiency`` the least HTTP tokens/s ÷ raw tokens/s that is promised.
    """

    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    prompt_tokens: int = 24
    answer_tokens: int = 128
    sampled_batch: int = 16
    calls: int = 100
    prefix_tokens: int = 1500
    turns: int = 8
    turn_tokens: int = 32
    long_tokens: int = 2000
    background_tokens: int = 3000
    checked: int = 32
    least_tokens: int = 2048
    efficiency: float = 0.95
    bound_seconds: float = 120.0
    """No scenario of one round takes longer."""

    def repeats(self, batch: int) -> int:
        """How often a batch of so many requests is sent in one round."""
        return max(1, self.least_tokens // (batch * self.answer_tokens))

    def quick(self) -> "Profile":
        """The same scenarios in a fraction of the time: for seeing that everything works, not for numbers."""
        return replace(
            self,
            batches=tuple(batch for batch in self.batches if batch in (1, 4, 16, 32)),
            answer_tokens=max(self.answer_tokens // 2, 8),
            calls=max(self.calls // 5, 3),
            least_tokens=self.least_tokens // 4,
            turns=min(self.turns, 4),
        )


# What is measured where nothing is known of the model: a server given by --against.
UNKNOWN: Final = Profile()

PROFILES: Final[Mapping[str, Profile]] = {
    "nano": Profile(efficiency=0.80),
    "micro": Profile(answer_tokens=64, calls=30, least_tokens=256),
    # SmolLM2 reads and writes about ten tokens a second on two CPU cores: the scenarios are scaled down with it.
    "smollm2": Profile(
        batches=(1, 4, 8),
        prompt_tokens=4,
        answer_tokens=16,
        sampled_batch=4,
        calls=3,
        prefix_tokens=150,
        turns=3,
        turn_tokens=8,
        long_tokens=200,
        background_tokens=200,
        checked=2,
        least_tokens=0,
        bound_seconds=600.0,
    ),
}
