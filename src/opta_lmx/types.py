"""The values every room speaks: requests, answers, model facts, and the protocols that join rooms.

Layer 0: no HTTP, no process, no MLX. Structs cross the border to the worker (``inference/protocol.py``
encodes them); dataclasses stay on their side of it. Sizes are bytes, times are seconds.
"""

import signal
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import msgspec

JsonObject: TypeAlias = dict[str, Any]


class FinishReason(StrEnum):
    """Why a sequence ended. The api room maps it to each dialect's own word."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


class ChatPrompt(msgspec.Struct, frozen=True, tag="chat"):
    """A conversation, rendered in the worker by the model's own chat template."""

    messages: list[JsonObject]
    tools: list[JsonObject] | None = None
    template_kwargs: JsonObject = {}


class TextPrompt(msgspec.Struct, frozen=True, tag="text"):
    """A raw prompt, tokenised as it stands (special tokens as the tokenizer adds them)."""

    text: str


class TokenPrompt(msgspec.Struct, frozen=True, tag="tokens"):
    """A prompt already in the model's own token ids."""

    token_ids: list[int]


Prompt: TypeAlias = ChatPrompt | TextPrompt | TokenPrompt


@dataclass(frozen=True, slots=True)
class Encoded:
    """Part of a request as msgpack, in pieces: too large to be held, or written, by the server's process at once."""

    pieces: tuple[bytes, ...] = ()


class SamplingParams(msgspec.Struct, frozen=True):
    """How one request is sampled. The defaults are OpenAI's; ranges are checked by the api room.

    ``max_tokens`` None means up to the end of the context, 0 that the prompt is read and nothing made. ``logprobs``
    None means none, 0 the chosen token only, k the k most likely besides; ``prompt_logprobs`` is the same for the
    prompt's tokens. Choice i of ``n`` is seeded with ``seed + i``.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1
    # Tokens a model may think before it has to answer; None leaves that to the model.
    thinking_budget: int | None = None
    prompt_logprobs: int | None = None
    # Begin each choice with the text of the prompt's tokens.
    echo_tokens: bool = False


class Structured(msgspec.Struct, frozen=True):
    """A grammar the answer must follow. ``spec`` is a schema, a pattern, a list of choices or a Lark text.

    For ``tool_call`` it is a list of tools, each with ``name``, ``parameters`` (a schema) and ``field``: the answer is
    one call, ``{"name": ..., "arguments": {...}}``. ``field`` is where the client asked for it, for errors.
    ``or_call`` leaves the model free to call a tool instead, in its own format.
    """

    kind: Literal["json_object", "json_schema", "regex", "choice", "grammar", "tool_call"]
    spec: Any = None
    field: str = "response_format"
    or_call: bool = False


class Lane(StrEnum):
    """How urgent a request is: people wait for interactive ones, programs for batches."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


class Caller(msgspec.Struct, frozen=True):
    """Whose request it is, without the key. Requests of one ``name`` share one fair share, of ``weight``."""

    name: str = ""
    weight: float = 1.0
    lane: Lane = Lane.INTERACTIVE


ANYBODY = Caller()


class GenerateRequest(msgspec.Struct, frozen=True):
    """One accepted request, free of any dialect. ``model`` is the name the client used."""

    request_id: str
    model: str
    prompt: Prompt | Encoded
    sampling: SamplingParams = SamplingParams()
    structured: Structured | Encoded | None = None
    # A bound of the caller's own, in tokens of prompt and answer; None leaves the model's.
    context_length: int | None = None
    # How the model writes calls and reasoning, in the words of ``inference/output/formats.py``, "none" for not at all;
    # None leaves what the model's worker found.
    tool_format: str | None = None
    reasoning_format: str | None = None
    # Idle seconds before the model is unloaded, if this request is what loads it; None leaves the settings'.
    ttl_seconds: float | None = None
    caller: Caller = ANYBODY


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability (natural) of one token; ``top`` holds the most likely alternatives, best first."""

    token: str
    logprob: float
    raw: bytes
    top: list["TokenLogprob"] = []


class Delta(msgspec.Struct, frozen=True, array_like=True):
    """What one step added to one choice. ``text`` may be empty while a character or stop string is held back.

    ``token_count`` counts the tokens the model made for it, the end-of-sequence token included. The first delta of a
    choice has the prompt's ``logprobs`` before its own where they were asked for; the prompt's first token has none
    (0, without alternatives), since nothing precedes it.
    """

    choice: int
    text: str
    token_count: int
    finish: FinishReason | None = None
    logprobs: list[TokenLogprob] | None = None


class CacheReport(msgspec.Struct, frozen=True):
    """How much of a prompt the prefix cache served, and why it stopped where it did."""

    hit_tokens: int = 0
    miss_at: int = 0
    cause: str = "off"


class ModelFacts(msgspec.Struct, frozen=True):
    """What a worker knows of its model once loaded."""

    model_type: str
    context_length: int
    vocab_size: int
    weights_bytes: int
    kv_bytes_per_token: int
    has_chat_template: bool
    prefix_cache: str = "off"
    # How it writes tool calls and reasoning, in the words of ``inference/output/formats.py``; None: as plain text.
    tool_format: str | None = None
    reasoning_format: str | None = None

    def as_wanted(self, tool_format: str | None, reasoning_format: str | None) -> "ModelFacts":
        """The same model with what somebody says of its formats, as in GenerateRequest; None leaves one as it is."""
        formats = {"tool_format": tool_format, "reasoning_format": reasoning_format}
        said = {field: None if name == "none" else name for field, name in formats.items() if name is not None}
        return msgspec.structs.replace(self, **said) if said else self


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on disk, as the catalog found it without reading a tensor.

    ``weights_bytes`` is the exact sum of the tensors in the safetensors headers; of a GGUF not imported yet, of those
    its import will have. ``layers``, ``kv_heads`` and ``head_dim`` give the KV cache's shape; None where config.json
    does not say. ``problem`` says why it cannot be loaded.
    """

    id: str
    path: Path
    format: Literal["mlx", "gguf"]
    size_bytes: int
    weights_bytes: int
    model_type: str | None
    context_length: int | None
    quantization: str | None
    layers: int | None
    kv_heads: int | None
    head_dim: int | None
    created: int
    verified: bool = False
    problem: str | None = None
    echo: "EchoOptions | None" = None
    vocab_size: int | None = None


