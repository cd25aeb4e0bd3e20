"""Prompts on their way into the batch: which one gets the next chunk, and how large it may be."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from opta_lmx.inference.worker.batch import Caches, row_of
from opta_lmx.inference.worker.prompt_scores import PromptScores
from opta_lmx.inference.worker.sequence import Sequence

# A piece of fewer tokens says little about the cost of a token: most of it is what any forward costs.
_TELLING_TOKENS = 16
# With nobody decoding, a chunk delays only cancellations and newcomers; they may wait this many stall bounds.
_QUIET_FACTOR = 4.0
# Beside decoding, the step that completes a prompt also keeps its prefix and merges its cache with the others': the
# chunk leaves an eighth of its time to that.
_BESIDE_DECODING = 7 / 8
# Shortest first would starve a long prompt under a stream of short ones: so many chunks in a row may pass the oldest.
_MOST_PASSED_OVER = 3
# Prompts share a forward if the longest has at most this many times the tokens of the shortest: padding costs too.
_GROUP_SPREAD = 2
# Weight of the newest measurement in the running estimate of prefill speed.
_SMOOTHING = 0.3
# So many decode steps a chunk may take in any case.
_WORTH_STEPS = 1.25


@dataclass(slots=True)
class Prefill:
    """One prompt. ``cache`` covers ``done`` tokens; ``target`` leaves the last token to the first decode step."""

    sequences: list[Sequence]
    tokens: list[int]
    cache: Caches
    done: int = 0
    # Positions at which the cache should be kept for others, ascending.
    boundaries: list[int] = field(default_factory=list)
    scores: PromptScores | None = None

    @property
    def target(self) -> int:
        """Tokens to process before the prompt can decode."""
        return len(self.tokens) - 1

    @property
    def remaining(self) -> int:
        """Tokens still to process."""
        return self.target - self.done

    @property
    def may_share(self) -> bool:
        """True if it may be completed in one forward with others: work is left, and no logits are wanted."""
        return self.remaining > 0 and self.scores is None


class ChunkPolicy:
    """Bounds the time one chunk may take. Pure but for what it is told.

    Beside decoding a chunk may take the stall bound, or a quarter more than a decode step if that is longer: a forward
    that reads a large model's weights takes as long as a step however few tokens it has, so smaller chunks would only
    add work, and the quarter lets chunks grow until their tokens count.
    """

    def __init__(self, largest_tokens: int, stall_bound_seconds: float) -> None:
        self._largest = largest_tokens
        self._bound = stall_bound_seconds
        self._step_seconds: float | None = None
        self._seconds_per_token: float | None = None
        self._most_observed = 0
        self._allowed = _TELLING_TOKENS

    def tokens(self, *, decoding: bool) -> int:
        """Tokens to prefill before the next decode step, across prompts; at least 1."""
        self._allowed = min(self._largest, _TELLING_TOKENS)
        if self._seconds_per_token is not None:
            fitting = self._bound * (1 if decoding else _QUIET_FACTOR) / self._seconds_per_token
            worth = ceil(_WORTH_STEPS * (self._step_seconds or 0.0) / self._seconds_per_token)
            largest = self._largest * _BESIDE_DECODING if decoding else self._largest
            self._allowed = max(1, int(min(largest, max(fitting, worth))))
        return self._allowed

    def observe(self, tokens: int, seconds: float) -> None:
        """Learn from a chunk. Ends of prompts tell little, unless whole chunks are as small."""
        if tokens < min(_TELLING_TOKENS, self._allowed) or seconds <= 0:
            return
        measured = seconds / tokens
        old = self._seconds_per_token
        # Twice the tokens of all before tell more than all before: less of it is what any forward costs.
        news = 1.0 if old is None or tokens >= 2 * self._most_observed else _SMOOTHING
        self._most_observed = max(self._most_observed, tokens)
        self._seconds_per_token = measured if old is None else old + news * (measured - old)

    def observe_decode(self, seconds: float) -> None:
        """Learn from a decode step that no chunk was beside."""
        old = self._step_seconds
        self._step_seconds = seconds if old is None else old + _SMOOTHING * (seconds - old)


class PrefillQueue:
    """Prompts being processed, each on its own plain cache, which is exact for every architecture.

    Short prompts of models with plain KV caches share a forward: one forward costs little more for eight than for one.
    mlx-lm 0.31 pads recurrent layers wrongly (its issue 1736), so those never do.
    """

    def __init__(
        self,
        model: Any,
        policy: ChunkPolicy,
        on_boundary: Callable[[Prefill], None],
        clock: Callable[[], float] = time.perf_counter,
        *,
        in_groups: bool = False,
        most_scored: int = 1,
    ) -> None:
        """``in_groups``: all layers are plain KV caches, so that short prompts may share a forward.

        ``most_scored`` tokens of a prompt may be scored at a time.
        """
        self._model = model
        self._policy = policy
        self._on_boundary = on_boundary
        self._clock = clock
        self._in_groups = in_groups
        self._most_scored = most_scored
        self._passed_over = 0
        self._waiting: list[Prefill] = []

    def __len__(self) -> int:
        return sum(len(prefill.sequences) for prefill in self._waiting)

    @property
    def sequences(self) -> list[Sequence]:
        """All choices of all prompts under way."""
        return [sequence for prefill in self._waiting for sequence in prefill.sequences]

    def add(self, prefill: Prefill) -> None:
        """Take a prompt in; the oldest comes first where age decides."""
        self._waiting.append(prefill)

    def drop(self, request_id: int) -> list[Sequence]:
        """Remove and return the sequences of one request."""
        gone = [prefill for prefill in self._waiting if prefill.sequences[0].request.id == request_id]
        self._waiting = [prefill for prefill in self._waiting if prefill not in gone]
        return [sequence for prefill in gone for sequence in prefill.sequences]

    def longest_shared(self, tokens: list[int], boundaries: tuple[int, ...], exact_only: bool) -> int:
        """Tokens of the longest beginning that a prompt under way will leave for others to share with ``tokens``.

        ``exact_only``: caches can be kept at boundaries alone, so only boundaries both prompts have count.
        """
        best = 0
        for prefill in self._waiting:
            shared = _common(prefill.tokens[: prefill.target], tokens)
            if exact_only:
                shared = max((at for at in prefill.boundaries if at <= shared and at in boundaries), default=0)
            best = max(best, shared)
        return best

    def step(self, *, decoding: bool) -> list[Prefill]:
        """Process at most one chunk's worth of tokens; the prompts that are now complete, in order.

        1 The oldest goes first once it has been passed over often enough. 2 Prompts that fit into the chunk whole are
        completed, shortest first. 3 Only if none was is the chunk given to one that does not fit: whoever is complete
        should start at once.
        """
        budget = self._policy.tokens(decoding=decoding)
        complete: list[Prefill] = []
        oldest = self._waiting[0] if self._waiting else None
        had = oldest.done if oldest is not None else 0
        if oldest is not None and self._passed_over >= _MOST_PASSED_OVER:
            budget -= self._advance(oldest, budget)
            complete += self._leave([oldest])
        if short := self._fitting(budget):
            budget -= self._finish(short)
            complete += self._leave(short)
        while self._waiting and budget > 0 and not complete:
            prefill = min(self._waiting, key=lambda waiting: waiting.remaining)
            budget -= self._advance(prefill, budget)
            complete += self._leave([prefill])
        passed_over = oldest is not None and oldest.done == had and oldest not in complete
        self._passed_over = self._passed_over + 1 if passed_over else 0
        return complete

    def _leave(self, prefills: list[Prefill]) -> list[Prefill]:
        """Take those that are complete out of the queue."""
        complete = [prefill for prefill in prefills if prefill.remaining == 0]
        self._waiting = [prefill for prefill in self._waiting if prefill not in complete]
        return complete

    def _fitting(self, budget: int) -> list[Prefill]:
        """The prompts that can be completed within ``budget`` tokens together, shortest first."""
        fitting: list[Prefill] = []
        for prefill in sorted(self._waiting, key=lambda waiting: waiting.remaining):
            budget -= max(prefill.remaining, 1)
            if budget < 0:
                break
            fitting.append(prefill)
        return fitting

    def _finish(self, prefills: list[Prefill]) -> int:
        """Complete these prompts, several in one forward where the model allows it; the tokens it cost."""
        cost = 0
        while prefills:
            group = prefills[:1]
            if self._in_groups and prefills[0].may_share:
                longest = _GROUP_SPREAD * prefills[0].remaining
                group = [prefill for prefill in prefills if prefill.may_share and prefill.remaining <= longest]
            prefills = [prefill for prefill in prefills if prefill not in group]
            if len(group) > 1:
                cost += self._advance_group(group)
            while group[0].remaining:
                cost += self._advance(group[0], group[0].remaining)
        return cost

    def _advance_group(self, group: list[Prefill]) -> int:
        """Complete several prompts in one forward over their joint, padded cache; plain caches only."""
        lengths = [prefill.remaining for prefill in group]
        longest = max(lengths)
        padding = [longest - length for length in lengths]
        pieces = [prefill.tokens[prefill.done : prefill.target] for prefill in group]
        started = self._clock()
        joint = [KVCache.merge(list(layers)) for layers in zip(*(prefill.cache for prefill in group), strict=True)]
        if max(padding):
            for layer in joint:
                layer.prepare(lengths=lengths, right_padding=padding)
        self._model(mx.array([piece + [0] * pad for piece, pad in zip(pieces, padding, strict=True)]), cache=joint)
        for layer in joint:
            layer.finalize()
        mx.eval([layer.state for layer in joint])
        self._policy.observe(len(group) * longest, self._clock() - started)
        for at, prefill in enumerate(group):
            prefill.cache = [row_of(layer, at) for layer in joint]
            prefill.done = prefill.target
        return len(group) * longest

    def _advance(self, prefill: Prefill, budget: int) -> int:
        """Run one piece of a prompt, up to its next boundary; the tokens it cost (at least 1, so that steps end)."""
        end = min(prefill.target, prefill.done + budget)
        while prefill.boundaries and prefill.boundaries[0] <= prefill.done:
            prefill.boundaries.pop(0)
        if prefill.boundaries:
            end = min(end, prefill.boundaries[0])
        if prefill.scores is not None:
            end = min(end, prefill.done + self._most_scored)
        count = end - prefill.done
        if count > 0:
            started = self._clock()
            piece = mx.array(prefill.tokens[prefill.done : end])[None]
            logits = self._model(piece, cache=prefill.cache)
            if prefill.scores is not None:
                prefill.scores.add(logits[0])
            mx.eval([layer.state for layer in prefill.cache])
            self._policy.observe(count, self._clock() - started)
            prefill.done = end
            if prefill.boundaries and prefill.boundaries[0] == end:
                self._on_boundary(prefill)
        return max(count, 1)


def _common(first: list[int], second: list[int]) -> int:
    """Length of the common beginning."""
    size = min(len(first), len(second))
    if first[:size] == second[:size]:
        return size
    return next(at for at in range(size) if first[at] != second[at])
