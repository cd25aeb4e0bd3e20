"""What the model thinks of a prompt's own tokens: their log-probabilities, taken while the prompt is processed.

The logits of a whole chunk are many times its KV cache, so a scored prompt goes in smaller pieces than others, and
nothing of it comes from the prefix cache: what was not computed has no logits.
"""

import mlx.core as mx
import numpy as np

from opta_lmx.inference.worker.detokenizer import TokenTable

# Of float32 logits at a time; the passes over them need as much again.
_LOGITS_BYTES = 32 * 1024**2
_MOST_TOKENS = 128


class PromptScores:
    """The scores of one prompt, natural logarithms. ``top`` of the likeliest tokens are told at each position."""

    def __init__(self, table: TokenTable, token_ids: list[int], top: int) -> None:
        self._table = table
        self._token_ids = token_ids
        self._top = top
        # Nothing precedes the first token, so it has no score; readers leave its 0 out.
        self.entries = [table.scored(token_ids[0], 0.0)]

    @staticmethod
    def most_tokens(vocab_size: int) -> int:
        """Tokens whose logits may be held at once."""
        return max(1, min(_MOST_TOKENS, _LOGITS_BYTES // (4 * vocab_size)))

    def add(self, logits: mx.array) -> None:
        """``logits`` (tokens, vocabulary) are those after the tokens that follow what was added before."""
        count = logits.shape[0]
        begin = len(self.entries)
        chosen = mx.array(self._token_ids[begin : begin + count])[:, None]
        logits = logits.astype(mx.float32)
        normaliser = mx.logsumexp(logits, axis=-1, keepdims=True)
        scores = mx.take_along_axis(logits, chosen, axis=-1) - normaliser
        best: list[tuple[mx.array, mx.array]] = []
        for _ in range(self._top):
            ids = mx.argmax(logits, axis=-1, keepdims=True)
            best.append((ids, mx.take_along_axis(logits, ids, axis=-1) - normaliser))
            logits = mx.put_along_axis(logits, ids, mx.array(-mx.inf), axis=-1)
        mx.eval(scores, best)
        values = np.array(scores)[:, 0]
        tops = [(np.array(ids)[:, 0], np.array(found)[:, 0]) for ids, found in best]
        for at in range(count):
            top = [self._table.scored(int(ids[at]), float(found[at])) for ids, found in tops]
            self.entries.append(self._table.scored(self._token_ids[begin + at], float(values[at]), top))
