"""Requests at the edge of what HTTP, JSON, Unicode and a model allow, over a real connection to a real worker."""

import json
import shutil
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import anyio
import httpx
import pytest

from opta_lmx.types import EchoOptions, JsonObject
from tests.integration.chatting import (
    CHAT,
    ask,
    chat,
    check_error,
    connect,
    content,
    depths,
    status,
    stream,
    until,
    words,
)
from tests.integration.conftest import StartServer

JSON: Final = {"content-type": "application/json"}
GOOD: Final = json.dumps(chat("a", "hello")).encode()
MAX_BODY_BYTES: Final = 64 * 1024


@dataclass(frozen=True)
class Refused:
    """A request, and the error it gets."""

    status: int
    body: bytes = GOOD
    code: str | None = None
    param: str | None = None
    method: str = "POST"
    path: str = CHAT


def message(text: str) -> bytes:
    """A body whose message has ``text`` between its quotation marks, escapes and all."""
    return b'{"model": "a", "messages": [{"role": "user", "content": "%b"}]}' % text.encode()


REFUSED: Final = {
    "unknown route": Refused(404, path="/v1/chat/completion"),
    "unknown route below a known one": Refused(404, path=f"{CHAT}/more"),
    "slash at the end": Refused(404, path=f"{CHAT}/"),
    "wrong method": Refused(405, method="GET", code="method_not_supported"),
    "wrong method elsewhere": Refused(405, path="/v1/models", code="method_not_supported"),
    "unknown model to look at": Refused(
        404, method="GET", path="/v1/models/x/y", code="model_not_found", param="model"
    ),
    "no body": Refused(400, b""),
    "broken JSON": Refused(400, GOOD[:-1]),
    "two objects": Refused(400, GOOD + GOOD),
    "an array": Refused(400, b"[]"),
    "a string": Refused(400, b'"hello"'),
    "null": Refused(400, b"null"),
    "NaN": Refused(400, b'{"model": "a", "temperature": NaN}'),
    "invalid UTF-8": Refused(400, GOOD.replace(b"hello", b"\xff\xfe")),
    "UTF-16": Refused(400, GOOD.decode().encode("utf-16")),
    "half a character first": Refused(400, message("\\ud83d"), "invalid_value", "messages[0].content"),
    "half a character last": Refused(400, message("x\\ude00"), "invalid_value", "messages[0].content"),
    "halves in the wrong order": Refused(400, message("\\ude00\\ud83d"), "invalid_value", "messages[0].content"),
    "far too deep": Refused(400, b'{"model":' * 100_000 + b"1" + b"}" * 100_000, param="model"),
    "no model": Refused(400, json.dumps({"messages": []}).encode()),
    "unknown model": Refused(404, json.dumps(chat("b", "x")).encode(), "model_not_found", "model"),
    "no tokens wanted": Refused(
        400, json.dumps(chat("a", "x", max_tokens=0)).encode(), "integer_below_min_value", "max_tokens"
    ),
}


async def test_what_cannot_be_served_is_refused_in_one_shape(server: StartServer, subtests: pytest.Subtests) -> None:
    """Every refusal has OpenAI's shape and an id, and the connection it came on serves the next request."""
    running = server({"a": EchoOptions()}, server={"max_body_bytes": 4 * 1024**2})
    async with connect(running) as client:
        for name, case in REFUSED.items():
            with subtests.test(name):
                response = await client.request(case.method, case.path, content=case.body, headers=JSON)
                error = check_error(response, case.status, case.code)
                assert error["type"] == "invalid_request_error"
                assert error["param"] == case.param
                assert response.headers["x-request-id"]
                assert response.headers["content-type"] == "application/json"
        response = await client.post(CHAT, content=GOOD, headers={**JSON, "x-request-id": "mine"})
        assert content(response) == "hello"
        assert response.headers["x-request-id"] == "mine"


async def test_a_huge_body_is_refused_without_being_read(server: StartServer, subtests: pytest.Subtests) -> None:
    """413 with OpenAI's shape, whether its size was announced or not; one byte less than the limit is served."""
    running = server({"a": EchoOptions(context_length=10**6)}, server={"max_body_bytes": MAX_BODY_BYTES})
    frame = len(json.dumps(chat("a", "")))

    async def endless() -> AsyncIterator[bytes]:
        yield GOOD[:-1]
        for _ in range(64):
            yield b" " * MAX_BODY_BYTES

    async with connect(running) as client:
        with subtests.test("announced"):
            check_error(await client.post(CHAT, content=b" " * 64 * MAX_BODY_BYTES, headers=JSON), 413, None)
        with subtests.test("chunked"):
            check_error(await client.post(CHAT, content=endless(), headers=JSON), 413, None)
        with subtests.test("one byte too many"):
            check_error(await client.post(CHAT, content=message_of_bytes(MAX_BODY_BYTES + 1), headers=JSON), 413, None)
        with subtests.test("just right"):
            answer = await client.post(CHAT, content=message_of_bytes(MAX_BODY_BYTES), headers=JSON)
            assert len(content(answer)) == MAX_BODY_BYTES - frame


