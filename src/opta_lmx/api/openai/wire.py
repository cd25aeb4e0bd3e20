"""OpenAI's JSON shapes for chat completions and models, as pydantic types that go no further than this room.

Requests ignore keys they do not know, since real clients send other servers' fields. A field that is None was absent
or null: defaults of sampling live in ``types.SamplingParams`` and nowhere else. Types are strict: "5" is no number.
Arrays fail at their first bad item, or a body of a million mistakes would make a million errors.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from opta_lmx import __version__

# The same choices at once would be a batch of their own; OpenAI's 128 is meant for another scale of machine.
MAX_CHOICES = 16

MAX_TOOLS = 128

# What made the answer; OpenAI's word for it. Schemas of the API know it as text, never null.
SYSTEM_FINGERPRINT = f"opta-lmx-{__version__}"

_MAX_INT32 = 2**31 - 1
_MAX_INT64 = 2**63 - 1


def _integral(value: object) -> object:
    """5.0 is the integer 5: JSON knows one kind of number, and some languages write it so."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _unlimited(value: object) -> object:
    """LM Studio's clients write "no limit" as -1."""
    return None if value == -1 and not isinstance(value, bool) else value


_TAGS: Mapping[type, str] = {str: "<string>", list: "<array>", dict: "<object>"}


def _shape(value: object) -> str | None:
    return _TAGS.get(type(value))


def _either(expected: str) -> Discriminator:
    """Chooses a union's member by what the client wrote, so that an error is about that one; else "expected ..."."""
    return Discriminator(_shape, custom_error_type="invalid_type", custom_error_message=expected)


Integer: TypeAlias = Annotated[int, BeforeValidator(_integral)]
Count: TypeAlias = Annotated[Integer, Field(ge=0, le=_MAX_INT32)]
TokenLimit: TypeAlias = Annotated[Annotated[Integer, Field(ge=1, le=_MAX_INT32)] | None, BeforeValidator(_unlimited)]
Penalty: TypeAlias = Annotated[float, Field(ge=-2, le=2)]
Divisor: TypeAlias = Annotated[float, Field(gt=0, le=10)]
Fraction: TypeAlias = Annotated[float, Field(ge=0, le=1)]
# LM Studio's field: idle seconds before a model that this request loads is unloaded.
Ttl: TypeAlias = Annotated[float, Field(gt=0, le=_MAX_INT32)]
Text: TypeAlias = Annotated[str, Field(min_length=1)]
FunctionName: TypeAlias = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
LogitBias: TypeAlias = Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=10_000)]
Metadata: TypeAlias = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


class Wire(BaseModel):
    """A JSON object of OpenAI's API."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


# -- chat request -----------------------------------------------------------------------------------


class ContentPart(Wire):
    """One part of a message: ``text`` and ``refusal`` are read, images, audio and files refused by name."""

    type: str
    text: str | None = None
    refusal: str | None = None


class FunctionCall(Wire):
    """A function's name and its arguments, a text of JSON."""

    name: str
    arguments: str


class ToolCall(Wire):
    """A call the assistant made earlier in the conversation."""

    model_config = ConfigDict(extra="allow")

    id: str | None = None
    type: str = "function"
    function: FunctionCall | None = None


class Message(Wire):
    """One message; keys that are not OpenAI's (``reasoning_content``, ...) are carried to the chat template."""

    model_config = ConfigDict(extra="allow")

    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: (
        Annotated[
            Annotated[str, Tag("<string>")] | Annotated[list[ContentPart], Field(fail_fast=True), Tag("<array>")],
            _either("a string or an array of objects"),
        ]
        | None
    ) = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    function_call: FunctionCall | None = None


class FunctionTool(Wire):
    """A function the model may call; ``parameters`` is a JSON Schema, checked in ``tools.py``."""

    name: FunctionName
    description: str | None = None
    parameters: Any = None
    strict: bool | None = None


class Tool(Wire):
    """A tool the model may call; ``custom`` ones are refused by name."""

    type: Literal["function", "custom"]
    function: FunctionTool | None = None


class NamedFunction(Wire):
    """A function by its name."""

    name: str


class NamedTool(Wire):
    """A tool by its name."""

    type: Literal["function", "custom"]
    function: NamedFunction | None = None


class AllowedTools(Wire):
    """The tools that may be called, of those in ``tools``."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(fail_fast=True, min_length=1, max_length=MAX_TOOLS)]


class ToolChoice(Wire):
    """Which tool must be called, or which may be."""

    type: Literal["function", "custom", "allowed_tools"]
    function: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None


class StreamOptions(Wire):
    """``include_usage`` asks for a last chunk with the counts of tokens."""

    include_usage: bool | None = None


class JsonSchemaFormat(Wire):
    """A named JSON Schema; without ``schema`` any object will do. Answers follow it whether or not ``strict``."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Wire):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


