"""One scheduler over a tiny model, driven step by step, and its answers as one list of tokens each.

The driver holds the scheduler to its protocol at every step: a request starts before its deltas, nothing follows its
end, the batch never passes its limit.
"""

import random
from collections.abc import Callable
from collections.abc import Sequence as ListOf
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from opta_lmx.inference.worker.backend import Prepared, StepResult
from opta_lmx.inference.worker.batch import Caches, DecodeBatch
from opta_lmx.inference.worker.decoder import PrefixCache
from opta_lmx.inference.worker.detokenizer import TokenTable
from opta_lmx.inference.worker.geometry import CacheGeometry
from opta_lmx.inference.worker.kv_books import KvBooks
from opta_lmx.inference.worker.prefix_snapshots import PrefixSnapshots
from opta_lmx.inference.worker.prefix_tree import PrefixTree
from opta_lmx.inference.worker.processors import processors_for
from opta_lmx.inference.worker.prompt_scores import PromptScores
from opta_lmx.inference.worker.sampler_rows import LogitsProcessor
from opta_lmx.inference.worker.sampling import DeviceLaunch, HostLaunch
from opta_lmx.inference.worker.scheduler import LmxScheduler
from opta_lmx.inference.worker.sequence import Sequence
from opta_lmx.types import CacheReport, FinishReason, LoadOptions, SamplingParams, TokenLogprob
from tests.tiny_models import Family

FAMILIES: tuple[Family, ...] = ("llama", "qwen3", "gemma3_text", "qwen3_next", "mamba2")

# Far above what any test needs; a scheduler that never ends fails here and not at the clock.
_STEP_BOUND = 5000


class WatchedModel:
    """A model that records the shape of every input, and can be told to fail as MLX does when memory runs out."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.shapes: list[tuple[int, int]] = []
        self.fail_in: int | None = None

    def __call__(self, inputs: mx.array, cache: Any) -> Any:
        if self.fail_in is not None:
            self.fail_in -= 1
            if self.fail_in < 0:
                self.fail_in = None
                raise RuntimeError("[metal::malloc] out of memory")
        self.shapes.append((inputs.shape[0], inputs.shape[1]))
        return self._model(inputs, cache=cache)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @property
    def computed(self) -> int:
        """Tokens fed since ``shapes`` was last cleared, of prompts and answers alike."""
        return sum(rows * length for rows, length in self.shapes)


@dataclass(frozen=True, slots=True)
class TinyModel:
    """A loaded model and what the engine needs to know of it."""

    family: Family
    model: WatchedModel
    tokenizer: Any
    table: TokenTable
    stop_ids: frozenset[int]
    shape: CacheGeometry
    heard: dict[Any, Any] = field(default_factory=dict)

    def prompt(self, length: int, seed: int = 0) -> list[int]:
        """Random tokens, none of them special; another seed gives other ones."""
        rng = random.Random(seed * 10_000 + length)
        return [rng.randrange(3, self.shape.vocab_size) for _ in range(length)]

    def new_prefix_cache(self, budget_bytes: int = 1 << 28) -> PrefixCache:
        """The kind of prefix cache a worker would give this family."""
        return PrefixTree(budget_bytes) if self.shape.plain else PrefixSnapshots(budget_bytes)


@dataclass(slots=True)
class Answer:
    """One choice as it came in: ``tokens`` is the sequence's own list."""

    tokens: list[int]
    text: str = ""
    counted: int = 0
    finish: FinishReason | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def said(self) -> tuple[list[int], str, FinishReason | None]:
        """What two runs of the same request must agree on."""
        return self.tokens, self.text, self.finish


