"""What the scheduler drives in place of mlx-lm's BatchGenerator: prompts in chunks, then one joint batch."""

import time
from typing import Any

import mlx.core as mx

from opta_lmx.inference.worker.backend import Prepared
from opta_lmx.inference.worker.batch import Caches, DecodeBatch
from opta_lmx.inference.worker.kv_books import KvBooks
from opta_lmx.inference.worker.prefill import ChunkPolicy, Prefill, PrefillQueue
from opta_lmx.inference.worker.prefix_snapshots import PrefixSnapshots
from opta_lmx.inference.worker.prefix_tree import PrefixTree
from opta_lmx.inference.worker.prompt_scores import PromptScores
from opta_lmx.inference.worker.sampling import DeviceLaunch, HostLaunch
from opta_lmx.inference.worker.sequence import Sequence
from opta_lmx.types import CacheReport, LoadOptions

PrefixCache = PrefixTree | PrefixSnapshots
Launch = type[HostLaunch] | type[DeviceLaunch]

# A prompt waits for another that is being processed if that spares it at least this many tokens of prefill.
_WORTH_WAITING_TOKENS = 64

# Room a sequence must have ahead: enough steps for a question to the server to be answered before it is used up.
_GROWTH_TOKENS = 64


def best_launch() -> Launch:
    """How this machine's MLX device samples best."""
    return DeviceLaunch if mx.default_device() == mx.Device(mx.gpu) else HostLaunch


class BatchDecoder:
    """All sequences that hold a cache. Its methods ``remove`` and ``close`` are vllm-mlx's side of the contract."""

    def __init__(
        self, model: Any, options: LoadOptions, books: KvBooks, prefixes: PrefixCache | None, launch: Launch
    ) -> None:
        on_end = self._keep_answer if prefixes is not None else None
        self.batch = DecodeBatch(model, launch, on_end)
        self._policy = ChunkPolicy(options.prefill_chunk_tokens, options.stall_bound_seconds)
        self.prefills = PrefillQueue(
            model,
            self._policy,
            self._keep_prompt,
            in_groups=books.shape.plain,
            most_scored=PromptScores.most_tokens(books.shape.vocab_size),
        )
        self._books = books
        self._prefixes = prefixes
        self._reloaded = options.reloaded
        self._to_keep: list[Prefill] = []

    def __len__(self) -> int:
        return len(self.batch) + len(self.prefills)

    def insert(self, prepared: Prepared, sequences: list[Sequence]) -> CacheReport:
        """Take a request in, with what the prefix cache has of its prompt; the choices share one prefill."""
        scores = sequences[0].prompt_scores
        if scores is None:
            cache, report = self._known(prepared.token_ids)
        else:
            cache, report = self._books.shape.new_cache(), CacheReport(cause="scored")
        exact = self._prefixes is not None and self._prefixes.exact_positions_only
        boundaries = list(prepared.boundaries) if exact else []
        prefill = Prefill(sequences, prepared.token_ids, cache, report.hit_tokens, boundaries, scores)
        self.prefills.add(prefill)
        return report

    def resume(self, sequence: Sequence) -> None:
        """Compute a paused sequence's cache again, as far as the prefix cache has not kept it, and let it go on."""
        tokens = sequence.request.token_ids + sequence.tokens
        cache, report = self._known(tokens)
        self.prefills.add(Prefill([sequence], tokens, cache, done=report.hit_tokens))

    def fits(self, rows: int, tokens: int, hoped: tuple[int, int] = (0, 0)) -> bool:
        """True if the grant covers everybody once ``rows`` more sequences of ``tokens`` tokens have joined.

        Asks the server for more if it does not: at once for ``hoped`` (rows, tokens), all those in line.
        """
        return self._books.allows(
            self._need(rows, tokens, _GROWTH_TOKENS), self._need(*hoped, _GROWTH_TOKENS) if hoped[0] else 0
        )

    def make_room(self) -> list[Sequence]:
        """Ask for more in time; if the next token would not fit, take the newest sequences out of the batch."""
        paused: list[Sequence] = []
        if len(self.batch.sequences) > 1 and not self.fits(0, 0):
            while len(self.batch.sequences) > 1 and not self._books.covers(self._need(0, 0, 1)):
                paused.append(self.batch.pause_newest())
        return paused

    def _need(self, rows: int, tokens: int, growth: int) -> int:
        inside = self.batch.all_sequences + self.prefills.sequences
        longest = max([tokens, *(sequence.length for sequence in inside)])
        return self._books.need(len(inside) + rows, longest + growth)

    def _known(self, tokens: list[int]) -> tuple[Caches, CacheReport]:
        """A cache that covers what is known of all but the last token."""
        known, report = None, CacheReport()
        if self._prefixes is not None:
            empty = self._prefixes.nbytes == 0
            known, report = self._prefixes.fetch(tokens[:-1])
            if empty and self._reloaded:
                # Whatever was known before went with the process that knew it.
                report = CacheReport(cause="model_reloaded")
        return (known if known is not None else self._books.shape.new_cache()), report

    def should_wait(self, prepared: Prepared) -> bool:
        """True if a prompt under way will soon leave in the prefix cache what this one would compute again."""
        if self._prefixes is None or prepared.sampling.prompt_logprobs is not None:
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
        """One chunk of prefill, then one decode step; the sequences that made a token, or were to make none."""
        ended: list[Sequence] = []
        started, decodes_alone = time.perf_counter(), not len(self.prefills)
        for prefill in self.prefills.step(decoding=len(self.batch) > 0):
            if self._prefixes is not None and not self._prefixes.exact_positions_only:
                self._to_keep.append(prefill)
            for sequence in prefill.sequences:
                if sequence.request.max_tokens:
                    self.batch.join(sequence, prefill.cache, prefill.tokens[-1])
                else:
                    sequence.end_with_prompt()
                    ended.append(sequence)
        self.batch.launch()
        stepped = self.batch.step()
        if decodes_alone and stepped:
            self._policy.observe_decode(time.perf_counter() - started)
        return ended + stepped

    def keep_prompts(self) -> None:
        """Keep the prompts that became complete in the last step, whose first tokens are on their way by now."""
        to_keep, self._to_keep = self._to_keep, []
        for prefill in to_keep:
            self._keep_prompt(prefill)

    def _keep_prompt(self, prefill: Prefill) -> None:
        if self._prefixes is not None and prefill.done:
            self._prefixes.store(prefill.tokens[: prefill.done], prefill.cache)

    def _keep_answer(self, sequence: Sequence, fed: int, caches: Caches) -> None:
        if self._prefixes is not None and sequence.choice == 0:
            self._prefixes.store(sequence.request.token_ids + sequence.tokens[:fed], caches)
