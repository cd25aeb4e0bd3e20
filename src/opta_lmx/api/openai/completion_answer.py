"""A generation as OpenAI's text completion: whole (``TextAnswer``) or chunk by chunk (``TextChunks``)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import msgspec

from opta_lmx.api.openai.wire import SYSTEM_FINGERPRINT, CompletionDetails, PromptDetails, Usage
from opta_lmx.api.openai.wire_text import Completion, CompletionChoice, CompletionLogprobs
from opta_lmx.inference.engine import Generation
from opta_lmx.types import Delta, FinishReason, JsonObject, TokenLogprob

_FINISH: Final[dict[FinishReason, Literal["stop", "length"]]] = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    # OpenAI has no word for it, and only we cancel: whoever reads this got all there was.
    FinishReason.CANCELLED: "stop",
}

# What OpenAI writes for a token too unlikely to be told from impossible; JSON has no infinity.
_LEAST_LOGPROB: Final = -9999.0

_DONE: Final = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class TextHead:
    """What an answer says beside the model's words; ``created`` in seconds since 1970.

    ``echoes`` holds, for each choice, the text that precedes the model's: its prompt where that is echoed, else "".
    ``scored``: the prompt's tokens precede the model's among the log-probabilities.
    """

    id: str
    created: int
    echoes: tuple[str, ...]
    logprobs: bool
    scored: bool = False


class _Logprobs:
    """The log-probabilities of one choice; offsets go on where the last piece of it ended."""

    def __init__(self, *, scored: bool) -> None:
        """``scored``: the first token is the prompt's first, which has no probability."""
        self._characters = 0
        self._unscored = 1 if scored else 0

    def take(self, tokens: Iterable[TokenLogprob]) -> JsonObject:
        """The wire's four lists for the next tokens."""
        tokens = list(tokens)
        unscored = tokens[: self._unscored]
        self._unscored -= len(unscored)
        scored = tokens[len(unscored) :]
        return {
            "tokens": [_name(token) for token in tokens],
            "token_logprobs": [*(None for _ in unscored), *map(_value, scored)],
            "top_logprobs": [*(None for _ in unscored), *map(_top, scored)],
            "text_offset": [self._offset(token.raw) for token in tokens],
        }

    def _offset(self, raw: bytes) -> int:
        """Characters before this token; a token that goes on with a character is where that began."""
        continues = bool(raw) and _continues(raw[0]) and self._characters > 0
        offset = self._characters - continues
        self._characters += sum(not _continues(byte) for byte in raw)
        return offset


@dataclass(slots=True)
class _Piece:
    """What a run of deltas added to one choice."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None


class TextAnswer:
    """Gathers a generation into one Completion."""

    def __init__(self, head: TextHead, generation: Generation) -> None:
        self._head = head
        self._generation = generation
        self._texts: list[list[str]] = [[echo] for echo in head.echoes]
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in head.echoes]
        self._finish = [FinishReason.STOP for _ in head.echoes]
        self._completion_tokens = 0

    def add(self, deltas: Iterable[Delta]) -> None:
        """Takes one look's deltas."""
        for delta in deltas:
            self._texts[delta.choice].append(delta.text)
            self._logprobs[delta.choice] += delta.logprobs or ()
            self._finish[delta.choice] = delta.finish or self._finish[delta.choice]
            self._completion_tokens += delta.token_count

    def completion(self) -> Completion:
        """The whole answer, once the generation has ended."""
        choices = [
            CompletionChoice(
                index=index,
                text="".join(texts),
                logprobs=self._told(logprobs) if self._head.logprobs else None,
                finish_reason=_FINISH[finish],
            )
            for index, (texts, logprobs, finish) in enumerate(
                zip(self._texts, self._logprobs, self._finish, strict=True)
            )
        ]
        return Completion(
            id=self._head.id,
            created=self._head.created,
            model=self._generation.model_id,
            choices=choices,
            usage=_usage(self._generation, self._completion_tokens),
        )

    def _told(self, logprobs: list[TokenLogprob]) -> CompletionLogprobs:
        return CompletionLogprobs.model_validate(_Logprobs(scored=self._head.scored).take(logprobs))