class LoadOptions(msgspec.Struct, frozen=True):
    """What the server decides about one worker before it starts."""

    max_running: int = 32
    prefill_chunk_tokens: int = 512
    stall_bound_seconds: float = 0.25
    prefix_cache_bytes: int = 0
    # KV cache set aside for all running sequences together; None leaves it unbounded.
    kv_bytes: int | None = None
    context_length: int | None = None
    # Bounds of the worker's MLX, None for its own: all it holds, and below what is kept for reuse only and what is
    # wired (Metal). The first and the last rise by what KvGrant adds to ``kv_bytes``.
    memory_limit_bytes: int | None = None
    kv_bits: int | None = None
    echo: "EchoOptions | None" = None
    # The model was loaded and used before in this server's life.
    reloaded: bool = False
    cache_limit_bytes: int | None = None
    wired_limit_bytes: int | None = None
    # As in GenerateRequest; None leaves what the model's chat template shows.
    tool_format: str | None = None
    reasoning_format: str | None = None


class EchoOptions(msgspec.Struct, frozen=True):
    """Turns a worker into the echo backend: deterministic tokens, set speed, set failures; no MLX.

    The ``*_at`` marks count generated tokens over the worker's life; None means never.
    """

    token_seconds: float = 0.0
    load_seconds: float = 0.0
    prefill_seconds_per_token: float = 0.0
    context_length: int = 4096
    fail_load: str | None = None
    exit_at: int | None = None
    hang_at: int | None = None


@dataclass(frozen=True, slots=True)
class WorkerExit:
    """How a worker process ended. ``stderr_tail`` holds its last lines, already free of prompt text."""

    pid: int
    exit_code: int | None
    stderr_tail: str
    expected: bool
    # Why the server killed it, if it did so unasked.
    killed_for: str | None = None

    def __str__(self) -> str:
        """How it ended, in words, with its last line."""
        if self.killed_for is not None:
            return self.killed_for
        code = self.exit_code
        if code is None:
            how = "no exit code"
        elif code < 0:
            how = f"signal {signal.Signals(-code).name}"
        else:
            how = f"exit code {code}"
        last = self.stderr_tail.strip().rsplit("\n", 1)[-1]
        return f"{how}: {last}" if last else how


class ModelState(StrEnum):
    """absent -> loading -> ready -> stopping -> absent; failed keeps its reason until the next load."""

    ABSENT = "absent"
    LOADING = "loading"
    READY = "ready"
    STOPPING = "stopping"
    FAILED = "failed"


class Worker(Protocol):
    """A loaded model's process, as the residency sees it."""

    @property
    def pid(self) -> int: ...
    @property
    def facts(self) -> ModelFacts: ...
    @property
    def busy(self) -> bool:
        """True while a request is with it."""
        ...

    @property
    def progress(self) -> int:
        """Changes with every step it reports."""
        ...

    def govern_kv(self, decide: Callable[[int | None], int]) -> None:
        """Who answers its wishes for KV memory with the bytes it may take; None tells that it is idle."""
        ...

    def kill(self, reason: str) -> None:
        """End the process at once; ``reason`` is what its exit then says."""
        ...

    async def stop(self, grace_seconds: float) -> None:
        """End the process (ask, signal, kill); returns once it has been reaped. Safe to call twice."""
        ...


class SpawnWorker(Protocol):
    """Starts a worker and waits until its model is loaded.

    Raises LoadFailed or WorkerLost, and leaves no process behind when it does. ``on_exit`` is called once, on
    the event loop, when a worker that had been returned has ended, whoever ended it.
    """

    async def __call__(
        self, model: ModelFiles, options: LoadOptions, on_exit: Callable[[WorkerExit], None]
    ) -> Worker: ...


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """One look at the machine. ``used_bytes`` is what the system does not report as available.

    ``working_set_bytes`` is Metal's recommended working set, None where there is no Metal.
    """

    total_bytes: int
    used_bytes: int
    working_set_bytes: int | None
    at: float


class MemoryProbe(Protocol):
    """Reads the machine's memory: psutil in production, a script in tests."""

    def read(self) -> MemoryReading: ...


class TaskStarter(Protocol):
    """Starts a coroutine function in a task that somebody owns, as an anyio TaskGroup does."""

    def start_soon(self, func: Callable[..., Coroutine[Any, Any, object]], /, *args: object) -> object: ...
