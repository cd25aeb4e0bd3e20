"""One choice of one request while it is generated: when it ends, and what its tokens say."""

import random
from collections.abc import Sequence as ListOf

import numpy as np

from opta_lmx.inference.output.stop import StopStrings
from opta_lmx.inference.worker.backend import Prepared
from opta_lmx.inference.worker.detokenizer import Detokenizer, TokenTable
from opta_lmx.inference.worker.prompt_scores import PromptScores
from opta_lmx.inference.worker.sampler_rows import NOT_A_NUMBER, Logits, LogitsProcessor, RowSampler
from opta_lmx.types import Delta, FinishReason, TokenLogprob

# random.Random takes the absolute value of a seed, so that -1 and 1 would be the same; modulo 2**64 they are not.
_SEEDS = 2**64


class Sequence:
    """Accepts one token a step. ``take`` decides whether it ends; ``delta`` tells what the step added.

    ``error`` set means that it ended because it could not go on, and its request with it.
    """

    def __init__(
        self,
        request: Prepared,
        choice: int,
        table: TokenTable,
        stop_ids: frozenset[int],
        processors: ListOf[LogitsProcessor] = (),
        prompt_scores: PromptScores | None = None,
    ) -> None:
        params = request.sampling
        self.request = request
        self.choice = choice
        self.finish: FinishReason | None = None
        self.error: str | None = None
        self.tokens: list[int] = []
        self.wants_logprobs = params.logprobs is not None
        self.sampler = RowSampler(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            generator=random.Random(None if params.seed is None else (params.seed + choice) % _SEEDS),
            processors=processors,
        )
        self.prompt_scores = prompt_scores
        self._table = table
        self._stop_ids = stop_ids
        self._detokenizer = Detokenizer(table)
        self._stops = StopStrings(params.stop) if params.stop else None
        self._text = ""
        self._spoken = True
        self._logprobs: list[TokenLogprob] | None = None
        # What the first delta begins with.
        self._preface = table.literal(request.token_ids) if params.echo_tokens else ""

    @property
    def length(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self.request.token_ids) + len(self.tokens)

    @property
    def is_at_last_token(self) -> bool:
        """True if the sequence ends with its next token, whichever that is."""
        return len(self.tokens) + 1 >= self.request.max_tokens

    def take(self, token: int, logits: Logits | None = None) -> bool:
        """Record the sampled token; True if the sequence ends with it. ``logits`` is its row, for log-probabilities."""
        if token == NOT_A_NUMBER:
            self.error, self.finish = "the model's output is not a number", FinishReason.STOP
            return True
        self.tokens.append(token)
        for processor in self.sampler.processors:
            processor.accept(token)
            self.error = self.error or processor.error
        if logits is not None:
            self._logprobs = [_logprob(self._table, logits, token, self.request.sampling.logprobs or 0)]
        if self.error is not None or token in self._stop_ids:
            self.finish = FinishReason.STOP
        elif len(self.tokens) >= self.request.max_tokens:
            self.finish = FinishReason.LENGTH
        self._spoken = False
        # Only a stop string needs the text to know whether the sequence ends; the others' text can wait.
        if self._stops is not None:
            self._speak()
        return self.finish is not None

    def end_with_prompt(self) -> None:
        """The prompt was all that was wanted."""
        self.finish = FinishReason.LENGTH

    def delta(self) -> Delta:
        """What the last token added; without one, what the prompt alone has to tell."""
        if not self._spoken:
            self._speak()
        logprobs, self._logprobs = self._logprobs, None
        if self.prompt_scores is not None:
            logprobs, self.prompt_scores = [*self.prompt_scores.entries, *(logprobs or ())], None
        text, self._preface = self._preface + self._text, ""
        return Delta(self.choice, text, 1 if self.tokens else 0, self.finish, logprobs)

    def _speak(self) -> None:
        self._spoken = True
        token = self.tokens[-1]
        text = "" if token in self._stop_ids else self._detokenizer.add(token)
        if self.finish is not None:
            text += self._detokenizer.flush()
        if self._stops is None or len(self.tokens) < self.request.sampling.min_tokens:
            self._text = text
            return
        self._text, met = self._stops.feed(text)
        if met:
            self.finish = FinishReason.STOP
        elif self.finish is not None:
            self._text += self._stops.flush()


def _logprob(table: TokenTable, logits: Logits, token: int, top: int) -> TokenLogprob:
    """Natural-log probabilities of the processed, untempered logits, as OpenAI reports them."""
    row = logits.astype(np.float64)
    peak = row.max()
    normaliser = peak + np.log(np.exp(row - peak).sum())
    best = np.argpartition(-row, min(top, len(row) - 1))[:top] if top else np.empty(0, dtype=np.intp)
    best = best[np.argsort(-row[best], kind="stable")]
    alternatives = [table.scored(int(id), float(row[id] - normaliser)) for id in best]
    return table.scored(token, float(row[token] - normaliser), alternatives)
