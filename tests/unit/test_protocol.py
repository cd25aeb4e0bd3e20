"""The frames between server and worker survive any cutting of the stream, and nothing else gets through."""

import struct
from collections.abc import Iterable
from itertools import pairwise
from typing import get_args

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from opta_lmx.inference import protocol
from opta_lmx.inference.protocol import (
    MAX_FRAME_BYTES,
    FrameSplitter,
    FromServer,
    FromWorker,
    ProtocolError,
    decode_from_server,
    decode_from_worker,
    encode,
)
from opta_lmx.types import (
    CacheReport,
    ChatPrompt,
    Delta,
    EchoOptions,
    Encoded,
    FinishReason,
    LoadOptions,
    ModelFacts,
    SamplingParams,
    Structured,
    TextPrompt,
    TokenLogprob,
    TokenPrompt,
)

# Every frame with every field set to something that is not its default.
_SAMPLING = SamplingParams(
    max_tokens=7,
    temperature=0.5,
    top_p=0.9,
    top_k=40,
    min_p=0.05,
    seed=-(2**63),
    frequency_penalty=-1.5,
    presence_penalty=2.0,
    repetition_penalty=1.1,
    logit_bias={5: -100.0, 6: 1.5},
    stop=("\n\n", "🛑"),
    stop_token_ids=(2, 2**63 - 1),
    min_tokens=3,
    ignore_eos=True,
    logprobs=0,
    n=2,
)
_TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
_CHAT = ChatPrompt([{"role": "user", "content": [{"type": "text", "text": "hé"}]}], _TOOLS, {"enable_thinking": False})
_ECHO = EchoOptions(0.001, 0.2, 0.0001, 64, "no", 5, 6)
_OPTIONS = LoadOptions(8, 256, 0.1, 1 << 40, 1 << 30, 2048, 1 << 33, 8, _ECHO)
_LOGPROB = TokenLogprob(" é", -0.25, b" \xc3", [TokenLogprob("", -9999.0, b"\xff")])

_SERVER_FRAMES: list[FromServer] = [
    protocol.Load("publisher/name", "/models/publisher/name", _OPTIONS),
    protocol.Generate(1, "req", _CHAT, _SAMPLING, Structured("json_schema", {"type": "object"})),
    protocol.Generate(2, "req", TextPrompt(" "), SamplingParams()),
    protocol.Generate(3, "req", TokenPrompt([0, 2**63 - 1]), SamplingParams(), Structured("regex", "a+")),
    protocol.Embed(4, [TextPrompt("é"), TokenPrompt([1, 2])], 64),
    protocol.Rank(5, "query", ["one", "two"]),
    protocol.Cancel(4),
    protocol.KvGrant(1 << 40),
    protocol.Stop(),
]
_WORKER_FRAMES: list[FromWorker] = [
    protocol.Hello(protocol.VERSION, 4711),
    protocol.Ready(ModelFacts("llama", 8192, 49152, 1 << 40, 1024, True, "memory"), 1.5, 1 << 41),
    protocol.LoadError("model.safetensors is truncated"),
    protocol.Started(1, 30, CacheReport(20, 20, "diverged")),
    protocol.Refused(2, "context", "too long", "messages", "context_length_exceeded", 9000, 8192),
    protocol.Failed(3, "it failed"),
    protocol.Step(9, 2, 1, [(1, Delta(0, "é", 1)), (2, Delta(1, "", 2, FinishReason.LENGTH, [_LOGPROB]))]),
    protocol.KvWant(1 << 41),
    protocol.Embedded(4, bytes(range(256)), 64, 7),
    protocol.Ranked(5, [0.5, -1.0], 9),
    protocol.Idle(10, 123, 456),
]


def _feed(pieces: Iterable[bytes]) -> list[bytes]:
    splitter = FrameSplitter()
    return [body for piece in pieces for body in splitter.feed(piece)]


@pytest.mark.parametrize("frame", _SERVER_FRAMES, ids=lambda frame: type(frame).__name__)
def test_a_frame_of_the_server_arrives_as_it_left(frame: FromServer) -> None:
    """Encoding, cutting and decoding give back an equal frame."""
    [body] = _feed([encode(frame)])
    assert decode_from_server(body) == frame


