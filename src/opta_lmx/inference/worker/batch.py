"""The sequences that decode together: their joint KV cache, one forward a step, one sampler call.

Takes the place of mlx-lm's GenerationBatch, which normalises, samples and matches row by row in every step.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import ArraysCache, BatchKVCache, KVCache

from opta_lmx.inference.worker.geometry import flat
from opta_lmx.inference.worker.sampler_rows import RowTable
from opta_lmx.inference.worker.sampling import DeviceLaunch, HostLaunch, Launched, prepare_processors
from opta_lmx.inference.worker.sequence import Sequence

# mlx-lm's ArraysCache (recurrent layers) subtracts from its padding lazily at every step; unevaluated, the chain of
# operations grows until Metal's resource limit aborts the process (mlx-lm issues 1641 and 1845).
_FLUSH_EVERY_STEPS = 50

Caches = list[Any]  # one mlx-lm cache object a layer


class DecodeBatch:
    """Rows stand in the order of ``sequences``; newcomers enter at the next forward, at the end.

    The next forward is always built while one runs, so a row that turns out to have ended is computed once in vain. One
    that is known to end, since its answer has all the tokens it may have, is not.
    When it starts depends on the rows. Where all are chosen for in MLX it is queued at once, on tokens nobody has seen
    yet. Where some are numpy's, rows with processors above all, which must learn each token first, it waits for the
    tokens, which are then written into the memory it reads them from.
    """

    def __init__(
        self,
        model: Any,
        launch: type[HostLaunch] | type[DeviceLaunch],
        on_end: Callable[[Sequence, int, Caches], None] | None = None,
    ) -> None:
        """``on_end`` is given each sequence that ends, the number of answer tokens its cache covers, and that cache."""
        self.sequences: list[Sequence] = []
        self._model = model
        self._launch = launch
        self._on_end = on_end
        self._cache: Caches = []
        # A single row decodes on its plain cache: no padding, so no mask (a sixth of a small model's step on the CPU).
        self._alone = False
        self._table = RowTable(())
        self._tokens = TokenRow(0)
        self._joining: list[tuple[Sequence, Caches, int]] = []
        self._launched: Launched | None = None
        self._steps = 0

    def __len__(self) -> int:
        return len(self.sequences) + len(self._joining)

    def join(self, sequence: Sequence, cache: Caches, token: int) -> None:
        """Put a sequence in the next forward: ``cache`` covers its prompt but the last token, ``token``."""
        self._joining.append((sequence, cache, token))

    def launch(self) -> None:
        """Queue the first forward, unless one is queued already; every later one follows from the one before."""
        if self._launched is not None:
            return
        inputs = self._admit()
        if inputs:
            self._launched = self._forward(mx.array(inputs))
            self._launched.start()
            prepare_processors(self._table)

    def step(self) -> list[Sequence]:
        """Wait for the queued forward: every row has one token more. Rows that end with it have left the batch."""
        launched = self._launched
        if launched is None:
            return []
        self._launched = None
        collected = list(self.sequences)
        staying = [at for at, sequence in enumerate(collected) if not sequence.is_at_last_token]
        leaving = self._let_go(staying) if len(staying) < len(collected) else []
        tokens = self._collect(launched, staying, self._admit())
        logits = launched.logits() if any(sequence.wants_logprobs for sequence in collected) else None
        for at, (sequence, token) in enumerate(zip(collected, tokens, strict=True)):
            sequence.take(token, logits[at] if logits is not None and sequence.wants_logprobs else None)
        for sequence, caches in leaving:
            self._report_end(sequence, caches, unfed=1)
        self._remove_ended()
        prepare_processors(self._table)
        return collected

    def _let_go(self, staying: list[int]) -> list[tuple[Sequence, Caches]]:
        """Take out the rows whose last token is on its way, all but ``staying``: the next forward is not for them."""
        leaving: list[tuple[Sequence, Caches]] = []
        if self._on_end is not None:
            last = [(at, sequence) for at, sequence in enumerate(self.sequences) if sequence.is_at_last_token]
            leaving = [(sequence, self._row_caches(at)) for at, sequence in last]
        self._keep(staying)
        return leaving

    def _collect(self, launched: Launched, staying: list[int], newcomers: list[int]) -> list[int]:
        """The tokens of ``launched``, with the forward that follows queued: for its rows ``staying`` and newcomers."""
        if not self.sequences:
            return launched.collect()
        if launched.tokens is not None:
            inputs = _following(launched.tokens, staying, newcomers)
            self._launched = self._forward(inputs)
            self._launched.start()
            return launched.collect()
        if len(self._tokens) != len(self.sequences):
            self._tokens = TokenRow(len(self.sequences))
        self._launched = self._forward(self._tokens.lazy)
        tokens = launched.collect()
        self._tokens.write([tokens[at] for at in staying] + newcomers)
        self._launched.start()
        return tokens

    def drop(self, request_id: int) -> list[Sequence]:
        """Remove and return the rows of one request."""
        gone = [entry[0] for entry in self._joining if entry[0].request.id == request_id]
        self._joining = [entry for entry in self._joining if entry[0].request.id != request_id]
        stay = [at for at, sequence in enumerate(self.sequences) if sequence.request.id != request_id]
        if len(stay) < len(self.sequences):
            gone += [sequence for sequence in self.sequences if sequence.request.id == request_id]
            self._keep(stay)
        return gone

    def pause_newest(self) -> Sequence:
        """Take the last row out, with its cache but not its tokens: it can be computed again from those."""
        sequence = self.sequences[-1]
        if self._launched is not None:
            sequence.sampler.take_back()
        self._keep(list(range(len(self.sequences) - 1)))
        return sequence

    @property
    def all_sequences(self) -> list[Sequence]:
        """Rows and newcomers."""
        return self.sequences + [sequence for sequence, _, _ in self._joining]

    @property
    def cache_bytes(self) -> int:
        """Bytes of the joint KV cache."""
        return sum(layer.nbytes for layer in self._cache)

    def _forward(self, inputs: mx.array) -> Launched:
        logits = self._model(inputs[:, None], cache=self._cache)[:, -1, :]
        self._steps += 1
        if self._steps % _FLUSH_EVERY_STEPS == 0:
            mx.eval(
                [
                    padding
                    for layer in flat(self._cache)
                    if isinstance(layer, ArraysCache)
                    for padding in (layer.left_padding, layer.lengths)
                    if padding is not None
                ]
            )
        return self._launch(logits, self._table)

    def _admit(self) -> list[int]:
        """Merge the newcomers into the joint cache; their first input tokens."""
        if not self._joining:
            return []
        joining, self._joining = self._joining, []
        caches = [cache for _, cache, _ in joining]
        if not self.sequences and len(joining) == 1:
            self._cache, self._alone = caches[0], True
        else:
            if self._alone:
                caches.insert(0, self._cache)
                self._cache, self._alone = [], False
            merged = [type(layers[0]).merge(list(layers)) for layers in zip(*caches, strict=True)]
            if self._cache:
                for layer, extra in zip(self._cache, merged, strict=True):
                    layer.extend(extra)
            else:
                self._cache = merged
        self.sequences += [sequence for sequence, _, _ in joining]
        self._table = RowTable([sequence.sampler for sequence in self.sequences])
        return [token for _, _, token in joining]

    def _remove_ended(self) -> None:
        """Take out the rows that turned out to have ended; each is being fed its last token all the same."""
        staying = [at for at, sequence in enumerate(self.sequences) if sequence.finish is None]
        if len(staying) == len(self.sequences):
            return
        if self._on_end is not None:
            for at, sequence in enumerate(self.sequences):
                if sequence.finish is not None:
                    self._report_end(sequence, self._row_caches(at), unfed=0)
        self._keep(staying)

    def _report_end(self, sequence: Sequence, caches: Caches, unfed: int) -> None:
        """Hand over the cache of a row that ended, which lacks so many of the answer's tokens."""
        if self._on_end is not None and sequence.error is None:
            self._on_end(sequence, len(sequence.tokens) - unfed, caches)

    def _row_caches(self, at: int) -> Caches:
        """One row's part of the joint cache."""
        return self._cache if self._alone else [row_of(layer, at) for layer in self._cache]

    def _keep(self, rows: list[int]) -> None:
        self.sequences = [self.sequences[at] for at in rows]
        self._table = RowTable([sequence.sampler for sequence in self.sequences])
        if not rows:
            self._cache, self._launched, self._alone = [], None, False
            return
        if self._launched is not None:
            self._launched.keep(rows, self._table)
        if self._alone:
            return
        for layer in self._cache:
            layer.filter(rows)
        if len(rows) == 1:
            self._cache, self._alone = [layer.extract(0) for layer in self._cache], True


