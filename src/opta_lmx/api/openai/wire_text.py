"""OpenAI's JSON shapes for completions and embeddings, and Jina's and Cohere's for reranking.

Like ``wire.py``, whose types these are made of. An input of several forms (text, texts, token ids, lists of token ids)
is ``Any`` to pydantic and is read by ``read_inputs``, whose errors name the item at fault.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag, WithJsonSchema

from opta_lmx.api.openai.wire import (
    MAX_CHOICES,
    SYSTEM_FINGERPRINT,
    Count,
    Divisor,
    Fraction,
    Integer,
    LogitBias,
    Penalty,
    StreamOptions,
    Text,
    Ttl,
    Usage,
    Wire,
)
from opta_lmx.api.validation import wrong_type
from opta_lmx.errors import InvalidRequest
from opta_lmx.types import TextPrompt, TokenPrompt

# OpenAI's bound for embeddings; more in one body is a job for several requests.
MAX_INPUTS = 2048

_MAX_INT32 = 2**31 - 1
_MAX_INT64 = 2**63 - 1

_FORMS = "a string, an array of strings, or an array of token ids"

_TOKEN_IDS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": _MAX_INT32}}

ModelName: TypeAlias = Annotated[str, Field(min_length=1, max_length=512)]
Inputs: TypeAlias = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "minItems": 1, "maxItems": MAX_INPUTS, "items": {"type": "string"}},
                _TOKEN_IDS,
                {"type": "array", "minItems": 1, "maxItems": MAX_INPUTS, "items": _TOKEN_IDS},
            ]
        }
    ),
]


def read_inputs(value: object, param: str) -> list[TextPrompt | TokenPrompt]:
    """A text, texts, token ids or lists of token ids as one prompt each, in order; empty texts are let through.

    Raises InvalidRequest naming the item at fault, for an empty array and for more than MAX_INPUTS items too.
    """
    if isinstance(value, str):
        return [TextPrompt(value)]
    if not isinstance(value, list):
        raise wrong_type(param, _FORMS, value)
    if not value:
        raise _empty(param)
    if _is_token(value[0]):
        return [TokenPrompt(_token_ids(value, param))]
    if len(value) > MAX_INPUTS:
        raise _too_many(param, value)
    return [_read_input(item, f"{param}[{at}]") for at, item in enumerate(value)]


def _read_input(item: object, param: str) -> TextPrompt | TokenPrompt:
    if isinstance(item, str):
        return TextPrompt(item)
    if not isinstance(item, list):
        raise wrong_type(param, "a string or an array of token ids", item)
    if not item:
        raise _empty(param)
    return TokenPrompt(_token_ids(item, param))


def _is_token(value: object) -> bool:
    """5.0 is the integer 5, as everywhere in a request."""
    if isinstance(value, float):
        return value.is_integer()
    return isinstance(value, int) and not isinstance(value, bool)


def _token_ids(items: Sequence[Any], param: str) -> list[int]:
    for at, item in enumerate(items):
        if not _is_token(item):
            raise wrong_type(f"{param}[{at}]", "a token id", item)
        if not 0 <= item <= _MAX_INT32:
            raise InvalidRequest(f"Invalid token id {int(item)}.", param=f"{param}[{at}]", code="invalid_value")
    return [int(item) for item in items]


def _empty(param: str) -> InvalidRequest:
    return InvalidRequest(
        f"Invalid {param!r}: empty array. Expected an array with minimum length 1, but got an empty array instead.",
        param=param,
        code="empty_array",
    )


def _too_many(param: str, items: Sequence[Any]) -> InvalidRequest:
    return InvalidRequest(
        f"Invalid {param!r}: array too long. Expected an array with maximum length {MAX_INPUTS}, "
        f"but got an array with length {len(items)} instead.",
        param=param,
        code="array_above_max_length",
    )


def _shape(value: object) -> str | None:
    """Which form of a field the client wrote, so that an error is about that one."""
    if isinstance(value, str):
        return "<string>"
    if isinstance(value, dict):
        return "<object>"
    return "<array>" if isinstance(value, list) else None


# -- completions --------------------------------------------------------------------------------------


class CompletionRequest(Wire):
    """The body of POST /v1/completions. ``prompt`` absent is the beginning of a text."""

    model: Annotated[ModelName, Field(examples=["smollm2-135m-instruct"])]
    prompt: Annotated[Inputs, Field(examples=["Once upon a time"])] = None
    suffix: str | None = None
    # 16 where it is absent; -1 is LM Studio's word for no limit.
    max_tokens: Annotated[Integer, Field(ge=-1, le=_MAX_INT32)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Fraction | None = None
    top_k: Annotated[Integer, Field(ge=-1, le=_MAX_INT32)] | None = None
    min_p: Fraction | None = None
    seed: Annotated[Integer, Field(ge=-_MAX_INT64 - 1, le=_MAX_INT64)] | None = None
    n: Annotated[Integer, Field(ge=1, le=MAX_CHOICES)] | None = None
    best_of: Annotated[Integer, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    logprobs: Annotated[Integer, Field(ge=0, le=5)] | None = None
    stop: (
        Annotated[
            Annotated[Text, Tag("<string>")] | Annotated[list[Text], Field(max_length=4), Tag("<array>")],
            Discriminator(
                _shape, custom_error_type="invalid_type", custom_error_message="a string or an array of strings"
            ),
        ]
        | None
    ) = None
    stop_token_ids: Annotated[list[Count], Field(fail_fast=True)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Divisor | None = None
    repeat_penalty: Divisor | None = None
    logit_bias: LogitBias | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    ttl: Ttl | None = None


class CompletionLogprobs(Wire):
    """One entry for each token of the choice; ``text_offset`` counts characters from the start of its text.

    With ``echo`` the prompt's tokens come first, the very first without a probability: nothing precedes it.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Wire):
    """One of ``n`` answers to one of the prompts: prompt ``index // n``, answer ``index % n``."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length", "content_filter"]


class Completion(Wire):
    """The answer to a completion request that does not stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str = SYSTEM_FINGERPRINT