def message_of_bytes(size: int) -> bytes:
    """A good request of so many bytes, one word long."""
    empty = json.dumps(chat("a", "")).encode()
    return empty.replace(b'""', b'"%b"' % (b"x" * (size - len(empty))))


async def test_text_comes_back_as_it_was_sent(server: StartServer, subtests: pytest.Subtests) -> None:
    """Whatever is text in JSON is text here: whole and streamed, whatever its script and its escapes."""
    running = server({"a": EchoOptions()})
    texts = {
        "nothing": "",
        "spaces": "  two  spaces ",
        "emoji": "\U0001f600 \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7",
        "scripts": "\u65e5\u672c\u8a9e \u0627\u0644\u0639\u0631\u0628\u064a\u0629 e\u0301 \ufeff",
        "controls": "a\x00b \x7f\x1b[0m \u2028 \r\n\r\ndata: [DONE]\n\n",
        "quotes": '"}]} \\" \\u0041 </script>',
        "edges of unicode": "\ud7ff\ue000\ufffd\uffff\U0010ffff",
    }
    async with connect(running) as client:
        for name, text in texts.items():
            with subtests.test(name):
                assert content(await ask(client, "a", text)) == text
                read = await stream(client, chat("a", text))
                assert read.text == text
                assert read.done
                assert read.finish_reasons == ["stop"]
        with subtests.test("escaped pair"):
            answer = await client.post(CHAT, content=message("\\ud83d\\ude00"), headers=JSON)
            assert content(answer) == "\U0001f600"


async def test_answers_end_where_they_should(server: StartServer, subtests: pytest.Subtests) -> None:
    """By stop strings, by length, by the end of the context; the same whole and streamed, and every token counted."""
    running = server({"a": EchoOptions(context_length=16)})
    cases: dict[str, tuple[JsonObject, str, str, int]] = {
        # What is asked, the text, why it ended, the tokens made.
        "its own end": ({}, "one two three four", "stop", 5),
        "a stop string": ({"stop": "three"}, "one two ", "stop", 3),
        "a stop string over two tokens": ({"stop": ["two th"]}, "one ", "stop", 3),
        "the start of a stop string": ({"stop": ["four five"]}, "one two three four", "stop", 5),
        "the first of two": ({"stop": ["four", "two"]}, "one ", "stop", 2),
        "one token": ({"max_tokens": 1}, "one", "length", 1),
        "the newer name for it": ({"max_completion_tokens": 2}, "one two", "length", 2),
        "the context": ({"ignore_eos": True}, "one two three four" * 3, "length", 12),
    }
    async with connect(running) as client:
        for name, (fields, text, reason, tokens) in cases.items():
            with subtests.test(name):
                answer = await ask(client, "a", "one two three four", **fields)
                assert content(answer) == text
                assert answer.json()["choices"][0]["finish_reason"] == reason
                assert (answer.json()["usage"]["prompt_tokens"], answer.json()["usage"]["completion_tokens"]) == (
                    4,
                    tokens,
                )
                options = {"stream_options": {"include_usage": True}}
                read = await stream(client, chat("a", "one two three four", **fields, **options))
                assert (read.text, read.finish_reasons, read.done) == (text, [reason], True)
                assert read.events[-1]["usage"] == answer.json()["usage"]
        with subtests.test("several choices"):
            answer = await ask(client, "a", "one two", n=3)
            assert [choice["message"]["content"] for choice in answer.json()["choices"]] == ["one two"] * 3
            assert [choice["index"] for choice in answer.json()["choices"]] == [0, 1, 2]
            assert counts(answer) == (2, 9)


def counts(answer: httpx.Response) -> tuple[int, int]:
    """Tokens of the prompt and of the answer."""
    usage = answer.json()["usage"]
    return usage["prompt_tokens"], usage["completion_tokens"]


async def test_a_prompt_that_does_not_fit_is_refused_before_it_is_read(server: StartServer) -> None:
    """400 with both numbers, at once, whole or streamed; one token less is served."""
    running = server({"a": EchoOptions(context_length=64, prefill_seconds_per_token=0.01)})
    async with connect(running) as client:
        assert (await client.post("/admin/models/load", json={"model_id": "a"})).status_code == 200
        started = time.monotonic()
        for streaming in (False, True):
            body = chat("a", words(10_000), stream=streaming)
            error = check_error(await client.post(CHAT, json=body), 400, "context_length_exceeded")
            assert error["param"] == "messages"
            assert "64" in error["message"]
            assert "10000" in error["message"]
        # Reading the prompts would have taken 200 s.
        assert time.monotonic() - started < 10
        check_error(await ask(client, "a", words(64)), 400, "context_length_exceeded")
        answer = await ask(client, "a", words(63))
        assert content(answer) == "w0"
        assert answer.json()["choices"][0]["finish_reason"] == "length"


