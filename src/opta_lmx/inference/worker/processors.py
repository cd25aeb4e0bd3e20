"""What changes a row's logits before sampling. Only rows that asked carry any of these."""

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from opta_lmx.inference.worker.sampler_rows import Logits, LogitsProcessor
from opta_lmx.types import SamplingParams


class _Plain:
    """What processors have in common that need no preparation and cannot fail."""

    error: str | None = None

    def prepare(self) -> None:
        """Nothing can be done ahead."""


class LogitBias(_Plain):
    """Adds fixed amounts to chosen tokens (OpenAI's ``logit_bias``)."""

    def __init__(self, bias: Mapping[int, float]) -> None:
        self._tokens = np.array(list(bias), dtype=np.intp)
        self._amounts = np.array(list(bias.values()), dtype=np.float32)

    def apply(self, row: Logits) -> None:
        """Tokens are below the row's size: the backend checked them."""
        row[self._tokens] += self._amounts

    def accept(self, token: int) -> None:
        """Nothing to learn."""


class Penalties(_Plain):
    """Frequency and presence penalties over the answer, repetition penalty over prompt and answer.

    OpenAI's formula for the first two, CTRL's (arXiv:1909.05858) for the third: positive logits are divided by
    the penalty, negative ones multiplied.
    """

    def __init__(self, params: SamplingParams, prompt: Iterable[int]) -> None:
        self._frequency = params.frequency_penalty
        self._presence = params.presence_penalty
        self._repetition = params.repetition_penalty
        self._answer: Counter[int] = Counter()
        self._seen = set(prompt) if self._repetition != 1.0 else set()

    def apply(self, row: Logits) -> None:
        """The repetition penalty comes first, as it scales what the others shift."""
        if self._seen:
            seen = np.fromiter(self._seen, dtype=np.intp, count=len(self._seen))
            scores = row[seen]
            row[seen] = np.where(scores > 0, scores / self._repetition, scores * self._repetition)
        if self._answer:
            tokens = np.fromiter(self._answer.keys(), dtype=np.intp, count=len(self._answer))
            counts = np.fromiter(self._answer.values(), dtype=np.float32, count=len(self._answer))
            row[tokens] -= self._frequency * counts + self._presence

    def accept(self, token: int) -> None:
        """Count a token of the answer."""
        self._answer[token] += 1
        if self._repetition != 1.0:
            self._seen.add(token)


class MinTokens(_Plain):
    """Forbids the end of the sequence until enough tokens were made."""

    def __init__(self, count: int, stop_ids: Iterable[int]) -> None:
        self._left = count
        self._stop_ids = np.array(sorted(stop_ids), dtype=np.intp)

    def apply(self, row: Logits) -> None:
        """Masks the stop tokens while tokens are owed, unless nothing else is left, as at the end of a grammar."""
        if self._left > 0:
            before = row[self._stop_ids]
            row[self._stop_ids] = -np.inf
            if row.max() == -np.inf:
                row[self._stop_ids] = before

    def accept(self, token: int) -> None:
        """One token less is owed."""
        self._left -= 1


def processors_for(params: SamplingParams, prompt: Iterable[int], stop_ids: Iterable[int]) -> list[LogitsProcessor]:
    """The processors a request asked for; empty for most."""
    wanted: list[LogitsProcessor] = []
    if params.logit_bias:
        wanted.append(LogitBias(params.logit_bias))
    if params.frequency_penalty or params.presence_penalty or params.repetition_penalty != 1.0:
        wanted.append(Penalties(params, prompt))
    if params.min_tokens:
        wanted.append(MinTokens(params.min_tokens, stop_ids))
    return wanted