class TokenRow:
    """Memory for the tokens of one forward, which can be built on it before they are known."""

    def __init__(self, size: int) -> None:
        self.lazy = mx.zeros(size, dtype=mx.int32)
        mx.eval(self.lazy)
        self._view = np.array(self.lazy, copy=False)

    def __len__(self) -> int:
        return len(self._view)

    def write(self, tokens: list[int]) -> None:
        """Set all tokens; no forward that reads them may be under way. One that is not a token reads as 0."""
        np.maximum(tokens, 0, out=self._view)


def _following(tokens: mx.array, staying: list[int], newcomers: list[int]) -> mx.array:
    """What the next forward reads: ``tokens`` at the places that stay, then the newcomers'."""
    if len(staying) < len(tokens):
        tokens = tokens[mx.array(staying, dtype=mx.int32)]
    return mx.concatenate([tokens, mx.array(newcomers, dtype=tokens.dtype)]) if newcomers else tokens


def row_of(layer: Any, at: int) -> Any:
    """One row of a joint cache as a plain cache; a view where that is possible, so that only what is kept is copied."""
    if type(layer) is not BatchKVCache:
        return layer.extract(at)
    row: Any = KVCache()
    start = layer.left_padding[at].item()
    row.keys = layer.keys[at : at + 1, :, start : layer.size()]
    row.values = layer.values[at : at + 1, :, start : layer.size()]
    row.offset = row.keys.shape[2]
    return row
