"""A generation as OpenAI's chat completion: whole (``ChatAnswer``) or chunk by chunk (``ChatChunks``).

Both count the same way and share their words for finish reasons, log-probabilities and usage.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

import msgspec

from opta_lmx.api.openai.output import AnswerOutput, merged
from opta_lmx.api.openai.tools import ToolUse
from opta_lmx.api.openai.wire import (
    SYSTEM_FINGERPRINT,
    AnswerCall,
    AnswerMessage,
    ChatCompletion,
    Choice,
    ChoiceLogprobs,
    CompletionDetails,
    FunctionCall,
    PromptDetails,
    Usage,
)
from opta_lmx.inference.engine import Generation
from opta_lmx.inference.output.events import CallArguments, CallStarted, OutputEvent, Reasoning, Text
from opta_lmx.types import Delta, FinishReason, JsonObject, TokenLogprob

FinishWord: TypeAlias = Literal["stop", "length", "tool_calls", "content_filter", "function_call"]

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
    """What an answer says of itself beside the model's words; ``created`` in seconds since 1970.

    ``new_id`` gives the hex digits of a new id.
    """

    id: str
    created: int
    choices: int
    new_id: Callable[[], str]
    use: ToolUse
    service_tier: str | None = None
    metadata: dict[str, str] | None = None

    def new_call_id(self) -> str:
        """An id by which a tool's result will name its call, as long as OpenAI's."""
        return f"call_{self.new_id()[:24]}"

    def finish_reason(self, finish: FinishReason, *, called: bool) -> FinishWord:
        """OpenAI's word; an answer cut off inside a call has been cut off first of all."""
        if called and finish is not FinishReason.LENGTH:
            return "function_call" if self.use.legacy else "tool_calls"
        return _FINISH[finish]


@dataclass(slots=True)
class _Piece:
    """What a run of deltas added to one choice."""

    events: list[OutputEvent] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None

    def add(self, said: tuple[list[OutputEvent], list[TokenLogprob]], finish: FinishReason | None) -> None:
        self.events += said[0]
        self.logprobs += said[1]
        self.finish = finish or self.finish


class ChatAnswer:
    """Gathers a generation into one ChatCompletion."""

    def __init__(self, head: AnswerHead, generation: Generation, *, logprobs: bool) -> None:
        self._head = head
        self._generation = generation
        self._logprobs = logprobs
        self._output = AnswerOutput(generation, head.use, head.choices)
        self._pieces = [_Piece() for _ in range(head.choices)]

    def add(self, deltas: Iterable[Delta]) -> None:
        """Takes one look's deltas."""
        for delta in deltas:
            self._pieces[delta.choice].add(self._output.add(delta), delta.finish)

    def completion(self) -> ChatCompletion:
        """The whole answer, once the generation has ended."""
        choices = [
            Choice(
                index=index,
                message=_to_message(self._head, self._output.whole(index, piece.events)),
                logprobs=ChoiceLogprobs.model_validate(_to_logprobs(piece.logprobs)) if self._logprobs else None,
                finish_reason=self._head.finish_reason(
                    piece.finish or FinishReason.STOP, called=self._output.called(index)
                ),
            )
            for index, piece in enumerate(self._pieces)
        ]
        return ChatCompletion(
            id=self._head.id,
            created=self._head.created,
            model=self._generation.model_id,
            choices=choices,
            usage=to_usage(self._generation, self._output.completion_tokens, self._output.reasoning_tokens),
            service_tier=self._head.service_tier,
            metadata=self._head.metadata,
        )


def _to_message(head: AnswerHead, events: Iterable[OutputEvent]) -> AnswerMessage:
    content, reasoning = "", ""
    calls: dict[int, AnswerCall] = {}
    for event in merged(events):
        match event:
            case Text():
                content += event.text
            case Reasoning():
                reasoning += event.text
            case CallStarted():
                function = FunctionCall(name=event.name, arguments="")
                calls[event.index] = AnswerCall(id=head.new_call_id(), function=function)
            case CallArguments():
                calls[event.index].function.arguments += event.text
    legacy = head.use.legacy
    return AnswerMessage(
        content=content or (None if calls else ""),
        reasoning_content=reasoning or None,
        reasoning=reasoning or None,
        tool_calls=list(calls.values()) if calls and not legacy else None,
        function_call=calls[0].function if calls and legacy else None,
    )