class Engine:
    """A scheduler and everything it said.

    ``launch`` chooses how the batch samples, None leaves that to the engine; ``on_end`` is then the batch's.
    """

    def __init__(
        self,
        tiny: TinyModel,
        options: LoadOptions | None = None,
        *,
        prefixes: PrefixCache | None = None,
        launch: type[HostLaunch] | type[DeviceLaunch] | None = None,
        on_end: Callable[[Sequence, int, Caches], None] | None = None,
        books: KvBooks | None = None,
    ) -> None:
        self.tiny = tiny
        self.options = options or LoadOptions()
        self.prefixes = prefixes
        self.scheduler = LmxScheduler(tiny.model, tiny.tokenizer, self.options, books=books, prefixes=prefixes)
        if launch is not None:
            assert prefixes is None  # the batch replaced here would keep no answers
            self.scheduler.batch_generator.batch = DecodeBatch(tiny.model, launch, on_end)
        self.answers: dict[tuple[int, int], Answer] = {}
        self.started: dict[int, CacheReport] = {}
        self.failed: dict[int, str] = {}
        self.refused: dict[int, str] = {}
        self.wanted: list[int] = []

    def ask(
        self,
        id: int,
        tokens: ListOf[int],
        *,
        boundaries: ListOf[int] = (),
        processors: ListOf[LogitsProcessor] = (),
        **sampling: Any,
    ) -> None:
        """Submit a request: greedy and 16 tokens unless said otherwise. ``processors`` join choice 0's own."""
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": 16, **sampling})
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.tiny.stop_ids)
        assert params.max_tokens is not None
        request = Prepared(id, str(id), list(tokens), params.max_tokens, params, None, tuple(boundaries))
        scores = None
        if params.prompt_logprobs is not None:
            scores = PromptScores(self.tiny.table, list(tokens), params.prompt_logprobs)
        sequences = []
        for choice in range(params.n):
            own = [*processors_for(params, tokens, stop_ids), *(processors if choice == 0 else ())]
            sequences.append(Sequence(request, choice, self.tiny.table, stop_ids, own, scores))
            self.answers[id, choice] = Answer(sequences[-1].tokens)
        self.scheduler.submit(request, sequences)

    def cancel(self, id: int) -> None:
        """Let a request leave at the next step."""
        self.scheduler.cancel(id)

    def step(self) -> StepResult:
        """One step, recorded and checked against the protocol."""
        result = self.scheduler.step()
        for started in result.started:
            assert started.id not in self.started
            self.started[started.id] = started.cache
        for failed in result.failed:
            assert failed.id not in self.failed
            assert self._open(failed.id)
            self.failed[failed.id] = failed.message
        for refused in result.refused:
            assert refused.id not in self.started
            self.refused[refused.id] = refused.kind
        for id, delta in result.deltas:
            answer = self.answers[id, delta.choice]
            assert answer.finish is None
            assert id not in self.failed
            assert id in self.started or delta.finish is FinishReason.CANCELLED
            answer.text += delta.text
            answer.counted += delta.token_count
            answer.finish = delta.finish
            answer.logprobs += delta.logprobs or []
        if result.wants_kv_bytes is not None:
            self.wanted.append(result.wants_kv_bytes)
        running, _ = self.scheduler.depths()
        widest = max((len(request.sequences) for request in self.scheduler.running.values()), default=0)
        assert running <= max(self.options.max_running, widest)
        if self.prefixes is not None:
            self.prefixes.check()
        return result

    def run(self) -> "Engine":
        """Step until nothing is left to do."""
        for _ in range(_STEP_BOUND):
            if not self.scheduler.has_requests():
                return self
            self.step()
        raise AssertionError("the scheduler says for ever that it has work")

    def steps(self, count: int) -> None:
        """Step ``count`` times while there is work."""
        for _ in range(count):
            if self.scheduler.has_requests():
                self.step()

    def said(self, id: int, choice: int = 0) -> tuple[list[int], str, FinishReason | None]:
        """Tokens, text and finish of one choice."""
        answer = self.answers[id, choice]
        ended_well = answer.finish not in (None, FinishReason.CANCELLED)
        assert not ended_well or answer.counted == len(answer.tokens)
        return answer.said

    @property
    def generated(self) -> int:
        """Tokens of all answers together: each was made by one row of one forward."""
        return sum(len(answer.tokens) for answer in self.answers.values())

    def assert_empty(self) -> None:
        """No sequence, no cache and no entry in any book is left."""
        scheduler, decoder = self.scheduler, self.scheduler.batch_generator
        assert not scheduler.has_requests()
        assert scheduler.depths() == (0, 0)
        assert (len(decoder), decoder.batch.cache_bytes) == (0, 0)
        assert not decoder.batch.all_sequences + decoder.prefills.sequences
        books = (scheduler.requests, scheduler.running, scheduler.waiting)
        assert [len(book) for book in books] == [0, 0, 0]
        assert (scheduler.request_id_to_uid, scheduler.uid_to_request_id) == ({}, {})

    def _open(self, id: int) -> bool:
        return any(answer.finish is None for (other, _), answer in self.answers.items() if other == id)


def alone(
    tiny: TinyModel,
    tokens: ListOf[int],
    launch: type[HostLaunch] | type[DeviceLaunch] | None = None,
    **sampling: Any,
) -> tuple[list[int], str, FinishReason | None]:
    """What a request says with an engine of its own, without a prefix cache; heard once a session."""
    key = (tuple(tokens), launch, repr(sorted(sampling.items())))
    if key not in tiny.heard:
        engine = Engine(tiny, launch=launch)
        engine.ask(0, tokens, **sampling)
        tiny.heard[key] = engine.run().said(0)
    said: tuple[list[int], str, FinishReason | None] = tiny.heard[key]
    return said
