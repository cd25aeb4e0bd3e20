"""A generation as OpenAI's chat completion: whole (``ChatAnswer``) or chunk by chunk (``ChatChunks``).

Both count the same way and share their words for finish reasons, log-probabilities and usage.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import msgspec

from opta_lmx.api.openai.wire import (
    AnswerMessage,
    ChatCompletion,
    Choice,
    ChoiceLogprobs,
    CompletionDetails,
    PromptDetails,
    Usage,
)
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
class AnswerHead:
    """What an answer says of itself beside the model's words; ``created`` in seconds since 1970."""

    id: str
    created: int
    choices: int
    service_tier: str | None = None
    metadata: dict[str, str] | None = None


@dataclass(slots=True)
class _Piece:
    """What a run of deltas added to one choice."""

    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None

    def add(self, delta: Delta) -> None:
        self.text.append(delta.text)
        if delta.logprobs:
            self.logprobs += delta.logprobs
        if delta.finish is not None:
            self.finish = delta.finish


class ChatAnswer:
    """Gathers a generation into one ChatCompletion."""

    def __init__(self, head: AnswerHead, generation: Generation, *, logprobs: bool) -> None:
        self._head = head
        self._generation = generation
        self._logprobs = logprobs
        self._pieces = [_Piece() for _ in range(head.choices)]
        self._completion_tokens = 0

    def add(self, deltas: Iterable[Delta]) -> None:
        """Takes one look's deltas."""
        for delta in deltas:
            self._pieces[delta.choice].add(delta)
            self._completion_tokens += delta.token_count

    def completion(self) -> ChatCompletion:
        """The whole answer, once the generation has ended."""
        choices = [
            Choice(
                index=index,
                message=AnswerMessage(content="".join(piece.text)),
                logprobs=ChoiceLogprobs.model_validate(_to_logprobs(piece.logprobs)) if self._logprobs else None,
                finish_reason=_FINISH[piece.finish or FinishReason.STOP],
            )
            for index, piece in enumerate(self._pieces)
        ]
        return ChatCompletion(
            id=self._head.id,
            created=self._head.created,
            model=self._generation.model_id,
            choices=choices,
            usage=to_usage(self._generation, self._completion_tokens),
            service_tier=self._head.service_tier,
            metadata=self._head.metadata,
        )


class ChatChunks:
    """Writes a generation as the events of a streamed chat completion: an ``sse.EventWriter``.

    Role chunks first, one for each choice; then, for each look at the generation, at most one chunk of content and one
    of finish for each choice; at the end the usage chunk if asked for, and [DONE]. Everything in a chunk but the new
    text is encoded once.
    """

    def __init__(self, head: AnswerHead, generation: Generation, *, include_usage: bool, logprobs: bool) -> None:
        self._generation = generation
        self._include_usage = include_usage
        self._logprobs = logprobs
        self._completion_tokens = 0
        # What all chunks have in common.
        self._common: JsonObject = {
            "id": head.id,
            "object": "chat.completion.chunk",
            "created": head.created,
            "model": generation.model_id,
            "system_fingerprint": None,
        } | ({} if head.service_tier is None else {"service_tier": head.service_tier})
        start = _encode(self._common)[:-1]
        self._before = [b'%b,"choices":[{"index":%d,"delta":' % (start, index) for index in range(head.choices)]
        self._after = b'}],"usage":null}\n\n' if include_usage else b"}]}\n\n"
        self._goes_on = b',"logprobs":null,"finish_reason":null' + self._after
        self._before_text = [before + b'{"content":' for before in self._before]
        self._after_text = b"}" + self._goes_on

    def begin(self) -> bytes:
        """The role chunks."""
        return b"".join(before + b'{"role":"assistant","content":""}' + self._goes_on for before in self._before)

    def write(self, deltas: Sequence[Delta]) -> bytes:
        """The chunks for one look's deltas; those of one choice are merged."""
        self._completion_tokens += sum(delta.token_count for delta in deltas)
        if len(deltas) == 1 and deltas[0].finish is None and not self._logprobs:
            # The common case by far: one token of one choice.
            delta = deltas[0]
            return self._plain(delta.choice, delta.text) if delta.text else b""
        return b"".join(self._chunks(deltas))

    def end(self) -> bytes:
        """The usage chunk, if asked for, and [DONE]."""
        if not self._include_usage:
            return _DONE
        usage = to_usage(self._generation, self._completion_tokens).model_dump()
        return _encode(self._common | {"choices": [], "usage": usage}) + b"\n\n" + _DONE

    def _chunks(self, deltas: Iterable[Delta]) -> Iterator[bytes]:
        pieces: dict[int, _Piece] = {}
        for delta in deltas:
            pieces.setdefault(delta.choice, _Piece()).add(delta)
        for choice, piece in pieces.items():
            text = "".join(piece.text)
            if self._logprobs and piece.logprobs:
                content, logprobs = msgspec.json.encode(text), msgspec.json.encode(_to_logprobs(piece.logprobs))
                middle = b'},"logprobs":' + logprobs + b',"finish_reason":null'
                yield self._before_text[choice] + content + middle + self._after
            elif text:
                yield self._plain(choice, text)
            if piece.finish is not None:
                finish = b'{},"logprobs":null,"finish_reason":"%b"' % _FINISH[piece.finish].encode()
                yield self._before[choice] + finish + self._after

    def _plain(self, choice: int, text: str) -> bytes:
        return self._before_text[choice] + msgspec.json.encode(text) + self._after_text


def to_usage(generation: Generation, completion_tokens: int) -> Usage:
    """OpenAI's count of tokens; ``completion_tokens`` covers all choices, cached tokens are part of the prompt's."""
    return Usage(
        prompt_tokens=generation.prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=generation.prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptDetails(cached_tokens=generation.cache.hit_tokens),
        completion_tokens_details=CompletionDetails(),
    )


def _encode(chunk: JsonObject) -> bytes:
    return b"data: " + msgspec.json.encode(chunk)


def _to_logprobs(tokens: Iterable[TokenLogprob]) -> JsonObject:
    content = [_to_logprob(token) | {"top_logprobs": [_to_logprob(top) for top in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def _to_logprob(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.token, "logprob": max(token.logprob, _LEAST_LOGPROB), "bytes": list(token.raw)}
