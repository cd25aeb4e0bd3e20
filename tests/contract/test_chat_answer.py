"""A generation as OpenAI's answer: whole and streamed."""

import json

import httpx
import pytest

from opta_lmx.errors import GenerationFailed, WorkerLost
from opta_lmx.types import CacheReport, Delta, FinishReason, TokenLogprob
from tests.contract.answers import choices_of, streamed, whole
from tests.contract.conftest import CHAT
from tests.fakes import Script, World, text_deltas

USAGE = {
    "prompt_tokens": 5,
    "completion_tokens": 3,
    "total_tokens": 8,
    "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
    "completion_tokens_details": {
        "reasoning_tokens": 0,
        "audio_tokens": 0,
        "accepted_prediction_tokens": 0,
        "rejected_prediction_tokens": 0,
    },
}

LOGPROB = TokenLogprob(
    "Hé", -0.5, "Hé".encode(), [TokenLogprob("Hé", -0.5, "Hé".encode()), TokenLogprob("�", -1e9, b"\xff")]
)
LOGPROB_JSON = {
    "token": "Hé",
    "logprob": -0.5,
    "bytes": [72, 195, 169],
    "top_logprobs": [
        {"token": "Hé", "logprob": -0.5, "bytes": [72, 195, 169]},
        {"token": "�", "logprob": -9999.0, "bytes": [255]},
    ],
}


async def test_a_whole_answer_is_openais_to_the_key(client: httpx.AsyncClient) -> None:
    """No key is missing, none is strange."""
    assert await whole(client) == {
        "id": "chatcmpl-0123abcd",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello.", "refusal": None, "annotations": []},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE,
        "system_fingerprint": "opta-lmx-0.1.0",
    }


async def test_what_is_only_echoed_is_echoed(client: httpx.AsyncClient) -> None:
    """Metadata comes back as sent, the tier as the one that served."""
    body = await whole(client, metadata={"k": "v"}, service_tier="auto")
    assert (body["metadata"], body["service_tier"]) == ({"k": "v"}, "default")
    first, *_ = await streamed(client, service_tier="auto")
    assert json.loads(first)["service_tier"] == "default"


@pytest.mark.parametrize(
    ("finish", "word"),
    [(FinishReason.STOP, "stop"), (FinishReason.LENGTH, "length"), (FinishReason.CANCELLED, "stop")],
)
async def test_finish_reasons(client: httpx.AsyncClient, world: World, finish: FinishReason, word: str) -> None:
    """Every inner reason has one of OpenAI's words, the same in both modes."""
    world.engine.script = Script(text_deltas("x", finish=finish))
    assert (await whole(client))["choices"][0]["finish_reason"] == word
    assert (await choices_of(client))[-1]["finish_reason"] == word


