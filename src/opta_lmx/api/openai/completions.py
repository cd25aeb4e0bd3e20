"""POST /v1/completions: from OpenAI's request to one GenerateRequest for each prompt, and the generations back."""

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from opta_lmx.api.auth import caller_of
from opta_lmx.api.disconnect import generating
from opta_lmx.api.openai.completion_answer import TextAnswer, TextChunks, TextHead
from opta_lmx.api.openai.joint import Join, joining
from opta_lmx.api.openai.sampling import filled_from, to_sampling
from opta_lmx.api.openai.wire_text import Completion, CompletionRequest, read_inputs
from opta_lmx.api.openapi import MODEL_ERRORS, errors, event_stream, request_body
from opta_lmx.api.parsing import understand
from opta_lmx.api.routing import Router
from opta_lmx.api.services import Services
from opta_lmx.api.sse import EventStream, EventWriter, cache_header
from opta_lmx.api.validation import validate_request
from opta_lmx.config_models import Preset
from opta_lmx.errors import InvalidRequest, UnsupportedParameter
from opta_lmx.inference.engine import Generation, InferenceEngine
from opta_lmx.types import Encoded, GenerateRequest, JsonObject, Prompt, SamplingParams, TextPrompt

router = Router()

# OpenAI's, of a time when a completion was a line.
_DEFAULT_MAX_TOKENS: Final = 16
_NO_LIMIT: Final = -1


@router.post(
    "/v1/completions",
    tags=["OpenAI"],
    responses={
        **errors(*MODEL_ERRORS),
        200: {
            "model": Completion,
            "content": event_stream('data: {"object":"text_completion","choices":[...],...}\n\ndata: [DONE]\n\n'),
        },
    },
    openapi_extra=request_body(
        CompletionRequest,
        a_text={"model": "smollm2-135m-instruct", "prompt": "Once upon a time"},
        several_streamed={"model": "smollm2-135m-instruct", "prompt": ["One", "Two"], "max_tokens": 8, "stream": True},
    ),
)
async def create_completion(request: Request) -> Response:
    """Continue a text, or several at once, whole or (`stream: true`) as server-sent events."""
    services: Services = request.app.state.services
    work = partial(_understand, request.state.request_id, services.engine.preset)
    completion, wanted = await understand(request, work)
    caller = caller_of(request)
    first, *others = (msgspec.structs.replace(one, caller=caller) for one in wanted)
    head = TextHead(
        id=f"cmpl-{request.app.state.new_id()}",
        created=int(request.app.state.wall()),
        echoes=tuple(_echo(completion, wanted.prompt) for wanted in (first, *others) for _ in range(first.sampling.n)),
        logprobs=completion.logprobs is not None,
        scored=bool(completion.echo) and completion.logprobs is not None,
    )
    writer = partial(TextChunks, head, include_usage=_include_usage(completion))
    together = joining(services.engine, others, services.config.scheduling.max_running)
    if completion.stream:
        return _PromptStream(services.engine, first, writer, together)
    async with together as join, generating(services.engine, first, request.receive) as opened:
        generation = await join(opened)
        answer = TextAnswer(head, generation)
        async for deltas in generation:
            answer.add(deltas)
    content = answer.completion().model_dump_json()
    return Response(content, headers=cache_header(generation.cache), media_type="application/json")


def _understand(
    request_id: str, preset_of: Callable[[str], Preset | None], body: JsonObject
) -> tuple[CompletionRequest, list[GenerateRequest]]:
    completion = validate_request(CompletionRequest, body)
    return completion, to_generate_requests(completion, request_id, preset_of(completion.model))


class _PromptStream(EventStream):
    """An EventStream of several prompts; the headers wait until each of them has been accepted."""

    def __init__(
        self,
        engine: InferenceEngine,
        first: GenerateRequest,
        make_writer: Callable[[Generation], EventWriter],
        together: AbstractAsyncContextManager[Join],
    ) -> None:
        super().__init__(engine, first, make_writer)
        self._together = together
        self._join: Join

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises what ``engine.open`` raises for any of the prompts."""
        async with self._together as self._join:
            await super().__call__(scope, receive, send)

    async def _stream(self, generation: Generation, send: Send) -> None:
        await super()._stream(await self._join(generation), send)


def to_generate_requests(
    completion: CompletionRequest, request_id: str, preset: Preset | None = None
) -> list[GenerateRequest]:
    """One request for each prompt, without OpenAI, its gaps filled from ``preset``.

    Raises InvalidRequest or UnsupportedParameter naming what cannot be honoured.
    """
    prompts: Sequence[Prompt] = [TextPrompt("")]
    if completion.prompt is not None:
        prompts = read_inputs(completion.prompt, "prompt")
    if preset is not None:
        completion = filled_from(preset, completion)
    _refuse_unsupported(completion)
    sampling = _sampling(completion, in_tokens=not isinstance(prompts[0], TextPrompt))
    return [
        GenerateRequest(
            request_id=request_id if len(prompts) == 1 else f"{request_id}-{place}",
            model=completion.model,
            prompt=prompt,
            sampling=sampling,
            context_length=preset.context_length if preset is not None else None,
            ttl_seconds=completion.ttl,
        )
        for place, prompt in enumerate(prompts)
    ]


def _refuse_unsupported(completion: CompletionRequest) -> None:
    """What is understood but not served: filling in the middle, and choosing among more."""
    if completion.suffix:
        raise UnsupportedParameter("Filling in before a 'suffix' is not supported.", param="suffix")
    if completion.best_of is not None and completion.best_of != (completion.n or 1):
        raise UnsupportedParameter("'best_of' is only supported where it equals 'n'.", param="best_of")


def _sampling(completion: CompletionRequest, *, in_tokens: bool) -> SamplingParams:
    """``in_tokens``: the prompts were given as token ids, so only the model's worker knows their text."""
    max_tokens = _DEFAULT_MAX_TOKENS if completion.max_tokens is None else completion.max_tokens
    bound = None if max_tokens == _NO_LIMIT else max_tokens
    return to_sampling(
        completion,
        max_tokens=bound,
        logprobs=completion.logprobs,
        prompt_logprobs=completion.logprobs if completion.echo else None,
        echo_tokens=bool(completion.echo) and in_tokens,
    )


def _echo(completion: CompletionRequest, prompt: Prompt | Encoded) -> str:
    """What precedes the model's words in an answer to this prompt."""
    return prompt.text if completion.echo and isinstance(prompt, TextPrompt) else ""


def _include_usage(completion: CompletionRequest) -> bool:
    if completion.stream_options is None:
        return False
    if not completion.stream:
        raise InvalidRequest(
            "The 'stream_options' parameter is only allowed when 'stream' is enabled.",
            param="stream_options",
            code="invalid_value",
        )
    return bool(completion.stream_options.include_usage)
