"""POST /v1/completions: from OpenAI's request to one GenerateRequest for each prompt, and the generations back."""

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any, Final

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from opta_lmx.api.disconnect import generating
from opta_lmx.api.openai.completion_answer import TextAnswer, TextChunks, TextHead
from opta_lmx.api.openai.joint import Join, joining
from opta_lmx.api.openai.wire_text import Completion, CompletionRequest, read_inputs
from opta_lmx.api.openapi import request_body
from opta_lmx.api.parsing import read_object
from opta_lmx.api.services import Services
from opta_lmx.api.sse import EventStream, EventWriter, cache_header
from opta_lmx.api.validation import validate
from opta_lmx.config import Preset
from opta_lmx.errors import InvalidRequest, UnsupportedParameter
from opta_lmx.inference.engine import Generation, InferenceEngine
from opta_lmx.types import GenerateRequest, Prompt, SamplingParams, TextPrompt

router = APIRouter()

# OpenAI's, of a time when a completion was a line.
_DEFAULT_MAX_TOKENS: Final = 16
_NO_LIMIT: Final = -1

# Wire fields that are sampling parameters under the same name and meaning.
_SAME: Final = (
    "temperature",
    "top_p",
    "min_p",
    "seed",
    "n",
    "frequency_penalty",
    "presence_penalty",
    "min_tokens",
    "ignore_eos",
    "logprobs",
)


@router.post(
    "/v1/completions",
    tags=["OpenAI"],
    responses={200: {"model": Completion, "content": {"text/event-stream": {}}}},
    openapi_extra=request_body(CompletionRequest),
)
async def create_completion(request: Request) -> Response:
    """Continue a text, or several at once, whole or (`stream: true`) as server-sent events."""
    body = await read_object(request)
    # OpenAI answers this one case in its own words, and before it looks at anything else.
    if not body.get("model"):
        raise InvalidRequest("you must provide a model parameter")
    completion = validate(CompletionRequest, body)
    services: Services = request.app.state.services
    first, *others = to_generate_requests(
        completion, request.state.request_id, services.engine.preset(completion.model)
    )
    head = TextHead(
        id=f"cmpl-{request.app.state.new_id()}",
        created=int(request.app.state.wall()),
        echoes=tuple(_echo(completion, wanted.prompt) for wanted in (first, *others) for _ in range(first.sampling.n)),
        logprobs=completion.logprobs is not None,
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
        completion = _filled(completion, preset)
    _refuse_unsupported(completion, prompts)
    sampling = _sampling(completion)
    return [
        GenerateRequest(
            request_id=request_id if len(prompts) == 1 else f"{request_id}-{place}",
            model=completion.model,
            prompt=prompt,
            sampling=sampling,
            context_length=preset.context_length if preset is not None else None,
        )
        for place, prompt in enumerate(prompts)
    ]


def _filled(completion: CompletionRequest, preset: Preset) -> CompletionRequest:
    """The request with the preset's sampling where it brings none of its own."""
    given = preset.sampling.model_dump(exclude_none=True)
    own = {name for name in given if getattr(completion, name) is not None}
    if completion.repeat_penalty is not None:
        own.add("repetition_penalty")
    if "stop" in given:
        given["stop"] = list(given["stop"])
    return completion.model_copy(update={name: value for name, value in given.items() if name not in own})


def _refuse_unsupported(completion: CompletionRequest, prompts: Sequence[Prompt]) -> None:
    """What is understood but not served: filling in the middle, choosing among more, and scores of the prompt."""
    if completion.suffix:
        raise UnsupportedParameter("Filling in before a 'suffix' is not supported.", param="suffix")
    if completion.best_of is not None and completion.best_of != (completion.n or 1):
        raise UnsupportedParameter("'best_of' is only supported where it equals 'n'.", param="best_of")
    if completion.echo:
        if completion.logprobs is not None:
            raise UnsupportedParameter(
                "'echo' with 'logprobs' is not supported: tokens of the prompt are not scored.", param="echo"
            )
        if not all(isinstance(prompt, TextPrompt) for prompt in prompts):
            raise UnsupportedParameter("'echo' is only supported for prompts given as text.", param="echo")
    if completion.max_tokens == 0:
        if completion.echo:
            raise UnsupportedParameter("'max_tokens' 0 is not supported: the prompt is not scored.", param="max_tokens")
        raise InvalidRequest(
            "Invalid 'max_tokens': integer below minimum value. Expected a value >= 1, but got 0 instead.",
            param="max_tokens",
            code="integer_below_min_value",
        )


def _sampling(completion: CompletionRequest) -> SamplingParams:
    given: dict[str, Any] = {name: value for name in _SAME if (value := getattr(completion, name)) is not None}
    max_tokens = _DEFAULT_MAX_TOKENS if completion.max_tokens is None else completion.max_tokens
    if max_tokens != _NO_LIMIT and (completion.min_tokens or 0) > max_tokens:
        raise InvalidRequest(
            f"Invalid 'min_tokens': expected at most the {max_tokens} tokens of 'max_tokens'.",
            param="min_tokens",
            code="invalid_value",
        )
    if completion.top_k is not None:
        # Both 0 and -1 are in use for "all tokens".
        given["top_k"] = max(completion.top_k, 0)
    penalty = completion.repetition_penalty if completion.repetition_penalty is not None else completion.repeat_penalty
    if penalty is not None:
        given["repetition_penalty"] = penalty
    if completion.stop is not None:
        given["stop"] = (completion.stop,) if isinstance(completion.stop, str) else tuple(completion.stop)
    return SamplingParams(
        **given,
        max_tokens=None if max_tokens == _NO_LIMIT else max_tokens,
        stop_token_ids=tuple(completion.stop_token_ids or ()),
        logit_bias=_logit_bias(completion.logit_bias or {}),
    )


def _logit_bias(bias: dict[str, float]) -> dict[int, float]:
    for token in bias:
        # The bound keeps int() linear; no vocabulary comes near it.
        if not (token.isascii() and token.isdigit() and len(token) <= 9):
            raise InvalidRequest(
                "Invalid key in 'logit_bias': expected token ids, written as strings of digits.",
                param="logit_bias",
                code="invalid_value",
            )
    return {int(token): value for token, value in bias.items()}


def _echo(completion: CompletionRequest, prompt: Prompt) -> str:
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
