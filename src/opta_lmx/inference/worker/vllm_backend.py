"""The MLX backend: vllm-mlx's loader and our scheduler over vllm-mlx's, behind the Backend protocol."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from llguidance import LLMatcher
from mlx.utils import tree_flatten
from vllm_mlx.utils.tokenizer import collect_eos_token_ids, load_model_with_fallback

from opta_lmx.errors import InvalidRequest, LoadFailed
from opta_lmx.inference.output.formats import detect_reasoning_format, detect_tool_format, markers
from opta_lmx.inference.protocol import Generate, Load
from opta_lmx.inference.worker import geometry
from opta_lmx.inference.worker.backend import Prepared, StepResult
from opta_lmx.inference.worker.decoder import PrefixCache
from opta_lmx.inference.worker.detokenizer import TokenTable
from opta_lmx.inference.worker.kv_books import KvBooks
from opta_lmx.inference.worker.limits import MemoryLimits
from opta_lmx.inference.worker.load_errors import named_load_errors
from opta_lmx.inference.worker.marks import Marks
from opta_lmx.inference.worker.prefix_snapshots import PrefixSnapshots
from opta_lmx.inference.worker.prefix_tree import PrefixTree
from opta_lmx.inference.worker.processors import processors_for
from opta_lmx.inference.worker.prompt_scores import PromptScores
from opta_lmx.inference.worker.prompts import PromptReader
from opta_lmx.inference.worker.scheduler import LmxScheduler
from opta_lmx.inference.worker.sequence import Sequence
from opta_lmx.inference.worker.structured import Grammar, GrammarCompiler
from opta_lmx.types import LoadOptions, ModelFacts, Structured

# For architectures whose config names no limit (state-space models have none of their own).
_UNBOUNDED_CONTEXT_TOKENS = 32_768

_CONTEXT_KEYS = ("max_position_embeddings", "max_sequence_length", "max_seq_len", "n_positions", "seq_length", "n_ctx")


@dataclass(frozen=True, slots=True)
class Speech:
    """What tokens and marks mean under one pair of formats."""

    table: TokenTable
    marks: Marks


class VllmBackend:
    """One model loaded by vllm-mlx and the scheduler that runs it."""

    def load(self, frame: Load) -> ModelFacts:
        """Load weights and tokenizer; raises LoadFailed with what is wrong with the files."""
        directory = Path(frame.path)
        self._limits = MemoryLimits(frame.options)
        with named_load_errors(frame.model_id):
            config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
            _refuse_code(frame.model_id, config)
            model, wrapped = load_model_with_fallback(
                str(directory), {"trust_remote_code": False}, model_id=frame.model_id
            )
            shape = geometry.measure(model, frame.options.kv_bits)
        tokenizer = getattr(wrapped, "_tokenizer", wrapped)
        context = _context_length(config, frame.options)
        template = _template_text(tokenizer)
        self._tokenizer = tokenizer
        self._speeches: dict[tuple[str | None, str | None], Speech] = {}
        self._stop_ids = frozenset(collect_eos_token_ids(tokenizer, str(directory)))
        self._reader = PromptReader(tokenizer, shape.vocab_size)
        self._grammars = GrammarCompiler(tokenizer, shape.vocab_size, self._stop_ids)
        self._prefixes = _prefix_cache(shape, frame.options.prefix_cache_bytes)
        self._wants_boundaries = self._prefixes is not None and self._prefixes.exact_positions_only
        self._books = KvBooks(shape, frame.options.kv_bytes)
        self._scheduler = LmxScheduler(model, wrapped, frame.options, self._books, self._prefixes)
        self._facts = ModelFacts(
            model_type=str(config.get("model_type", "unknown")),
            context_length=context,
            vocab_size=shape.vocab_size,
            weights_bytes=_parameter_bytes(model),
            kv_bytes_per_token=shape.bytes_for(2) - shape.bytes_for(1),
            has_chat_template=bool(tokenizer.chat_template),
            prefix_cache="off" if self._prefixes is None else "tokens" if shape.plain else "snapshots",
            tool_format=detect_tool_format(template),
            reasoning_format=detect_reasoning_format(template),
        ).as_wanted(frame.options.tool_format, frame.options.reasoning_format)
        self._speech(self._facts)
        return self._facts

    def _speech(self, facts: ModelFacts) -> Speech:
        """Made once for each pair of formats that is asked for; presets may ask for others than the model's."""
        formats = (facts.tool_format, facts.reasoning_format)
        if formats not in self._speeches:
            table = TokenTable(self._tokenizer, keep=markers(*formats))
            self._speeches[formats] = Speech(table, Marks(self._tokenizer, table, *formats))
        return self._speeches[formats]

    def prepare(self, frame: Generate) -> Prepared:
        """Render, tokenise and check a request; raises RequestRejected naming the field."""
        sampling = frame.sampling
        for token in [*sampling.logit_bias, *sampling.stop_token_ids]:
            if not 0 <= token < self._facts.vocab_size:
                raise InvalidRequest(
                    f"Invalid token id {token}: this model's ids go from 0 to {self._facts.vocab_size - 1}.",
                    param="logit_bias" if token in sampling.logit_bias else "stop_token_ids",
                    code="invalid_value",
                )
        context = min(self._facts.context_length, frame.context_length or self._facts.context_length)
        speech = self._speech(self._facts.as_wanted(frame.tool_format, frame.reasoning_format))
        opening = speech.marks.answer_opening if frame.structured is not None else ()
        token_ids = self._reader.read(frame.prompt, context, opening)
        in_reasoning = speech.marks.in_reasoning(token_ids)
        boundaries = self._reader.boundaries(frame.prompt, token_ids) if self._wants_boundaries else ()
        compile_grammar = None
        if frame.structured is not None:
            compile_grammar = partial(self._compile, frame.structured, speech.marks, token_ids)
        room = context - len(token_ids)
        wanted = room if sampling.max_tokens is None else sampling.max_tokens
        return Prepared(
            frame.id,
            frame.request_id,
            token_ids,
            min(wanted, room),
            sampling,
            boundaries=boundaries,
            in_reasoning=in_reasoning,
            speech=speech,
            compile_grammar=compile_grammar,
        )

    def _compile(self, wanted: Structured, marks: Marks, token_ids: list[int]) -> Callable[[], Grammar]:
        """Called before the request takes a place, so that a schema that cannot be used is refused in time."""
        return partial(_new_grammar, self._grammars.compile(wanted), marks, token_ids, wanted.or_call)

    def add(self, request: Prepared) -> None:
        """Put a request in line for the batch."""
        sampling = request.sampling
        stop_ids = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self._stop_ids)
        scores = None
        if sampling.prompt_logprobs is not None:
            scores = PromptScores(request.speech.table, request.token_ids, sampling.prompt_logprobs)
        sequences = []
        for choice in range(sampling.n):
            processors = processors_for(sampling, request.token_ids, stop_ids)
            if request.grammar is not None:
                processors.insert(0, request.grammar())
            if sampling.thinking_budget is not None:
                budget = request.speech.marks.budget(sampling.thinking_budget, in_reasoning=request.in_reasoning)
                processors += [budget] if budget is not None else []
            sequences.append(Sequence(request, choice, request.speech.table, stop_ids, processors, scores))
        self._scheduler.submit(request, sequences)

    def cancel(self, id: int) -> None:
        """Let a request leave at the next step."""
        self._scheduler.cancel(id)

    def grant_kv(self, granted_bytes: int) -> None:
        """The server's answer to a wish for more KV memory."""
        self._scheduler.grant_kv(granted_bytes)

    def has_work(self) -> bool:
        """True while a step would do something."""
        return self._scheduler.has_requests()

    def step(self) -> StepResult:
        """Admit, prefill and decode once for everybody."""
        self._limits.follow(self._books.granted_bytes)
        result = self._scheduler.step()
        self._limits.follow(self._books.granted_bytes)
        return result

    def running(self) -> tuple[int, int]:
        """Sequences in the batch and requests in line."""
        return self._scheduler.depths()

    def rest(self) -> None:
        """Give back the buffers MLX keeps for reuse."""
        mx.clear_cache()

    def memory(self) -> tuple[int, int]:
        """Bytes live in MLX, and bytes the prefix cache holds."""
        return mx.get_active_memory(), self._prefixes.nbytes if self._prefixes is not None else 0


