"""POST /v1/chat/completions: from OpenAI's request to a GenerateRequest, and the generation back, whole or streamed."""

from collections.abc import Callable
from functools import partial
from typing import Final, TypeAlias

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from opta_lmx.api.auth import caller_of
from opta_lmx.api.disconnect import generating
from opta_lmx.api.large_bodies import understand_apart
from opta_lmx.api.openai.answer import AnswerHead, ChatAnswer, ChatChunks
from opta_lmx.api.openai.chat_examples import EXAMPLES
from opta_lmx.api.openai.messages import to_template_messages
from opta_lmx.api.openai.sampling import filled_from, to_sampling
from opta_lmx.api.openai.structured import to_structured
from opta_lmx.api.openai.tools import ToolUse, to_tool_use
from opta_lmx.api.openai.wire import ChatCompletion, ChatRequest
from opta_lmx.api.openapi import MODEL_ERRORS, errors, event_stream, request_body
from opta_lmx.api.parsing import is_quick, parse_object, read_pieces
from opta_lmx.api.routing import Router
from opta_lmx.api.services import Services
from opta_lmx.api.sse import EventStream, cache_header
from opta_lmx.api.validation import validate_request, wrong_value
from opta_lmx.config_models import Preset
from opta_lmx.errors import InvalidRequest, UnsupportedParameter
from opta_lmx.types import ChatPrompt, Encoded, GenerateRequest, JsonObject, SamplingParams

router = Router()

_Understood: TypeAlias = tuple[ChatRequest, ToolUse, GenerateRequest]

# What of a request its answer is written from.
_ANSWERED_BY: Final = ("logprobs", "metadata", "model", "n", "service_tier", "stream", "stream_options")

# Not variables of a template but arguments of the function that renders one: a client must not choose the template
# itself (it is code), nor what is done with its text.
_NOT_VARIABLES: Final = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)


