"""Bodies of megabytes: understood beside the server, answered like small ones, and nobody else waits for them."""

import json
from collections.abc import AsyncIterator
from typing import Final

import anyio
import psutil
import pytest

from opta_lmx.types import EchoOptions, JsonObject
from tests.integration.chatting import CHAT, chat, check_error, connect, content, stream, words
from tests.integration.conftest import StartServer

JSON: Final = {"content-type": "application/json"}

PARAMETERS: Final = {
    "type": "object",
    "properties": {f"p{at}": {"type": "string", "description": "d" * 50} for at in range(40)},
}

MESSAGES: Final = [{"role": "user", "content": words(150)}] * 10_000


def tools(count: int) -> list[JsonObject]:
    """So many tools with large schemas."""
    return [{"type": "function", "function": {"name": f"f{at}", "parameters": PARAMETERS}} for at in range(count)]


def large(**fields: object) -> bytes:
    """A request of about 7 MB whose last message is short."""
    last = {"role": "user", "content": "the last"}
    return json.dumps({"model": "a", "messages": [*MESSAGES, last], **fields}).encode()


@pytest.mark.timeout(120)
async def test_large_requests_are_answered_like_small_ones(server: StartServer, subtests: pytest.Subtests) -> None:
    """10,000 messages and 128 tools: whole, streamed, refused by name; a stream meanwhile loses nothing."""
    running = server({"a": EchoOptions(token_seconds=0.005)})
    text = words(400)
    begun = anyio.Event()
    async with connect(running) as client, anyio.create_task_group() as tasks:

        async def talk() -> None:
            read = await stream(client, chat("a", text), begun)
            assert read.text == text
            assert read.done

        tasks.start_soon(talk)
        await begun.wait()
        with subtests.test("whole"):
            assert content(await client.post(CHAT, content=large(tools=tools(128)), headers=JSON)) == "the last"
        with subtests.test("streamed"):
            answer = await client.post(CHAT, content=large(stream=True), headers=JSON)
            assert answer.text.endswith("data: [DONE]\n\n")
        with subtests.test("a field at fault"):
            answer = await client.post(CHAT, content=large(temperature=3), headers=JSON)
            assert check_error(answer, 400, "decimal_above_max_value")["param"] == "temperature"
        with subtests.test("no JSON"):
            check_error(await client.post(CHAT, content=large()[:-1], headers=JSON), 400, None)
        with subtests.test("unknown model"):
            answer = await client.post(CHAT, content=large().replace(b'"a"', b'"b"', 1), headers=JSON)
            check_error(answer, 404, "model_not_found")
        with subtests.test("one tool too many"):
            answer = await client.post(CHAT, content=large(tools=tools(129)), headers=JSON)
            assert check_error(answer, 400, "array_above_max_length")["param"] == "tools"


async def test_what_the_worker_is_sent_is_the_same(server: StartServer) -> None:
    """A long message arrives as it was, however many pieces it took."""
    running = server({"a": EchoOptions(context_length=10**6)})
    text = "\u00e9" * 1_000_000
    async with connect(running) as client:
        answer = await client.post(CHAT, json=chat("a", text))
    assert content(answer) == text


HOSTILE: Final[dict[str, bytes]] = {
    "deep body": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "deep metadata": b'{"model":"a","messages":[{"role":"user","content":"x"}],"metadata":'
    + b"[" * 100_000
    + b"]" * 100_000
    + b"}",
    "a number of 10,000 digits": b'{"model":"a","messages":[{"role":"user","content":"x"}],"seed":'
    + b"9" * 10_000
    + b"}",
    "NaN": b'{"model":"a","messages":[{"role":"user","content":"x"}],"temperature":NaN}',
    "Infinity": b'{"model":"a","messages":[{"role":"user","content":"x"}],"temperature":-Infinity}',
    "invalid UTF-8": b'{"model":"a","messages":[{"role":"user","content":"\xff"}]}',
    "a byte order mark": b'\xef\xbb\xbf{"model":"a","messages":[{"role":"user","content":"x"}]}',
    "gzip": b"\x1f\x8b\x08\x00" + b"\x00" * 20,
    "10,000 stop strings": json.dumps(chat("a", "x", stop=["s"] * 10_000)).encode(),
    "a huge logit_bias": json.dumps(chat("a", "x", logit_bias={str(at): 1 for at in range(10_001)})).encode(),
}


@pytest.mark.timeout(60)
async def test_hostile_bodies_are_refused_in_time(server: StartServer, subtests: pytest.Subtests) -> None:
    """Each is a 400 within seconds, and the server goes on."""
    running = server({"a": EchoOptions()})
    async with connect(running) as client:
        for name, body in HOSTILE.items():
            with subtests.test(name), anyio.fail_after(10):
                answer = await client.post(CHAT, content=body, headers=JSON)
                assert answer.status_code == 400, answer.text
                assert answer.json()["error"]["message"]
        with subtests.test("duplicate keys: the last counts"):
            body = b'{"model":"b","model":"a","messages":[{"role":"user","content":"x"}]}'
            assert content(await client.post(CHAT, content=body, headers=JSON)) == "x"
        with subtests.test("a stop string of a megabyte"):
            assert content(await client.post(CHAT, json=chat("a", "x y", stop="s" * 2**20))) == "x y"
        with subtests.test("20 MB"):
            check_error(await client.post(CHAT, content=b" " * 20 * 2**20, headers=JSON), 413, None)


async def test_a_body_without_a_length_is_bounded(server: StartServer) -> None:
    """Chunks that never end are refused at the limit, with memory near where it was."""
    running = server({"a": EchoOptions()})

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield b" " * 2**20

    async with connect(running) as client:
        before = psutil.Process(running.pid).memory_info().rss
        check_error(await client.post(CHAT, content=endless(), headers=JSON), 413, None)
        assert psutil.Process(running.pid).memory_info().rss - before < 40 * 2**20
