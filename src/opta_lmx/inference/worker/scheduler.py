"""vllm-mlx's scheduler with the parts that are wrong or slow for a server replaced, here and nowhere else.

Kept from vllm-mlx 0.6.0: the request life cycle (``add_request``, deferred aborts, the waiting and running books).
Replaced, and why (the numbers are measurements of that version):

``batch_generator``          mlx-lm's BatchGenerator: one sampler for the whole batch (requests got each other's), work
                             row by row, deep copies of prompt caches; ours is ``decoder.BatchDecoder``
``_schedule_waiting``        ignores stop tokens, seeds, groups and memory; fetches prefixes before a request's turn
``_process_batch_responses`` a detokenizer whose cost grows with the line (over half of the step)
``step``                     one bad request ended all of them, and some failures left a caller waiting for ever
"""

import logging
from typing import Any

import mlx.core as mx
from vllm_mlx.request import Request, RequestStatus
from vllm_mlx.request import SamplingParams as VllmSamplingParams
from vllm_mlx.scheduler import Scheduler, SchedulerConfig

from opta_lmx.inference.protocol import Failed, Refused, Started
from opta_lmx.inference.worker.backend import Prepared, StepResult
from opta_lmx.inference.worker.decoder import BatchDecoder, Launch, PrefixCache, best_launch
from opta_lmx.inference.worker.geometry import measure
from opta_lmx.inference.worker.kv_books import KvBooks
from opta_lmx.inference.worker.sequence import Sequence
from opta_lmx.types import Delta, FinishReason, LoadOptions

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