@pytest.mark.parametrize("frame", _WORKER_FRAMES, ids=lambda frame: type(frame).__name__)
def test_a_frame_of_the_worker_arrives_as_it_left(frame: FromWorker) -> None:
    """Encoding, cutting and decoding give back an equal frame."""
    [body] = _feed([encode(frame)])
    assert decode_from_worker(body) == frame


def test_every_frame_has_a_round_trip_test() -> None:
    """A new frame cannot be forgotten here."""
    assert {type(frame) for frame in _SERVER_FRAMES} == set(get_args(FromServer))
    assert {type(frame) for frame in _WORKER_FRAMES} == set(get_args(FromWorker))


@given(st.lists(st.binary(max_size=40), max_size=6), st.lists(st.integers(0, 300), max_size=12))
@example([b"", b"x", b""], list(range(20)))
def test_frames_do_not_depend_on_where_the_stream_is_cut(bodies: list[bytes], cuts: list[int]) -> None:
    """Any sequence of bodies, empty ones too, comes out whole and in order for any sizes of the reads."""
    stream = b"".join(struct.pack(">I", len(body)) + body for body in bodies)
    edges = sorted({0, len(stream), *(cut for cut in cuts if cut <= len(stream))})
    assert _feed(stream[start:end] for start, end in pairwise(edges)) == bodies


@pytest.mark.parametrize("cut", range(len(encode(_WORKER_FRAMES[6])) + 1))
def test_a_frame_is_whole_at_every_split_point(cut: int) -> None:
    """Two reads that part one frame anywhere give that frame once, and only with the second read."""
    data = encode(_WORKER_FRAMES[6])
    splitter = FrameSplitter()
    first, second = list(splitter.feed(data[:cut])), list(splitter.feed(data[cut:]))
    assert [decode_from_worker(body) for body in first + second] == [_WORKER_FRAMES[6]]
    assert bool(first) is (cut == len(data))


def test_a_length_past_the_limit_is_refused_before_its_body() -> None:
    """A broken peer cannot make us wait for, or hold, gigabytes; the limit itself is still a frame."""
    with pytest.raises(ProtocolError, match="over the limit"):
        _feed([struct.pack(">I", MAX_FRAME_BYTES + 1)])
    assert _feed([struct.pack(">I", MAX_FRAME_BYTES)]) == []


@given(st.binary(max_size=60))
def test_garbage_is_a_protocol_error(body: bytes) -> None:
    """Bytes that are no frame raise ProtocolError and nothing else, on both sides."""
    for decode in (decode_from_server, decode_from_worker):
        with pytest.raises(ProtocolError):
            decode(body)


@pytest.mark.parametrize("frame", [*_SERVER_FRAMES, *_WORKER_FRAMES], ids=lambda frame: type(frame).__name__)
def test_a_frame_in_the_wrong_direction_is_a_protocol_error(frame: FromServer | FromWorker) -> None:
    """Each side understands only what the other may say."""
    [body] = _feed([encode(frame)])
    backwards = decode_from_server if isinstance(frame, get_args(FromWorker)) else decode_from_worker
    with pytest.raises(ProtocolError):
        backwards(body)


@pytest.mark.parametrize("fields", [{}, {"id": "one"}, {"id": None}])
def test_a_frame_with_wrong_fields_is_a_protocol_error(fields: dict[str, object]) -> None:
    """A field that is missing or of the wrong type ends the conversation, it is not guessed at."""
    with pytest.raises(ProtocolError):
        decode_from_server(msgspec.msgpack.encode({"type": "cancel", **fields}))


@pytest.mark.parametrize("size", [0, 1, 7, 1000])
def test_a_prompt_in_pieces_makes_the_same_frame(size: int) -> None:
    """Cut anywhere, put around by its frame, it reads as the frame that held it; the rest may hold any bytes."""
    prompt = ChatPrompt([{"role": "user", "content": "\u00c1" * size}])
    frame = protocol.Generate(7, "r", prompt, _SAMPLING, Structured("regex", "\u00c1" * 16), 99)
    without = msgspec.structs.replace(frame, prompt=TextPrompt(""), structured=None)
    parts = {"structured": in_pieces(frame.structured), "prompt": in_pieces(prompt)}
    assert b"".join(protocol.encode_around(without, **parts)) == encode(frame)


def in_pieces(part: object) -> Encoded:
    """Ten bytes a piece."""
    whole = msgspec.msgpack.encode(part)
    return Encoded(tuple(whole[at : at + 10] for at in range(0, len(whole), 10)))