class ChatChunks:
    """Writes a generation as the events of a streamed chat completion: an ``sse.EventWriter``.

    Role chunks first, one for each choice; then, for each look at the generation, what it added to each choice: a chunk
    for each run of content, of reasoning and of one call's arguments, one for each call's beginning, one of finish; at
    the end the usage chunk if asked for, and [DONE]. Everything in a chunk but what is new is encoded once.
    """

    def __init__(self, head: AnswerHead, generation: Generation, *, include_usage: bool, logprobs: bool) -> None:
        self._head = head
        self._generation = generation
        self._include_usage = include_usage
        self._logprobs = logprobs
        self._output = AnswerOutput(generation, head.use, head.choices)
        # What all chunks have in common.
        self._common: JsonObject = {
            "id": head.id,
            "object": "chat.completion.chunk",
            "created": head.created,
            "model": generation.model_id,
            "system_fingerprint": SYSTEM_FINGERPRINT,
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
        if len(deltas) == 1 and deltas[0].finish is None and not self._logprobs:
            # The common case by far: one token of one choice.
            events, _ = self._output.add(deltas[0])
            return b"".join(self._event(deltas[0].choice, event) for event in events)
        pieces: dict[int, _Piece] = {}
        for delta in deltas:
            pieces.setdefault(delta.choice, _Piece()).add(self._output.add(delta), delta.finish)
        return b"".join(chunk for choice, piece in pieces.items() for chunk in self._chunks(choice, piece))

    def end(self) -> bytes:
        """The usage chunk, if asked for, and [DONE]."""
        if not self._include_usage:
            return _DONE
        usage = to_usage(self._generation, self._output.completion_tokens, self._output.reasoning_tokens).model_dump()
        return _encode(self._common | {"choices": [], "usage": usage}) + b"\n\n" + _DONE

    def _chunks(self, choice: int, piece: _Piece) -> Iterator[bytes]:
        logprobs = piece.logprobs if self._logprobs else []
        for event in merged(piece.events):
            if logprobs and isinstance(event, Text):
                yield self._with_logprobs(choice, event.text, logprobs)
                logprobs = []
            else:
                yield self._event(choice, event)
        if logprobs:
            # Their text is held back; they need not wait for it.
            yield self._with_logprobs(choice, "", logprobs)
        if piece.finish is not None:
            word = self._head.finish_reason(piece.finish, called=self._output.called(choice))
            yield self._before[choice] + b'{},"logprobs":null,"finish_reason":"%b"' % word.encode() + self._after

    def _with_logprobs(self, choice: int, text: str, logprobs: Iterable[TokenLogprob]) -> bytes:
        content = msgspec.json.encode(text) + b'},"logprobs":' + msgspec.json.encode(_to_logprobs(logprobs))
        return self._before_text[choice] + content + b',"finish_reason":null' + self._after

    def _event(self, choice: int, event: OutputEvent) -> bytes:
        if isinstance(event, Text):
            return self._before_text[choice] + msgspec.json.encode(event.text) + self._after_text
        return self._before[choice] + msgspec.json.encode(_to_delta(self._head, event)) + self._goes_on


def _to_delta(head: AnswerHead, event: Reasoning | CallStarted | CallArguments) -> JsonObject:
    """OpenAI's ``delta``: a call's name and id are told once, its arguments in pieces."""
    if isinstance(event, Reasoning):
        return {"reasoning_content": event.text, "reasoning": event.text}
    named: JsonObject = {}
    if isinstance(event, CallStarted):
        named, function = {"id": head.new_call_id(), "type": "function"}, {"name": event.name, "arguments": ""}
    else:
        function = {"arguments": event.text}
    if head.use.legacy:
        return {"function_call": function}
    return {"tool_calls": [{"index": event.index, **named, "function": function}]}


def to_usage(generation: Generation, completion_tokens: int, reasoning_tokens: int = 0) -> Usage:
    """OpenAI's count of tokens; ``completion_tokens`` covers all choices, cached tokens are part of the prompt's."""
    return Usage(
        prompt_tokens=generation.prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=generation.prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptDetails(cached_tokens=generation.cache.hit_tokens),
        completion_tokens_details=CompletionDetails(reasoning_tokens=reasoning_tokens),
    )


def _encode(chunk: JsonObject) -> bytes:
    return b"data: " + msgspec.json.encode(chunk)


def _to_logprobs(tokens: Iterable[TokenLogprob]) -> JsonObject:
    content = [_to_logprob(token) | {"top_logprobs": [_to_logprob(top) for top in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def _to_logprob(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.token, "logprob": max(token.logprob, _LEAST_LOGPROB), "bytes": list(token.raw)}
