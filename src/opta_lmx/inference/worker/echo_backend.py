"""A backend without MLX: it answers a prompt with the prompt's own words, at a set speed and with set failures.

It follows the Protocol of ``backend.py`` to the letter, so everything outside the worker can be tested, timed
and broken on purpose without a model. The catalog lists a directory with an ``echo.json`` (the fields of
``EchoOptions``) as an echo model. Its words are certain: temperature, penalties, seeds and biases change nothing.
"""

import math
import os
import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from opta_lmx.errors import ContextTooLong, InvalidRequest, LoadFailed, UnsupportedParameter
from opta_lmx.inference.output.stop import StopStrings
from opta_lmx.inference.protocol import Failed, Generate, Load, Started
from opta_lmx.inference.worker.backend import Prepared, StepResult
from opta_lmx.types import (
    CacheReport,
    ChatPrompt,
    Delta,
    EchoOptions,
    FinishReason,
    LoadOptions,
    ModelFacts,
    Prompt,
    TextPrompt,
    TokenLogprob,
)

# The empty piece: no text has it, so it can end every answer.
END_TOKEN = 1

# A prompt that starts with this word is accepted and then fails at its first token.
FAIL_WORD = "!fail"
# One that starts with this takes the whole process with it then, as a prompt that MLX cannot survive does.
EXIT_WORD = "!exit"

# Spaces belong to the word they precede; spaces at the end stand alone.
_PIECE = re.compile(r"\s*\S+|\s+")

# What an empty prompt is answered with when the end of sequence is forbidden.
_FILLER = " echo"

# The longest id a frame can carry as a signed integer. Ids of words longer than 7 bytes lie beyond it.
_VOCAB_SIZE = 2**63 - 1


def encode(text: str) -> list[int]:
    """One token for each word of a text; ``decode(encode(text)) == text`` for every text.

    An id is the piece's UTF-8 bytes read as one big-endian number behind a leading 1, so the tokenizer has no table.
    """
    return [int.from_bytes(b"\x01" + piece.encode()) for piece in _PIECE.findall(text)]


def decode(token_ids: Sequence[int]) -> str:
    """The text of some tokens; raises InvalidRequest for an id that no text has."""
    return "".join(_piece(token) for token in token_ids)


@dataclass(slots=True)
class _Sequence:
    """One choice of one request, from the line to its last token."""

    request: Prepared
    choice: int
    to_prefill: int
    stops: StopStrings
    made: int = 0
    finished: bool = False
    told_prompt: bool = False