def _new_grammar(matcher: LLMatcher, marks: Marks, token_ids: list[int], or_call: bool) -> Grammar:
    """One choice's own place in a grammar."""
    return Grammar(matcher.deep_copy(), marks.gate(token_ids, or_call=or_call))


def _prefix_cache(shape: geometry.CacheGeometry, budget_bytes: int) -> PrefixCache | None:
    """Token by token where every layer allows it, else whole snapshots; None without a budget."""
    if budget_bytes <= 0:
        return None
    return PrefixTree(budget_bytes) if shape.plain else PrefixSnapshots(budget_bytes)


def _template_text(tokenizer: Any) -> str:
    """The chat template, or all of them where there are several; empty without one."""
    template = tokenizer.chat_template or ""
    return template if isinstance(template, str) else "\n".join(template.values())


def _parameter_bytes(model: Any) -> int:
    named: list[tuple[str, Any]] = tree_flatten(model.parameters())  # type: ignore[assignment]  # no destination given
    return sum(array.nbytes for _, array in named)


def _refuse_code(model_id: str, config: dict[str, Any]) -> None:
    """mlx-lm would import and run the file ``model_file`` names, whatever trust_remote_code says."""
    if config.get("model_file") is not None:
        raise LoadFailed(model_id, "config.json names a model_file; code from a model directory is never run")


def _context_length(config: dict[str, Any], options: LoadOptions) -> int:
    """Tokens: the smaller of the model's own limit and the configured one."""
    places = (config, config.get("text_config") or {})
    limits = [place[key] for place in places for key in _CONTEXT_KEYS if isinstance(place.get(key), int)]
    own = limits[0] if limits else _UNBOUNDED_CONTEXT_TOKENS
    return min(own, options.context_length or own)
