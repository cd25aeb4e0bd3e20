"""The frames server and worker speak over one socketpair: a 4-byte big-endian length, then msgpack.

Both sides import this module and nothing else of each other. ``VERSION`` rises with any change of a frame's
meaning; the worker's Hello carries it, and a mismatch ends the worker before it loads anything.
"""

import struct
from typing import Literal, TypeAlias

import msgspec

from opta_lmx.types import (
    CacheReport,
    Delta,
    Encoded,
    LoadOptions,
    ModelFacts,
    Prompt,
    SamplingParams,
    Structured,
    TextPrompt,
    TokenPrompt,
)

VERSION = 4

# A frame past this is a broken peer, not a big request: the api room refuses bodies far smaller.
MAX_FRAME_BYTES = 256 * 1024 * 1024

_LENGTH = struct.Struct(">I")


class ProtocolError(Exception):
    """The peer sent bytes that are not frames of this protocol."""


# -- server to worker -----------------------------------------------------------------------------


class Load(msgspec.Struct, frozen=True, tag="load"):
    """Load the model in directory ``path``; answered by Ready or LoadError. ``embeds``: it is an encoder."""

    model_id: str
    path: str
    options: LoadOptions
    embeds: bool = False


class Generate(msgspec.Struct, frozen=True, tag="generate"):
    """Start request ``id`` (unique on this pipe); answered by Started or Refused, then Deltas."""

    id: int
    request_id: str
    prompt: Prompt
    sampling: SamplingParams
    structured: Structured | None = None
    context_length: int | None = None
    tool_format: str | None = None
    reasoning_format: str | None = None


class Embed(msgspec.Struct, frozen=True, tag="embed"):
    """One vector for each input, cut to ``dimensions``; answered by Embedded, Refused or Failed."""

    id: int
    inputs: list[TextPrompt | TokenPrompt]
    dimensions: int | None = None


class Rank(msgspec.Struct, frozen=True, tag="rank"):
    """How relevant each document is to the query; answered by Ranked, Refused or Failed."""

    id: int
    query: str
    documents: list[str]


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Stop request ``id`` at the next step; answered by its final Delta unless it had ended already.

    What a Cancel ends of Embed and Rank is answered by Failed.
    """

    id: int


class KvGrant(msgspec.Struct, frozen=True, tag="kv_grant"):
    """The bytes all running sequences' caches may take together: the answer to KvWant."""

    granted_bytes: int


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """End the process after the current step."""


# -- worker to server -----------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """First frame of a worker: its imports are done and it can take a Load."""

    version: int
    pid: int


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The model is loaded. ``load_seconds`` is the worker's own time from Load to here."""

    facts: ModelFacts
    load_seconds: float
    footprint_bytes: int


class LoadError(msgspec.Struct, frozen=True, tag="load_error"):
    """The model could not be loaded; the worker ends after this frame."""

    reason: str