class EchoBackend:
    """One echo model. ``sleep`` takes seconds, ``exit_process`` an exit code; tests give their own."""

    def __init__(
        self, sleep: Callable[[float], None] = time.sleep, exit_process: Callable[[int], object] = os._exit
    ) -> None:
        self._sleep = sleep
        self._exit_process = exit_process
        self._options = LoadOptions()
        self._echo = EchoOptions()
        self._context_length = self._echo.context_length
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._cancelled: set[int] = set()
        self._tokens_made = 0

    def load(self, frame: Load) -> ModelFacts:
        """Take the frame's echo options and nothing from the directory; raises LoadFailed when they say so."""
        self._options = frame.options
        self._echo = frame.options.echo or EchoOptions()
        self._sleep(self._echo.load_seconds)
        if self._echo.fail_load is not None:
            raise LoadFailed(frame.model_id, self._echo.fail_load)
        self._context_length = min(self._echo.context_length, frame.options.context_length or self._echo.context_length)
        return ModelFacts(
            model_type="echo",
            context_length=self._context_length,
            vocab_size=_VOCAB_SIZE,
            weights_bytes=0,
            kv_bytes_per_token=0,
            has_chat_template=True,
        ).as_wanted(frame.options.tool_format, frame.options.reasoning_format)

    def prepare(self, frame: Generate) -> Prepared:
        """Tokenise a text, or the last user message of a chat, which is the whole of its template."""
        if frame.structured is not None:
            raise UnsupportedParameter("An echo model cannot follow a grammar.", param=frame.structured.field)
        token_ids, param = _tokenise(frame.prompt)
        context = min(self._context_length, frame.context_length or self._context_length)
        room = context - len(token_ids)
        if room < 1:
            raise ContextTooLong(len(token_ids), context, param=param)
        wanted = frame.sampling.max_tokens
        return Prepared(
            id=frame.id,
            request_id=frame.request_id,
            token_ids=token_ids,
            max_tokens=room if wanted is None else min(wanted, room),
            sampling=frame.sampling,
        )

    def add(self, request: Prepared) -> None:
        """Put every choice of a request in line."""
        for choice in range(request.sampling.n):
            self._waiting.append(_Sequence(request, choice, len(request.token_ids), StopStrings(request.sampling.stop)))

    def cancel(self, id: int) -> None:
        """Mark a request to leave at the next step; one that has ended already is left alone."""
        if any(sequence.request.id == id for sequence in (*self._running, *self._waiting)):
            self._cancelled.add(id)

    def grant_kv(self, granted_bytes: int) -> None:
        """Never asked for: an echo model has no cache."""

    def has_work(self) -> bool:
        """True while a sequence runs or waits."""
        return bool(self._running or self._waiting)

    def step(self) -> StepResult:
        """One step of continuous batching, in the order a real engine has.

        1. Cancelled requests leave. 2. Sequences in line fill the batch up to ``max_running``. 3. Every prompt not
        read yet gives one chunk, and the step takes its time. 4. Every sequence whose prompt is read makes a token.
        """
        deltas = self._leave()
        started = self._admit()
        self._sleep(self._echo.token_seconds + self._prefill() * self._echo.prefill_seconds_per_token)
        failing: dict[int, Failed] = {}
        for sequence in self._running:
            id = sequence.request.id
            if sequence.to_prefill or id in failing:
                continue
            first = decode(sequence.request.token_ids[:1])
            if first.startswith(EXIT_WORD):
                self._exit_process(9)
            if first.startswith(FAIL_WORD):
                failing[id] = Failed(id, f"The prompt asked the echo model to fail ({FAIL_WORD}).")
            else:
                deltas.append((id, self._advance(sequence)))
        self._drop(lambda sequence: sequence.finished or sequence.request.id in failing)
        return StepResult(started, deltas, list(failing.values()))

    def running(self) -> tuple[int, int]:
        """Sequences in the batch and sequences in line."""
        return len(self._running), len(self._waiting)

    def rest(self) -> None:
        """Nothing is kept."""

    def memory(self) -> tuple[int, int]:
        """Nothing: an echo model has neither weights nor a cache."""
        return 0, 0

    def _leave(self) -> list[tuple[int, Delta]]:
        leaving = [s for s in (*self._running, *self._waiting) if s.request.id in self._cancelled]
        self._drop(lambda sequence: sequence.request.id in self._cancelled)
        self._cancelled.clear()
        return [(s.request.id, Delta(s.choice, "", 0, FinishReason.CANCELLED)) for s in leaving]

    def _admit(self) -> list[Started]:
        started = []
        while self._waiting and len(self._running) < self._options.max_running:
            sequence = self._waiting.popleft()
            self._running.append(sequence)
            if sequence.choice == 0:
                started.append(Started(sequence.request.id, len(sequence.request.token_ids), CacheReport()))
        return started

    def _prefill(self) -> int:
        read = 0
        for sequence in self._running:
            chunk = min(sequence.to_prefill, self._options.prefill_chunk_tokens)
            sequence.to_prefill -= chunk
            read += chunk
        return read

    def _drop(self, ended: Callable[[_Sequence], bool]) -> None:
        self._running = [sequence for sequence in self._running if not ended(sequence)]
        self._waiting = deque(sequence for sequence in self._waiting if not ended(sequence))

    def _advance(self, sequence: _Sequence) -> Delta:
        """Its next token, and before the first what was asked for of the prompt."""
        if sequence.request.max_tokens:
            delta = self._make_token(sequence)
        else:
            sequence.finished = True
            delta = Delta(sequence.choice, "", 0, FinishReason.LENGTH)
        if sequence.told_prompt:
            return delta
        sequence.told_prompt = True
        sampling, token_ids = sequence.request.sampling, sequence.request.token_ids
        logprobs = delta.logprobs
        if sampling.prompt_logprobs is not None:
            first, *others = (_logprob(_piece(token), sampling.prompt_logprobs) for token in token_ids)
            unscored = msgspec.structs.replace(first, logprob=0.0, top=[])
            logprobs = [unscored, *others, *(logprobs or ())]
        preface = decode(token_ids) if sampling.echo_tokens else ""
        return msgspec.structs.replace(delta, text=preface + delta.text, logprobs=logprobs)

    def _make_token(self, sequence: _Sequence) -> Delta:
        self._tokens_made += 1
        if self._tokens_made == self._echo.exit_at:
            self._exit_process(9)
        while self._tokens_made == self._echo.hang_at:
            self._sleep(3600)
        sampling = sequence.request.sampling
        token = _next_token(sequence)
        ended = token == END_TOKEN or (token in sampling.stop_token_ids and sequence.made >= sampling.min_tokens)
        sequence.made += 1
        piece = "" if ended else _piece(token)
        text, stopped = sequence.stops.feed(piece)
        finish = None
        if ended or stopped:
            finish = FinishReason.STOP
        elif sequence.made >= sequence.request.max_tokens:
            finish = FinishReason.LENGTH
        if finish is not None:
            text += sequence.stops.flush()
            sequence.finished = True
        logprobs = None
        if sampling.logprobs is not None:
            logprobs = [_logprob(piece, sampling.logprobs)] if piece else []
        return Delta(sequence.choice, text, 1, finish, logprobs)