Choices: TypeAlias = Annotated[list[Text], Field(min_length=1, max_length=1000)]


class StructuredOutputs(Wire):
    """vLLM's way to ask for a form: one of a JSON Schema, a regular expression, choices, or a Lark grammar."""

    json_: dict[str, Any] | None = Field(default=None, alias="json")
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None


class ChatRequest(Wire):
    """The body of POST /v1/chat/completions."""

    model: Annotated[str, Field(min_length=1, max_length=512, examples=["smollm2-135m-instruct"])]
    messages: Annotated[
        list[Message],
        Field(fail_fast=True, min_length=1, examples=[[{"role": "user", "content": "What is the capital of France?"}]]),
    ]
    max_tokens: TokenLimit = None
    max_completion_tokens: TokenLimit = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Fraction | None = None
    top_k: Annotated[Integer, Field(ge=-1, le=_MAX_INT32)] | None = None
    min_p: Fraction | None = None
    seed: Annotated[Integer, Field(ge=-_MAX_INT64 - 1, le=_MAX_INT64)] | None = None
    n: Annotated[Integer, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: (
        Annotated[
            Annotated[Text, Tag("<string>")] | Annotated[list[Text], Field(max_length=4), Tag("<array>")],
            _either("a string or an array of strings"),
        ]
        | None
    ) = None
    stop_token_ids: Annotated[list[Count], Field(fail_fast=True)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Divisor | None = None
    repeat_penalty: Divisor | None = None
    logit_bias: LogitBias | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Integer, Field(ge=0, le=20)] | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | None = None
    guided_regex: Text | None = None
    guided_choice: Choices | None = None
    guided_grammar: Text | None = None
    thinking_budget: Count | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: (
        Annotated[
            Annotated[Literal["none", "auto", "required"], Tag("<string>")] | Annotated[ToolChoice, Tag("<object>")],
            _either("a string or an object"),
        ]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[FunctionTool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    function_call: (
        Annotated[
            Annotated[Literal["none", "auto"], Tag("<string>")] | Annotated[NamedFunction, Tag("<object>")],
            _either("a string or an object"),
        ]
        | None
    ) = None
    modalities: Annotated[list[str], Field(fail_fast=True)] | None = None
    audio: dict[str, Any] | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    user: str | None = None
    store: bool | None = None
    ttl: Ttl | None = None


# -- chat answer ------------------------------------------------------------------------------------


class TopLogprob(Wire):
    """One likely token; ``bytes`` is its UTF-8, also where ``token`` holds only part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class Logprob(TopLogprob):
    """A token of the answer with the most likely alternatives, best first."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(Wire):
    """One entry for each token of the choice."""

    content: list[Logprob] | None
    refusal: list[Logprob] | None = None


class AnswerCall(Wire):
    """A call of a tool; ``arguments`` is a text of JSON, as the model wrote it."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


def _left_out(value: object) -> bool:
    return value is None


class AnswerMessage(Wire):
    """What the model said. ``content`` is null where it only called tools; keys without a value are left out.

    Reasoning stands under both names in use.
    """

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: str | None = None
    annotations: list[Any] = []
    reasoning_content: str | None = Field(default=None, exclude_if=_left_out)
    reasoning: str | None = Field(default=None, exclude_if=_left_out)
    tool_calls: list[AnswerCall] | None = Field(default=None, exclude_if=_left_out)
    function_call: FunctionCall | None = Field(default=None, exclude_if=_left_out)


class Choice(Wire):
    """One of ``n`` answers."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls", "content_filter", "function_call"]


class PromptDetails(Wire):
    """``cached_tokens`` of the prompt came from the prefix cache."""

    cached_tokens: int = 0
    audio_tokens: int = 0


class CompletionDetails(Wire):
    """What the completion's tokens were spent on."""

    reasoning_tokens: int = 0
    audio_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


class Usage(Wire):
    """Exactly the tokens the model saw and made."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class ChatCompletion(Wire):
    """The answer to a chat request that does not stream."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    service_tier: str | None = None
    system_fingerprint: str = SYSTEM_FINGERPRINT
    metadata: dict[str, str] | None = None


# -- models and errors ------------------------------------------------------------------------------


class ModelCard(Wire):
    """A name that requests may use."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(Wire):
    """All names that requests may use."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(Wire):
    """What went wrong; ``param`` is the path of the field at fault."""

    model_config = ConfigDict(extra="allow")

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Wire):
    """Every error, on every route."""

    error: ErrorDetail