class Started(msgspec.Struct, frozen=True, tag="started"):
    """Request ``id`` has entered the batch. No refusal comes after this."""

    id: int
    prompt_tokens: int
    cache: CacheReport
    # The prompt ends inside a block of reasoning that the template opened.
    in_reasoning: bool = False


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """Request ``id`` was not taken: the parts of the RequestRejected that says why. Numbers are tokens."""

    id: int
    kind: Literal["context", "unsupported", "invalid", "memory"]
    message: str
    param: str | None = None
    code: str | None = None
    prompt_tokens: int = 0
    context_length: int = 0


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Request ``id`` died inside a living worker after it was taken; nothing follows for this id."""

    id: int
    message: str


class Embedded(msgspec.Struct, frozen=True, tag="embedded"):
    """The vectors of an Embed, in the order of its inputs: float32, little-endian, ``dimensions`` numbers each.

    ``prompt_tokens`` counts what the model read, special tokens included.
    """

    id: int
    vectors: bytes
    dimensions: int
    prompt_tokens: int


class Ranked(msgspec.Struct, frozen=True, tag="ranked"):
    """The scores of a Rank, in the order of its documents; ``prompt_tokens`` as in Embedded."""

    id: int
    scores: list[float]
    prompt_tokens: int


class Step(msgspec.Struct, frozen=True, tag="step"):
    """Everything one step made, for all requests at once: (id, delta) pairs.

    ``running`` and ``waiting`` are sequences after the step; ``steps`` counts since the load and is the
    server's measure of progress.
    """

    steps: int
    running: int
    waiting: int
    deltas: list[tuple[int, Delta]]


class KvWant(msgspec.Struct, frozen=True, tag="kv_want"):
    """The caches would need this many bytes together for the next sequence, or for the running ones to grow."""

    bytes: int


class Idle(msgspec.Struct, frozen=True, tag="idle"):
    """The worker has no work left, and gives back what KvGrant added.

    ``active_bytes`` is MLX's live memory, ``cache_bytes`` what its prefix cache holds.
    """

    steps: int
    active_bytes: int
    cache_bytes: int


FromServer: TypeAlias = Load | Generate | Embed | Rank | Cancel | KvGrant | Stop
FromWorker: TypeAlias = (
    Hello | Ready | LoadError | Started | Refused | Failed | Embedded | Ranked | Step | KvWant | Idle
)

# 0xc1 begins nothing in msgpack, is no part of UTF-8, and of a number eight bytes at most: no frame has it so often.
_NO_MSGPACK = b"\xc1" * 16
_STAND_IN = msgspec.Raw(_NO_MSGPACK)

_encoder = msgspec.msgpack.Encoder()
_from_server: msgspec.msgpack.Decoder[FromServer] = msgspec.msgpack.Decoder(FromServer)
_from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)


def encode(frame: FromServer | FromWorker) -> bytes:
    """One frame as bytes, length prefix included."""
    body = _encoder.encode(frame)
    return _LENGTH.pack(len(body)) + body


def encode_around(frame: Generate, **parts: Encoded) -> list[bytes]:
    """``encode`` in pieces, with ``parts`` in the place of the frame's own fields, none of their pieces copied."""
    stand_in = msgspec.structs.replace(frame, **dict.fromkeys(parts, _STAND_IN))
    first, *rest = _encoder.encode(stand_in).split(_NO_MSGPACK)
    in_order = [parts[name] for name in frame.__struct_fields__ if name in parts]
    pieces = [first]
    for part, after in zip(in_order, rest, strict=True):
        pieces += [*part.pieces, after]
    return [_LENGTH.pack(sum(map(len, pieces))), *pieces]


def decode_from_server(body: bytes | memoryview) -> FromServer:
    """Raises ProtocolError if the body is no frame a server sends."""
    try:
        return _from_server.decode(body)
    except msgspec.MsgspecError as error:
        raise ProtocolError(str(error)) from error


def decode_from_worker(body: bytes | memoryview) -> FromWorker:
    """Raises ProtocolError if the body is no frame a worker sends."""
    try:
        return _from_worker.decode(body)
    except msgspec.MsgspecError as error:
        raise ProtocolError(str(error)) from error


class FrameSplitter:
    """Cuts a byte stream into frame bodies, whatever the sizes of the reads."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Every body that is complete now; raises ProtocolError at a length past MAX_FRAME_BYTES."""
        buffer = self._buffer
        buffer += data
        bodies: list[bytes] = []
        start = 0
        while len(buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, start)
            if length > MAX_FRAME_BYTES:
                raise ProtocolError(f"a frame of {length:,} bytes is over the limit of {MAX_FRAME_BYTES:,}")
            end = start + _LENGTH.size + length
            if len(buffer) < end:
                break
            bodies.append(bytes(buffer[start + _LENGTH.size : end]))
            start = end
        del buffer[:start]
        return bodies