@router.post(
    "/v1/chat/completions",
    tags=["OpenAI"],
    responses={
        **errors(*MODEL_ERRORS),
        200: {
            "model": ChatCompletion,
            "content": event_stream('data: {"object":"chat.completion.chunk","choices":[...],...}\n\ndata: [DONE]\n\n'),
        },
    },
    openapi_extra=request_body(ChatRequest, **EXAMPLES),
)
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation, whole or (`stream: true`) as server-sent events."""
    services: Services = request.app.state.services
    chat, use, wanted = await _read(request, services)
    head, logprobs = _head(chat, use, request), bool(chat.logprobs)
    writer = partial(ChatChunks, head, include_usage=_include_usage(chat), logprobs=logprobs)
    if chat.stream:
        return EventStream(services.engine, wanted, writer)
    async with generating(services.engine, wanted, request.receive) as generation:
        answer = ChatAnswer(head, generation, logprobs=logprobs)
        async for deltas in generation:
            answer.add(deltas)
    content = answer.completion().model_dump_json(exclude=_absent(chat))
    return Response(content, headers=cache_header(generation.cache), media_type="application/json")


async def _read(request: Request, services: Services) -> _Understood:
    pieces, request_id, caller = await read_pieces(request), request.state.request_id, caller_of(request)
    if is_quick(*pieces):
        chat, use, wanted = _understand(request_id, services.engine.preset, b"".join(pieces))
        return chat, use, msgspec.structs.replace(wanted, caller=caller)
    apart = partial(_understand_apart, request_id, services.engine.preset_finder())
    (chat, use, wanted), bulks = await understand_apart(apart, pieces)
    prompt, structured = map(Encoded, bulks)
    return chat, use, msgspec.structs.replace(wanted, prompt=prompt, structured=structured, caller=caller)


def _understand_apart(
    request_id: str, preset_of: Callable[[str], Preset | None], body: bytes
) -> tuple[_Understood, list[bytes]]:
    """What the answer is written from, and as a worker takes them the prompt and the grammar; runs in another process.

    The server's process makes no object of what the client sent in bulk.
    """
    chat, use, wanted = _understand(request_id, preset_of, body)
    bulks = [msgspec.msgpack.encode(part) for part in (wanted.prompt, wanted.structured)]
    told = ChatRequest.model_construct(messages=[], **{name: getattr(chat, name) for name in _ANSWERED_BY})
    return (told, use.sealed(), msgspec.structs.replace(wanted, prompt=Encoded(), structured=Encoded())), bulks


def _understand(request_id: str, preset_of: Callable[[str], Preset | None], body: bytes) -> _Understood:
    """All that is done with a request before it is handed on."""
    chat = validate_request(ChatRequest, parse_object(body))
    use = to_tool_use(chat)
    return chat, use, to_generate_request(chat, request_id, preset_of(chat.model), use=use)


def to_generate_request(
    chat: ChatRequest, request_id: str, preset: Preset | None = None, *, use: ToolUse | None = None
) -> GenerateRequest:
    """The request without OpenAI, its gaps filled from ``preset``; ``use`` None: it is not known yet how it uses tools.

    Raises InvalidRequest or UnsupportedParameter naming what cannot be honoured.
    """
    use = use or to_tool_use(chat)
    _refuse_unsupported(chat)
    note_media = preset is not None and preset.media == "note"
    messages, variables = to_template_messages(chat.messages, note_media=note_media), _template_kwargs(chat)
    if preset is not None:
        chat = filled_from(preset, chat)
        variables = {**preset.template_kwargs, **variables}
        if preset.system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": preset.system_prompt}, *messages]
    return GenerateRequest(
        request_id=request_id,
        model=chat.model,
        prompt=ChatPrompt(messages, [tool.shown for tool in use.shown] or None, variables),
        sampling=_sampling(chat),
        structured=use.grammar() or to_structured(chat, or_call=bool(use.tools)),
        context_length=preset.context_length if preset is not None else None,
        tool_format=preset.tool_format if preset is not None else None,
        reasoning_format=preset.reasoning_format if preset is not None else None,
        ttl_seconds=chat.ttl,
    )


def _refuse_unsupported(chat: ChatRequest) -> None:
    """What is understood but not served: output that is not text."""
    for modality in chat.modalities or ():
        if modality not in ("text", "audio"):
            raise wrong_value("modalities", modality, "'text' and 'audio'")
        if modality == "audio":
            raise UnsupportedParameter("Audio output is not supported.", param="modalities")
    if chat.audio is not None:
        raise UnsupportedParameter("Audio output is not supported.", param="audio")


def _sampling(chat: ChatRequest) -> SamplingParams:
    max_tokens = chat.max_completion_tokens if chat.max_completion_tokens is not None else chat.max_tokens
    return to_sampling(chat, max_tokens=max_tokens, logprobs=_logprobs(chat), thinking_budget=chat.thinking_budget)


def _logprobs(chat: ChatRequest) -> int | None:
    if chat.logprobs:
        return chat.top_logprobs or 0
    if chat.top_logprobs:
        raise InvalidRequest(
            "The 'top_logprobs' parameter is only allowed when 'logprobs' is true.",
            param="top_logprobs",
            code="invalid_value",
        )
    return None


def _template_kwargs(chat: ChatRequest) -> JsonObject:
    given = chat.chat_template_kwargs or {}
    for name in given:
        if name in _NOT_VARIABLES:
            param = f"chat_template_kwargs.{name}"
            raise UnsupportedParameter(f"{name!r} cannot be set by a request.", param=param)
    if chat.reasoning_effort is None:
        return given
    # Templates that know no degrees of thinking have a switch for it.
    switch = {"enable_thinking": False} if chat.reasoning_effort == "none" else {}
    return {"reasoning_effort": chat.reasoning_effort, **switch, **given}


def _include_usage(chat: ChatRequest) -> bool:
    if chat.stream_options is None:
        return False
    if not chat.stream:
        raise InvalidRequest(
            "The 'stream_options' parameter is only allowed when 'stream' is enabled.",
            param="stream_options",
            code="invalid_value",
        )
    return bool(chat.stream_options.include_usage)


def _head(chat: ChatRequest, use: ToolUse, request: Request) -> AnswerHead:
    return AnswerHead(
        id=f"chatcmpl-{request.app.state.new_id()}",
        created=int(request.app.state.wall()),
        choices=chat.n or SamplingParams().n,
        new_id=request.app.state.new_id,
        use=use,
        # The one tier there is.
        service_tier=None if chat.service_tier is None else "default",
        metadata=chat.metadata,
    )


def _absent(chat: ChatRequest) -> set[str]:
    """Keys of the answer that only echo what was sent, where it was not."""
    return {name for name in ("service_tier", "metadata") if getattr(chat, name) is None}