def _piece(token: int) -> str:
    """The text behind a token id; raises InvalidRequest for an id that no text has."""
    data = token.to_bytes((token.bit_length() + 7) // 8) if token > 0 else b""
    try:
        marked = data.decode()
    except UnicodeDecodeError:
        marked = ""
    if not marked.startswith("\x01"):
        raise InvalidRequest(f"Token id {token} is not in the vocabulary.", param="prompt")
    return marked[1:]


def _tokenise(prompt: Prompt) -> tuple[list[int], str]:
    """A prompt's tokens, and the field a client gave them in."""
    if isinstance(prompt, ChatPrompt):
        return encode(_last_user_text(prompt)), "messages"
    if isinstance(prompt, TextPrompt):
        token_ids = encode(prompt.text)
    else:
        token_ids = prompt.token_ids
        decode(token_ids)
    if not token_ids:
        raise InvalidRequest("The prompt is empty.", param="prompt")
    return token_ids, "prompt"


def _last_user_text(chat: ChatPrompt) -> str:
    said = [message for message in chat.messages if message.get("role") == "user"] or chat.messages
    content = said[-1].get("content") if said else None
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content or ""


def _next_token(sequence: _Sequence) -> int:
    """The prompt's next word, then the end; words come round again while the end is forbidden."""
    request = sequence.request
    said_all = sequence.made >= len(request.token_ids)
    if said_all and sequence.made >= request.sampling.min_tokens and not request.sampling.ignore_eos:
        return END_TOKEN
    words = request.token_ids or encode(_FILLER)
    return words[sequence.made % len(words)]


def _logprob(piece: str, alternatives: int) -> TokenLogprob:
    """Rank r has probability 2 to the power -(r + 1); the chosen token is rank 0 and heads its alternatives."""
    ranked = [
        TokenLogprob(token, -(rank + 1) * math.log(2), token.encode())
        for rank, token in enumerate([piece, *(f"{piece}{rank}" for rank in range(1, alternatives))])
    ]
    return TokenLogprob(piece, ranked[0].logprob, ranked[0].raw, ranked[:alternatives])
