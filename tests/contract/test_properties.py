"""What holds for any request and any generation, not only for those somebody thought of."""

import json
from contextlib import suppress
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from opta_lmx.api.openai.answer import AnswerHead, ChatAnswer, ChatChunks
from opta_lmx.api.openai.chat import to_generate_request
from opta_lmx.api.openai.tools import ToolUse
from opta_lmx.api.openai.wire import ChatRequest
from opta_lmx.api.parsing import parse_object
from opta_lmx.api.validation import validate
from opta_lmx.errors import RequestRejected
from opta_lmx.inference import protocol
from opta_lmx.inference.engine import Generation
from opta_lmx.types import Delta, Encoded, FinishReason, GenerateRequest, TokenLogprob
from tests.contract.conftest import CHAT
from tests.fakes import Script, ScriptedGeneration

numbers = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
leaves = st.none() | st.booleans() | numbers | st.text(max_size=8) | st.sampled_from(["user", "auto", "none", "text"])
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
keys = st.sampled_from(["role", "content", "name", "tool_calls", "tool_call_id", "type", "text", "function", "x"])
messages = st.lists(st.dictionaries(keys, values, max_size=4), max_size=3)
bodies = st.dictionaries(st.sampled_from(sorted(ChatRequest.model_fields)), values, max_size=4)


@given(body=st.binary(max_size=64) | st.text(max_size=64).map(str.encode))
def test_any_bytes_are_an_object_or_refused(body: bytes) -> None:
    """Reading a body has two outcomes."""
    with suppress(RequestRejected):
        assert isinstance(parse_object(body), dict)


def outcome(fields: dict[str, Any]) -> GenerateRequest | RequestRejected:
    """What becomes of a request with these fields."""
    try:
        body = parse_object(json.dumps(CHAT | fields).encode())
        return to_generate_request(validate(ChatRequest, body), "r")
    except RequestRejected as error:
        return error


@given(fields=bodies | st.builds(lambda history, rest: rest | {"messages": history}, messages, bodies))
def test_any_json_is_a_frame_or_refused(fields: dict[str, Any]) -> None:
    """Whatever passes validation can be sent to a worker, and whatever does not names a field."""
    wanted = outcome(fields)
    if isinstance(wanted, RequestRejected):
        assert wanted.param
    else:
        # These are small.
        assert not isinstance(wanted.prompt, Encoded)
        assert not isinstance(wanted.structured, Encoded)
        frame = protocol.Generate(1, wanted.request_id, wanted.prompt, wanted.sampling, wanted.structured)
        assert protocol.decode_from_server(protocol.encode(frame)[4:]) == frame


tokens = st.builds(lambda text: TokenLogprob(text, -1.0, text.encode()), st.text(max_size=3))
deltas = st.builds(
    lambda choice, token, count: Delta(choice, token.token, count, None, [token]),
    st.integers(0, 1),
    tokens,
    st.integers(0, 3),
)
finishes = st.sampled_from([FinishReason.STOP, FinishReason.LENGTH])


@given(
    looks=st.lists(st.lists(deltas, min_size=1, max_size=4), max_size=6),
    ends=st.tuples(finishes, finishes),
    logprobs=st.booleans(),
)
def test_streamed_is_whole(looks: list[list[Delta]], ends: tuple[FinishReason, ...], logprobs: bool) -> None:
    """However deltas are grouped, both modes give each choice the same text, log-probabilities and finish."""
    looks = [*looks, [Delta(choice, "", 1, finish) for choice, finish in enumerate(ends)]]
    request = GenerateRequest("r", "tiny", to_generate_request(validate(ChatRequest, CHAT), "r").prompt)
    generation = cast(Generation, ScriptedGeneration(request, Script()))
    head = AnswerHead("id", 1, choices=2, new_id=lambda: "0", use=ToolUse())
    answer = ChatAnswer(head, generation, logprobs=logprobs)
    chunks = ChatChunks(head, generation, include_usage=True, logprobs=logprobs)
    stream = chunks.begin()
    for look in looks:
        answer.add(look)
        stream += chunks.write(look)
    stream += chunks.end()

    whole = answer.completion().model_dump()
    *events, done, rest = stream.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    objects = [json.loads(event.removeprefix("data: ")) for event in events]
    assert objects[-1]["usage"] == whole["usage"]
    assert all(piece["usage"] is None for piece in objects[:-1])
    for choice in whole["choices"]:
        own = [part for piece in objects for part in piece["choices"] if part["index"] == choice["index"]]
        assert "".join(part["delta"].get("content", "") for part in own) == choice["message"]["content"]
        assert [part["finish_reason"] for part in own if part["finish_reason"]] == [choice["finish_reason"]]
        entries = [entry for part in own if part["logprobs"] for entry in part["logprobs"]["content"]]
        assert entries == (choice["logprobs"]["content"] if logprobs else [])
