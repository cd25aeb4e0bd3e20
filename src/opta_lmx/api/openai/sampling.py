"""What OpenAI's two text routes say about sampling, in the words they share."""

from typing import Any, Final, TypeVar

from opta_lmx.api.openai.wire import ChatRequest
from opta_lmx.api.openai.wire_text import CompletionRequest
from opta_lmx.config_models import Preset
from opta_lmx.errors import InvalidRequest
from opta_lmx.types import SamplingParams

TextRequest = TypeVar("TextRequest", ChatRequest, CompletionRequest)

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
)


def filled_from(preset: Preset, request: TextRequest) -> TextRequest:
    """The request with the preset's sampling where it brings none of its own, under any spelling."""
    given = preset.sampling.model_dump(exclude_none=True)
    own = {name for name in given if getattr(request, name) is not None}
    if getattr(request, "max_completion_tokens", None) is not None:
        own.add("max_tokens")
    if request.repeat_penalty is not None:
        own.add("repetition_penalty")
    if "stop" in given:
        given["stop"] = list(given["stop"])
    return request.model_copy(update={name: value for name, value in given.items() if name not in own})


def to_sampling(
    request: ChatRequest | CompletionRequest, *, max_tokens: int | None, logprobs: int | None, **more: Any
) -> SamplingParams:
    """The sampling parameters of a request; what the routes spell differently is given.

    Raises InvalidRequest for ``min_tokens`` above ``max_tokens`` and for a ``logit_bias`` whose keys are no token ids.
    """
    given: dict[str, Any] = {name: value for name in _SAME if (value := getattr(request, name)) is not None}
    if max_tokens is not None and (request.min_tokens or 0) > max_tokens:
        raise InvalidRequest(
            f"Invalid 'min_tokens': expected at most the {max_tokens} tokens of 'max_tokens'.",
            param="min_tokens",
            code="invalid_value",
        )
    if request.top_k is not None:
        # Both 0 and -1 are in use for "all tokens".
        given["top_k"] = max(request.top_k, 0)
    penalty = request.repetition_penalty if request.repetition_penalty is not None else request.repeat_penalty
    if penalty is not None:
        given["repetition_penalty"] = penalty
    if request.stop is not None:
        given["stop"] = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)
    return SamplingParams(
        **given,
        **more,
        max_tokens=max_tokens,
        logprobs=logprobs,
        stop_token_ids=tuple(request.stop_token_ids or ()),
        logit_bias=_logit_bias(request.logit_bias or {}),
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