class LmxScheduler(Scheduler):  # type: ignore[misc]
    """One model's requests. All methods run on the thread that loaded the model."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        options: LoadOptions,
        books: KvBooks | None = None,
        prefixes: PrefixCache | None = None,
        launch: Launch | None = None,
    ) -> None:
        """``books`` None means that KV memory has no bound but the machine's, ``launch`` None the device's best."""
        super().__init__(model, tokenizer, SchedulerConfig(enable_prefix_cache=False, prefill_batch_size=1))
        self._options = options
        self._prefixes = prefixes
        self._books = books or KvBooks(measure(model), None)
        self._launch = launch or best_launch()
        self._paused: list[Sequence] = []
        self._cancelled: list[tuple[int, Delta]] = []
        self.batch_generator = self._new_decoder()

    def submit(self, prepared: Prepared, sequences: list[Sequence]) -> None:
        """Put a request in line."""
        self.add_request(EngineRequest(prepared, sequences))

    def cancel(self, id: int) -> None:
        """Let a request leave at the next step."""
        self._pending_abort_ids.add(str(id))

    def grant_kv(self, granted_bytes: int) -> None:
        """What the server allows the caches to take."""
        self._books.grant(granted_bytes)

    def depths(self) -> tuple[int, int]:
        """Sequences being worked on, and requests in line or paused."""
        return len(self.batch_generator), len(self.waiting) + len(self._paused)

    def has_requests(self) -> bool:
        """True while a step would do something; not while all there is waits for the server's answer."""
        if self._pending_abort_ids or len(self.batch_generator):
            return True
        return bool(self.waiting or self._paused) and not self._books.waiting

    def step(self) -> StepResult:
        """Aborts, admissions, one chunk, one token for everybody.

        An MLX failure (it raises RuntimeError only; out of memory above all) ends every running request, since the
        joint cache is lost with it, and leaves the scheduler able to serve the next one.
        """
        self._process_pending_aborts()
        deltas, self._cancelled = self._cancelled, []
        started: list[Started] = []
        refused: list[Refused] = []
        try:
            self.batch_generator.keep_prompts()
            self._paused += self.batch_generator.make_room()
            self._resume_paused()
            started, refused = self._schedule_waiting()
            if self.waiting and len(self.batch_generator.prefills) and (question := self._books.question()) is not None:
                # The answer is here in a millisecond, and a chunk may take a hundred: whoever waits asks first.
                return StepResult(started, deltas, [], refused, question, asks_first=True)
            stepped = self.batch_generator.next()
        except RuntimeError as error:
            stepped, failed = [], self._fail_running(str(error))
        else:
            failed = self._fail_broken(stepped)
        deltas += self._process_batch_responses([one for one in stepped if str(one.request.id) in self.requests])
        if not self.requests:
            self._books.reset()
        return StepResult(started, deltas, failed, refused, self._books.question())

    def _new_decoder(self) -> BatchDecoder:
        return BatchDecoder(self.model, self._options, self._books, self._prefixes, self._launch)

    def _resume_paused(self) -> None:
        """Oldest first; alone, a sequence goes on whatever the grant: there is nobody left to wait for."""
        while self._paused:
            sequence = self._paused[-1]
            if len(self.batch_generator) and not self.batch_generator.fits(1, sequence.length):
                return
            self.batch_generator.resume(self._paused.pop())

    def _schedule_waiting(self) -> tuple[list[Started], list[Refused]]:
        """First come, first served, but for prompts that gain by waiting for another's prefix."""
        started: list[Started] = []
        refused: list[Refused] = []
        decoder = self.batch_generator
        for request in list(self.waiting):
            rows, busy = len(request.sequences), len(decoder)
            if self._paused or (busy and busy + rows > self._options.max_running):
                break
            if decoder.should_wait(request.prepared):
                continue
            if not decoder.fits(rows, len(request.prepared.token_ids), self._hoped()):
                if busy or self._books.waiting:
                    break
                refused.append(self._refuse(request))
                continue
            self.waiting.remove(request)
            started.append(self._begin(request))
        return started, refused

    def _hoped(self) -> tuple[int, int]:
        """Rows and longest prompt of the requests in line that there are places for."""
        rows, longest = 0, 0
        places = self._options.max_running - len(self.batch_generator)
        for request in self.waiting:
            if rows + len(request.sequences) > places:
                break
            rows += len(request.sequences)
            longest = max(longest, len(request.prepared.token_ids))
        return rows, longest

    def _begin(self, request: EngineRequest) -> Started:
        id, key = request.prepared.id, request.request_id
        report = self.batch_generator.insert(request.prepared, request.sequences)
        self.request_id_to_uid[key] = id
        self.uid_to_request_id[id] = key
        request.status = RequestStatus.RUNNING
        self.running[key] = request
        return Started(id, len(request.prepared.token_ids), report, request.prepared.in_reasoning)

    def _refuse(self, request: EngineRequest) -> Refused:
        """Nothing runs, the server has answered, and there is still no room for it."""
        self.waiting.remove(request)
        del self.requests[request.request_id]
        reason = "There is not enough free memory for this request's KV cache. Try again later."
        return Refused(request.prepared.id, "memory", reason)

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
        self._books.ask_again()

    def _do_abort_request(self, request_id: str) -> bool:
        request: EngineRequest | None = self.requests.get(request_id)
        if request is None:  # it ended before the cancellation arrived
            return False
        self._forget(request_id)
        for sequence in request.open_sequences:
            sequence.finish = FinishReason.CANCELLED
            self._cancelled.append((request.prepared.id, Delta(sequence.choice, "", 0, FinishReason.CANCELLED)))
        return True

    def _forget(self, request_id: str) -> None:
        """Take a request out of everything, wherever it is."""
        super()._do_abort_request(request_id)
        # vllm-mlx notes every abort here and clears the notes in the step we have replaced.
        self.finished_req_ids.discard(request_id)
        del self.requests[request_id]
        self._paused = [sequence for sequence in self._paused if str(sequence.request.id) != request_id]

    def _fail_broken(self, stepped: list[Sequence]) -> list[Failed]:
        """End the requests of which a sequence could not go on; their neighbours do not notice."""
        broken = {sequence.request.id: sequence.error for sequence in stepped if sequence.error is not None}
        for id in broken:
            self._forget(str(id))
        return [Failed(id, reason) for id, reason in broken.items()]

    def _fail_running(self, reason: str) -> list[Failed]:
        failed = [Failed(request.prepared.id, reason) for request in self.running.values()]
        for request_id in list(self.running):
            del self.requests[request_id]
        for books in (self.running, self.uid_to_request_id, self.request_id_to_uid, self._paused):
            books.clear()
        self.batch_generator = self._new_decoder()
        mx.clear_cache()
        return failed
