"""vllm-mlx's scheduler with the parts that are wrong or slow for a server replaced, here and nowhere else.

Kept from vllm-mlx 0.6.0: the request life cycle (``add_request``, deferred aborts, the waiting and running books).
Replaced, and why (the numbers are measurements of that version):

``_ensure_batch_generator``  one sampler for the whole batch, rebuilt when parameters change: requests got each other's
``_create_batch_generator``  mlx-lm's BatchGenerator: row-by-row sampling, deep copies of prompt caches
``_schedule_waiting``        ignores stop tokens, seeds and groups; fetches the prefix cache before the request's turn
``_process_batch_responses`` a detokenizer whose cost grows with the line (over half of the step)
``step``                     one bad request ended all of them, and some failures left a caller waiting for ever
"""

import logging
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from vllm_mlx.request import Request, RequestStatus
from vllm_mlx.request import SamplingParams as VllmSamplingParams
from vllm_mlx.scheduler import Scheduler, SchedulerConfig

from opta_lmx.inference.protocol import Failed, Started
from opta_lmx.inference.worker.backend import Prepared, StepResult
from opta_lmx.inference.worker.batch import Caches, DecodeBatch
from opta_lmx.inference.worker.prefill import ChunkPolicy, Prefill, PrefillQueue
from opta_lmx.inference.worker.prefix_snapshots import PrefixSnapshots
from opta_lmx.inference.worker.prefix_tree import PrefixTree
from opta_lmx.inference.worker.sampling import DeviceLaunch, HostLaunch
from opta_lmx.inference.worker.sequence import Sequence
from opta_lmx.types import CacheReport, Delta, FinishReason, LoadOptions

# vllm-mlx writes a line for every request and every abort; ours go through the server's log.
logging.getLogger("vllm_mlx").setLevel(logging.WARNING)


class EngineRequest(Request):  # type: ignore[misc]
    """vllm-mlx's request with our choices; it lives in the scheduler's books under ``str(prepared.id)``."""

    def __init__(self, prepared: Prepared, sequences: list[Sequence]) -> None:
        super().__init__(
            request_id=str(prepared.id),
            prompt=prepared.token_ids,
            sampling_params=VllmSamplingParams(max_tokens=prepared.max_tokens, temperature=0.0),
        )
        self.prepared = prepared
        self.sequences = sequences

    @property
    def open_sequences(self) -> list[Sequence]:
        """The choices that have not ended."""
        return [sequence for sequence in self.sequences if sequence.finish is None]


PrefixCache = PrefixTree | PrefixSnapshots

# A prompt waits for another that is being processed if that spares it at least this many tokens of prefill.
_WORTH_WAITING_TOKENS = 64


class BatchDecoder:
    """What the scheduler drives in place of mlx-lm's BatchGenerator: prompts in chunks, then one joint batch."""

    def __init__(self, model: Any, options: LoadOptions, prefixes: PrefixCache | None) -> None:
        on_gpu = mx.default_device() == mx.Device(mx.gpu)
        on_end = self._keep_answer if prefixes is not None else None
        self.batch = DecodeBatch(model, DeviceLaunch if on_gpu else HostLaunch, on_end)
        policy = ChunkPolicy(options.prefill_chunk_tokens, options.stall_bound_seconds)
        self.prefills = PrefillQueue(model, policy, self._keep_prompt)
        self._model = model
        self._prefixes = prefixes

    def __len__(self) -> int:
        return len(self.batch) + len(self.prefills)

    def insert(self, request: EngineRequest) -> CacheReport:
        """Take a request in, with what the prefix cache has of its prompt."""
        prepared = request.prepared
        known, report = None, CacheReport()
        if self._prefixes is not None:
            known, report = self._prefixes.fetch(prepared.token_ids[:-1])
        cache = known if known is not None else make_prompt_cache(self._model)
        exact = self._prefixes is not None and self._prefixes.exact_positions_only
        boundaries = list(prepared.boundaries) if exact else []
        self.prefills.add(
            Prefill(request.sequences, prepared.token_ids, cache, done=report.hit_tokens, boundaries=boundaries)
        )
        return report

    def should_wait(self, prepared: Prepared) -> bool:
        """True if a prompt under way will soon leave in the prefix cache what this one would compute again."""
        if self._prefixes is None:
            return False
        tokens = prepared.token_ids[:-1]
        shared = self.prefills.longest_shared(tokens, prepared.boundaries, self._prefixes.exact_positions_only)
        return shared >= _WORTH_WAITING_TOKENS and shared - self._prefixes.known(tokens) >= _WORTH_WAITING_TOKENS

    def remove(self, uids: list[int]) -> None:
        """Forget requests wherever they are; vllm-mlx calls this when it aborts."""
        for uid in uids:
            self.prefills.drop(uid)
            self.batch.drop(uid)

    def close(self) -> None:
        """Nothing is held beyond the caches, which go with the object."""

    def next(self) -> list[Sequence]:
        """One chunk of prefill, then one decode step; the sequences that made a token."""
        for prefill in self.prefills.step(decoding=len(self.batch) > 0):
            if self._prefixes is not None and not self._prefixes.exact_positions_only:
                self._keep_prompt(prefill)
            for sequence in prefill.sequences:
                self.batch.join(sequence, prefill.cache, prefill.tokens[-1])
        self.batch.launch()
        stepped = self.batch.step()
        self.batch.launch()
        return [sequence for sequence, _ in stepped]

    def _keep_prompt(self, prefill: Prefill) -> None:
        if self._prefixes is not None and prefill.done:
            self._prefixes.store(prefill.tokens[: prefill.done], prefill.cache)

    def _keep_answer(self, sequence: Sequence, fed: int, caches: Caches) -> None:
        if self._prefixes is not None and sequence.choice == 0:
            self._prefixes.store(sequence.request.token_ids + sequence.tokens[:fed], caches)


