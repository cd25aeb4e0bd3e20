"""More clients than places: who is answered, who is refused, in which order, and what it costs."""

from collections import Counter

import anyio
import httpx
import psutil
from anyio.abc import SocketStream

from opta_lmx.types import EchoOptions
from tests.integration.chatting import (
    ask,
    check_error,
    connect,
    content,
    depths,
    status,
    until_all_returned,
    until_status,
    words,
)
from tests.integration.conftest import RunningServer, StartServer

_CROWD = 1000


async def _one_of_many(running: RunningServer, number: int, begin: anyio.Event, seen: list[bytes]) -> None:
    """A connection of its own, a request when all are there, and the whole answer."""
    stream: SocketStream = await anyio.connect_tcp("127.0.0.1", running.port)
    async with stream:
        await begin.wait()
        body = b'{"model": "a", "messages": [{"role": "user", "content": "mine-%d"}]}' % number
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        await stream.send(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        answer = b""
        try:
            while True:
                answer += await stream.receive()
        except anyio.EndOfStream:
            seen[number] = answer


async def test_a_thousand_connections_are_all_answered(server: StartServer) -> None:
    """Each gets its own answer or a 429 that says when to come back; none is dropped, and the server stays small."""
    running = server({"a": EchoOptions(token_seconds=0.001)}, scheduling={"max_running": 16, "max_waiting": 300})
    seen = [b""] * _CROWD
    async with connect(running) as client:
        content(await ask(client, "a", "loaded"))
        process = psutil.Process(running.process.pid)
        before = process.memory_info().rss
        begin = anyio.Event()
        async with anyio.create_task_group() as tasks:
            for number in range(_CROWD):
                tasks.start_soon(_one_of_many, running, number, begin, seen)
            await anyio.wait_all_tasks_blocked()
            begin.set()
        await until_all_returned(client)
        grown = process.memory_info().rss - before
        assert content(await ask(client, "a", "after")) == "after"
    statuses = Counter(answer[9:12] for answer in seen)
    assert set(statuses) <= {b"200", b"429"}, statuses
    # Those who run and those who may wait are served, whatever the rest do.
    assert statuses[b"200"] >= 316
    for number, answer in enumerate(seen):
        if answer[9:12] == b"200":
            assert b'"mine-%d"' % number in answer
        else:
            assert b"retry-after: " in answer
    assert grown < 64 * 1024**2, f"{grown:,} bytes"


async def test_keys_and_lanes_share_a_full_server(server: StartServer) -> None:
    """Behind a flood of one key and a batch, another key's request comes next; status names who waits where."""
    callers = {
        "flood": {"key": "sk-flood"},
        "nightly": {"key": "sk-nightly", "lane": "batch"},
        "person": {"key": "sk-person"},
    }
    running = server(
        {"a": EchoOptions(token_seconds=0.005)},
        scheduling={"max_running": 1},
        security={"callers": callers},
    )
    ended: list[str] = []
    async with connect(running) as client:

        async def one(who: str, text: str, lane: str | None = None) -> None:
            headers = {"authorization": f"Bearer sk-{who}"} | ({"x-lmx-lane": lane} if lane else {})
            body = {"model": "a", "messages": [{"role": "user", "content": text}]}
            response = await client.post("/v1/chat/completions", json=body, headers=headers, timeout=60)
            content(response)
            ended.append(text)

        async def wait_for(requests: int) -> None:
            await until_status(client, lambda shown: depths(shown) == (1, requests))

        assert (await ask(client, "a", "no key")).status_code == 401
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one, "flood", words(400))
            await wait_for(0)
            coming = (
                ("nightly", "job", None),
                ("flood", "f1", None),
                ("flood", "f2", None),
                ("flood", "f3", None),
                ("person", "p1", None),
                ("person", "late", "batch"),
            )
            for requests, (who, text, lane) in enumerate(coming, 1):
                tasks.start_soon(one, who, text, lane)
                await wait_for(requests)
            lines = {(line["lane"], line["caller"]): line["requests"] for line in (await status(client))["lines"]}
    assert lines == {
        ("interactive", "flood"): 3,
        ("interactive", "person"): 1,
        ("batch", "nightly"): 1,
        ("batch", "person"): 1,
    }
    assert ended[1:3] == ["f1", "p1"]
    assert set(ended[-2:]) == {"job", "late"}


async def test_a_lane_that_is_none_is_refused(server: StartServer) -> None:
    """By name, with the lanes there are."""
    running = server({"a": EchoOptions()})
    async with connect(running) as client:
        body = {"model": "a", "messages": [{"role": "user", "content": "x"}]}
        response: httpx.Response = await client.post("/v1/chat/completions", json=body, headers={"x-lmx-lane": "fast"})
        error = check_error(response, 400, None)
    assert error["param"] == "x-lmx-lane"
    assert "'interactive' or 'batch'" in error["message"]