class TextChunks:
    """Writes a generation as the events of a streamed text completion: an ``sse.EventWriter``.

    Echoed prompts first, unless their scores are still to come; then, for each look at the generation, one chunk for
    each choice that has text or has ended; at the end the usage chunk if asked for, and [DONE].
    """

    def __init__(self, head: TextHead, generation: Generation, *, include_usage: bool) -> None:
        self._head = head
        self._generation = generation
        self._include_usage = include_usage
        self._logprobs = [_Logprobs(scored=head.scored) for _ in head.echoes]
        # Of choices that have not begun: a prompt's text goes with its scores.
        self._echoes = dict(enumerate(head.echoes)) if head.scored else {}
        self._completion_tokens = 0
        # What all chunks have in common.
        self._common: JsonObject = {
            "id": head.id,
            "object": "text_completion",
            "created": head.created,
            "model": generation.model_id,
            "system_fingerprint": SYSTEM_FINGERPRINT,
        }
        self._before = _encode(self._common)[:-1] + b',"choices":['
        self._after = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

    def begin(self) -> bytes:
        """The echoed prompts that nothing has to wait for."""
        if self._echoes:
            return b""
        return b"".join(self._chunk(index, _Piece(echo)) for index, echo in enumerate(self._head.echoes) if echo)

    def write(self, deltas: Sequence[Delta]) -> bytes:
        """The chunks for one look's deltas; those of one choice are merged."""
        pieces: dict[int, _Piece] = {}
        for delta in deltas:
            piece = pieces.setdefault(delta.choice, _Piece())
            piece.text += self._echoes.pop(delta.choice, "") + delta.text
            piece.logprobs += delta.logprobs or ()
            piece.finish = delta.finish or piece.finish
            self._completion_tokens += delta.token_count
        return b"".join(
            self._chunk(index, piece)
            for index, piece in pieces.items()
            if piece.text or piece.logprobs or piece.finish is not None
        )

    def end(self) -> bytes:
        """The usage chunk, if asked for, and [DONE]."""
        if not self._include_usage:
            return _DONE
        usage = _usage(self._generation, self._completion_tokens).model_dump()
        return _encode(self._common | {"choices": [], "usage": usage}) + b"\n\n" + _DONE

    def _chunk(self, index: int, piece: _Piece) -> bytes:
        choice = {
            "index": index,
            "text": piece.text,
            "logprobs": self._logprobs[index].take(piece.logprobs) if piece.logprobs else None,
            "finish_reason": None if piece.finish is None else _FINISH[piece.finish],
        }
        return self._before + msgspec.json.encode(choice) + self._after


def _usage(generation: Generation, completion_tokens: int) -> Usage:
    """The tokens of every prompt, each counted once whatever ``n``, and of every choice."""
    return Usage(
        prompt_tokens=generation.prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=generation.prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptDetails(cached_tokens=generation.cache.hit_tokens),
        completion_tokens_details=CompletionDetails(),
    )


def _encode(chunk: JsonObject) -> bytes:
    return b"data: " + msgspec.json.encode(chunk)


def _name(token: TokenLogprob) -> str:
    """A token's text, or its bytes where it holds only part of a character: keys of one object must differ."""
    try:
        token.raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.raw)
    return token.token


def _value(token: TokenLogprob) -> float:
    return max(token.logprob, _LEAST_LOGPROB)


def _top(token: TokenLogprob) -> dict[str, float]:
    """The likeliest tokens, best first, and in any case the chosen one."""
    return {_name(top): _value(top) for top in (*token.top, token)}


def _continues(byte: int) -> bool:
    """True for the second and later bytes of a character in UTF-8."""
    return byte & 0xC0 == 0x80