async def test_a_full_queue_turns_newcomers_away_and_drops_nobody(server: StartServer) -> None:
    """Two run and two wait; the fifth is told when to come back; the four are answered in full."""
    running = server({"a": EchoOptions(token_seconds=0.02)}, scheduling={"max_running": 2, "max_waiting": 2})
    answers: list[str] = []
    async with connect(running) as client:

        async def talk(number: int) -> None:
            text = words(30, f"{number}-")
            answer = content(await ask(client, "a", text))
            assert answer == text
            answers.append(answer)

        async with anyio.create_task_group() as tasks:
            for number in range(4):
                tasks.start_soon(talk, number)
                await until(lambda: admitted(client), lambda count: count == number + 1)  # noqa: B023 - awaited here
            for streaming in (False, True):
                response = await client.post(CHAT, json=chat("a", "fifth", stream=streaming))
                error = check_error(response, 429, "rate_limit_exceeded")
                assert error["type"] == "requests"
                assert int(response.headers["retry-after"]) >= 1
        assert len(answers) == 4
        assert content(await ask(client, "a", "fifth again")) == "fifth again"


async def admitted(client: httpx.AsyncClient) -> int:
    """Requests that run or wait."""
    return sum(depths(await status(client)))


SAID: Final = "Ja: \u6f22\u00e9\U0001f600!"


def teach(directory: Path) -> Path:
    """Rewrites a tiny model so that it always answers SAID: each token leads to the next, whatever was before."""
    import mlx.core as mx
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    opening = tokenizer.encode("<|im_start|>assistant\n").ids[-1]
    chain = [opening, *tokenizer.encode(SAID).ids, tokenizer.token_to_id("<|im_end|>")]
    assert len(set(chain)) == len(chain), "no token may come twice: it would have two followers"
    assert len(chain) > len(SAID) + 2, "some characters must take several tokens"
    weights: Any = mx.load(str(directory / "model.safetensors"))
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = mx.zeros_like(weights[name])
    # With attention and feed-forward silent the last hidden state is the last token's embedding, normed.
    embeddings = mx.random.normal(weights["model.embed_tokens.weight"].shape, key=mx.random.key(0))
    head = mx.zeros_like(embeddings)
    for token, following in pairwise(chain):
        head[following] = embeddings[token]
    weights |= {"model.embed_tokens.weight": embeddings, "lm_head.weight": head}
    weights["model.norm.weight"] = mx.ones_like(weights["model.norm.weight"])
    mx.save_safetensors(str(directory / "model.safetensors"), weights)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return directory


@pytest.mark.mlx
async def test_a_character_is_never_cut(
    server: StartServer, tiny_model: Callable[..., Path], tmp_path: Path, subtests: pytest.Subtests
) -> None:
    """A character of several tokens is held back until it is whole; stop strings and counts work on characters too."""
    taught = teach(Path(shutil.copytree(tiny_model("llama"), tmp_path / "taught")))
    running = server({"taught": taught})
    async with connect(running) as client:
        with subtests.test("whole"):
            answer = await ask(client, "taught", "Sprich.", temperature=0)
            assert content(answer) == SAID
            tokens = answer.json()["usage"]["completion_tokens"]
            assert tokens > len(SAID) + 1
        with subtests.test("streamed"):
            read = await stream(client, chat("taught", "Sprich.", temperature=0))
            assert read.text == SAID
            assert "\ufffd" not in "".join(read.lines)
            # As many pieces as whole characters became certain.
            assert len(read.pieces) < tokens
        with subtests.test("no words to answer"):
            assert content(await ask(client, "taught", "", temperature=0)) == SAID
        with subtests.test("stop at a character of several tokens"):
            assert content(await ask(client, "taught", "Sprich.", temperature=0, stop="\u00e9")) == SAID[:5]
        with subtests.test("log-probabilities carry the bytes"):
            answer = await ask(client, "taught", "Sprich.", temperature=0, logprobs=True)
            spoken = answer.json()["choices"][0]["logprobs"]["content"]
            assert b"".join(bytes(token["bytes"]) for token in spoken).decode().startswith(SAID)


@pytest.mark.mlx
async def test_seeds_make_chance_repeatable(server: StartServer, tiny_model: Callable[..., Path]) -> None:
    """One seed gives one text, alone or in company; another seed another; choice i of n is that of seed + i."""
    running = server({"tiny": tiny_model("llama")})
    texts: dict[int, str] = {}
    async with connect(running) as client:

        async def with_seed(seed: int) -> httpx.Response:
            return await ask(client, "tiny", "hello", temperature=1.0, seed=seed, max_tokens=16)

        async def keep(seed: int) -> None:
            texts[seed] = content(await with_seed(seed))

        async with anyio.create_task_group() as tasks:
            for seed in (7, 8, 9):
                tasks.start_soon(keep, seed)
        assert content(await with_seed(7)) == texts[7]
        assert len(set(texts.values())) == 3
        several = await ask(client, "tiny", "hello", temperature=1.0, seed=7, max_tokens=16, n=3)
    assert [choice["message"]["content"] for choice in several.json()["choices"]] == [texts[7], texts[8], texts[9]]