# -- embeddings ---------------------------------------------------------------------------------------


class EmbeddingsRequest(Wire):
    """The body of POST /v1/embeddings."""

    model: Annotated[ModelName, Field(examples=["all-minilm-l6-v2"])]
    input: Annotated[Inputs, Field(examples=[["What is the capital of France?", "Paris"]])]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[Integer, Field(ge=1, le=_MAX_INT32)] | None = None
    user: str | None = None
    ttl: Ttl | None = None


class Embedding(Wire):
    """The vector of one input: numbers, or base64 of float32 in little-endian order."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Wire):
    """Exactly the tokens the model read, special ones included."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Wire):
    """One embedding for each input, in the order of the inputs."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


# -- rerank -------------------------------------------------------------------------------------------


class TextDocument(Wire):
    """A document as an object."""

    text: Text


class RerankRequest(Wire):
    """The body of POST /v1/rerank, as Jina and Cohere write it."""

    model: Annotated[ModelName, Field(examples=["all-minilm-l6-v2"])]
    query: Annotated[Text, Field(examples=["What is the capital of France?"])]
    documents: Annotated[
        list[
            Annotated[
                Annotated[Text, Tag("<string>")] | Annotated[TextDocument, Tag("<object>")],
                Discriminator(
                    _shape, custom_error_type="invalid_type", custom_error_message="a string or an object with 'text'"
                ),
            ]
        ],
        Field(
            fail_fast=True,
            min_length=1,
            max_length=MAX_INPUTS,
            examples=[["Berlin is in Germany.", "Paris is in France."]],
        ),
    ]
    top_n: Annotated[Integer, Field(ge=1, le=_MAX_INT32)] | None = None
    return_documents: bool | None = None
    ttl: Ttl | None = None


class RerankResult(Wire):
    """One document: its place in the request, its score, and its text where that was asked for."""

    index: int
    relevance_score: float
    document: TextDocument | None = None


class RerankAnswer(Wire):
    """The documents, most relevant first."""

    id: str
    object: Literal["list"] = "list"
    model: str
    results: list[RerankResult]
    usage: EmbeddingUsage