class LmxScheduler(Scheduler):  # type: ignore[misc]
    """One model's requests. All methods run on the thread that loaded the model."""

    def __init__(self, model: Any, tokenizer: Any, options: LoadOptions, prefixes: PrefixCache | None = None) -> None:
        super().__init__(model, tokenizer, SchedulerConfig(enable_prefix_cache=False, prefill_batch_size=1))
        self._options = options
        self._prefixes = prefixes
        self._cancelled: list[tuple[int, Delta]] = []
        self.batch_generator: BatchDecoder | None = None

    def submit(self, prepared: Prepared, sequences: list[Sequence]) -> None:
        """Put a request in line."""
        self.add_request(EngineRequest(prepared, sequences))

    def cancel(self, id: int) -> None:
        """Let a request leave at the next step."""
        self._pending_abort_ids.add(str(id))

    def depths(self) -> tuple[int, int]:
        """Sequences being worked on, and requests in line."""
        return (len(self.batch_generator) if self.batch_generator is not None else 0), len(self.waiting)

    def step(self) -> StepResult:
        """Aborts, admissions, one chunk, one token for everybody.

        An MLX failure (it raises RuntimeError only; out of memory above all) ends every running request, since the
        joint cache is lost with it, and leaves the scheduler able to serve the next one.
        """
        self._process_pending_aborts()
        deltas, self._cancelled = self._cancelled, []
        started = self._schedule_waiting()
        try:
            stepped = self.batch_generator.next() if self.batch_generator is not None else []
        except RuntimeError as error:
            return StepResult(started, deltas, self._fail_running(str(error)))
        failed = self._fail_broken(stepped)
        deltas += self._process_batch_responses([one for one in stepped if str(one.request.id) in self.requests])
        return StepResult(started, deltas, failed)

    def has_requests(self) -> bool:
        """True while a step would do something, a pending abort included."""
        return bool(self.waiting or self.running or self._pending_abort_ids)

    def _schedule_waiting(self) -> list[Started]:
        """First come, first served, but for prompts that gain by waiting for another's prefix."""
        started: list[Started] = []
        if self.batch_generator is None:
            self.batch_generator = BatchDecoder(self.model, self._options, self._prefixes)
        decoder = self.batch_generator
        for request in list(self.waiting):
            busy = len(decoder)
            if busy and busy + len(request.sequences) > self._options.max_running:
                break
            if decoder.should_wait(request.prepared):
                continue
            self.waiting.remove(request)
            id = request.prepared.id
            report = decoder.insert(request)
            self.request_id_to_uid[request.request_id] = id
            self.uid_to_request_id[id] = request.request_id
            request.status = RequestStatus.RUNNING
            self.running[request.request_id] = request
            started.append(Started(id, len(request.prepared.token_ids), report))
        return started

    def _process_batch_responses(self, stepped: list[Sequence]) -> list[tuple[int, Delta]]:
        deltas = [(sequence.request.id, sequence.delta()) for sequence in stepped]
        for id in {sequence.request.id for sequence in stepped if sequence.finish is not None}:
            self._retire(str(id))
        return deltas

    def _retire(self, request_id: str) -> None:
        """Take a request out of the books once all its choices have ended."""
        request: EngineRequest = self.requests[request_id]
        if request.open_sequences:
            return
        del self.requests[request_id], self.running[request_id]
        del self.uid_to_request_id[self.request_id_to_uid.pop(request_id)]
        self.num_requests_processed += 1

    def _do_abort_request(self, request_id: str) -> bool:
        request: EngineRequest | None = self.requests.get(request_id)
        if request is None:  # it ended before the cancellation arrived
            return False
        super()._do_abort_request(request_id)
        del self.requests[request_id]
        for sequence in request.open_sequences:
            sequence.finish = FinishReason.CANCELLED
            self._cancelled.append((request.prepared.id, Delta(sequence.choice, "", 0, FinishReason.CANCELLED)))
        return True

    def _fail_broken(self, stepped: list[Sequence]) -> list[Failed]:
        """End the requests of which a sequence could not go on; their neighbours do not notice."""
        broken = {sequence.request.id: sequence.error for sequence in stepped if sequence.error is not None}
        for id in broken:
            super()._do_abort_request(str(id))
            del self.requests[str(id)]
        return [Failed(id, reason) for id, reason in broken.items()]

    def _fail_running(self, reason: str) -> list[Failed]:
        failed = [Failed(request.prepared.id, reason) for request in self.running.values()]
        for request_id in list(self.running):
            del self.requests[request_id]
        self.running.clear()
        self.uid_to_request_id.clear()
        self.request_id_to_uid.clear()
        self.batch_generator = None
        mx.clear_cache()
        return failed