async def test_usage_counts_what_the_engine_counted(client: httpx.AsyncClient, world: World) -> None:
    """Tokens without text count, cached ones are part of the prompt's, and both modes agree."""
    looks = [[Delta(0, "", 2)], [Delta(0, "a", 1), Delta(0, "", 1, FinishReason.LENGTH)]]
    world.engine.script = Script(looks, prompt_tokens=40, cache=CacheReport(32, 32, "diverged"))
    usage = (await whole(client))["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (40, 4, 44)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 32
    events = await streamed(client, stream_options={"include_usage": True})
    assert json.loads(events[-2])["usage"] == usage


@pytest.mark.parametrize("stream", [False, True])
async def test_the_prefix_cache_reports_in_a_header(client: httpx.AsyncClient, world: World, stream: bool) -> None:
    """Whoever tunes prompts sees where reuse ended, and why."""
    world.engine.script = Script(cache=CacheReport(32, 33, "diverged"))
    response = await client.post("/v1/chat/completions", json=CHAT | {"stream": stream})
    assert response.headers["x-lmx-cache"] == "hit=32; miss_at=33; cause=diverged"


async def test_choices_do_not_mix(client: httpx.AsyncClient, world: World) -> None:
    """With n=2 each choice has its own text, finish and role chunk, whatever the order of deltas."""
    world.engine.script = Script(
        [
            [Delta(1, "b", 1), Delta(0, "a", 1)],
            [Delta(1, "B", 1, FinishReason.LENGTH)],
            [Delta(0, "A", 1), Delta(0, "!", 1, FinishReason.STOP)],
        ]
    )
    choices = (await whole(client, n=2))["choices"]
    assert [(c["index"], c["message"]["content"], c["finish_reason"]) for c in choices] == [
        (0, "aA!", "stop"),
        (1, "bB", "length"),
    ]
    chunks = await choices_of(client, n=2)
    assert [(c["index"], c["delta"]) for c in chunks[:2]] == [
        (0, {"role": "assistant", "content": ""}),
        (1, {"role": "assistant", "content": ""}),
    ]
    for index, text, reason in ((0, "aA!", "stop"), (1, "bB", "length")):
        own = [c for c in chunks if c["index"] == index]
        assert "".join(c["delta"].get("content", "") for c in own) == text
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == [reason]
        assert own[-1]["delta"] == {}


async def test_deltas_that_came_together_leave_together(client: httpx.AsyncClient, world: World) -> None:
    """A reader who was slow gets one larger chunk a choice, not many small ones late."""
    world.engine.script = Script([[Delta(0, "a", 1), Delta(0, "b", 1)], [Delta(0, "c", 1, FinishReason.STOP)]])
    assert [c["delta"].get("content") for c in await choices_of(client)] == ["", "ab", "c", None]


async def test_deltas_without_text_make_no_chunk(client: httpx.AsyncClient, world: World) -> None:
    """A character that is still incomplete is nothing to show."""
    world.engine.script = Script([[Delta(0, "", 1)], [Delta(0, "é", 1)], [Delta(0, "", 1, FinishReason.STOP)]])
    assert [c["delta"] for c in await choices_of(client)] == [
        {"role": "assistant", "content": ""},
        {"content": "é"},
        {},
    ]


async def test_logprobs(client: httpx.AsyncClient, world: World) -> None:
    """One entry for each token, bytes as numbers, and no infinity; held-back text does not delay them."""
    looks = [[Delta(0, "", 1, None, [LOGPROB])], [Delta(0, "Hé", 1, FinishReason.STOP, [LOGPROB])]]
    world.engine.script = Script(looks)
    choice = (await whole(client, logprobs=True, top_logprobs=2))["choices"][0]
    assert choice["logprobs"] == {"content": [LOGPROB_JSON] * 2, "refusal": None}
    role, first, second, finish = await choices_of(client, logprobs=True, top_logprobs=2)
    assert role["logprobs"] is finish["logprobs"] is None
    assert (first["delta"], first["logprobs"]["content"]) == ({"content": ""}, [LOGPROB_JSON])
    assert (second["delta"], second["logprobs"]["content"]) == ({"content": "Hé"}, [LOGPROB_JSON])


async def test_text_is_escaped_as_json(client: httpx.AsyncClient, world: World) -> None:
    """No text can break out of its event."""
    text = 'quote " backslash \\ newline \n\n data: [DONE] \r tab \t nul \x00 separator \u2028 emoji 😀'
    world.engine.script = Script(text_deltas(text))
    assert (await whole(client))["choices"][0]["message"]["content"] == text
    assert "".join(c["delta"].get("content", "") for c in await choices_of(client)) == text


async def test_a_stream_that_fails_ends_with_one_error_event(client: httpx.AsyncClient, world: World) -> None:
    """What was made before it is shown, [DONE] is not, and the generation is let go."""
    world.engine.script = Script([[Delta(0, "a", 1)]], failure=WorkerLost("tiny", "signal 9"))
    *chunks, last = await streamed(client)
    assert [json.loads(chunk)["choices"][0]["delta"] for chunk in chunks][1:] == [{"content": "a"}]
    assert json.loads(last) == {
        "error": {
            "message": "The worker of 'tiny' ended unexpectedly (signal 9).",
            "type": "server_error",
            "param": None,
            "code": "worker_lost",
        }
    }
    assert world.generation.closed.is_set()


async def test_a_whole_answer_that_fails_is_an_error(client: httpx.AsyncClient, world: World) -> None:
    """Half an answer is none."""
    world.engine.script = Script([[Delta(0, "a", 1)]], failure=GenerationFailed("A step failed."))
    response = await client.post("/v1/chat/completions", json=CHAT)
    assert (response.status_code, response.json()["error"]["message"]) == (500, "A step failed.")
    assert response.headers["x-should-retry"] == "false"
    assert world.generation.closed.is_set()


@pytest.mark.parametrize("stream", [False, True])
async def test_every_generation_is_closed(client: httpx.AsyncClient, world: World, stream: bool) -> None:
    """The slot comes back, also after the last token."""
    await client.post("/v1/chat/completions", json=CHAT | {"stream": stream})
    assert world.generation.closed.is_set()
