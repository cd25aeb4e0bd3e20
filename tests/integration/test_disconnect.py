"""A client may leave at any moment: its slot, its lease and its place in the worker are back at once."""

import json
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import anyio
import httpx
import psutil
import pytest

from opta_lmx.types import EchoOptions, JsonObject
from tests.integration.chatting import (
    CHAT,
    ask,
    chat,
    connect,
    content,
    depths,
    model_status,
    status,
    stream,
    until,
    until_all_returned,
    until_status,
    words,
)
from tests.integration.conftest import RunningServer, StartServer

# What leavers ask for would take a minute at the speeds of these tests: nobody is served because they were done.
LONG = words(1000)


class Leaver:
    """A client with a connection of its own, who sends one request and leaves."""

    def __init__(self, server: RunningServer, text: str, *, streaming: bool) -> None:
        self._server = server
        self._body = chat("a", text, stream=streaming)
        self._scope = anyio.CancelScope()
        self.has_text = anyio.Event()

    async def stay(self) -> None:
        """Asks, and reads until told to leave; being answered in full is a failure of the test's own timing."""
        with self._scope:
            async with connect(self._server) as client:
                if self._body["stream"]:
                    await stream(client, self._body, self.has_text)
                else:
                    await client.post(CHAT, json=self._body)
            pytest.fail("answered before the client left")

    def leave(self) -> None:
        """Closes the connection."""
        self._scope.cancel()


def both(server: RunningServer, text: str = LONG) -> tuple[Leaver, Leaver]:
    """One who wants the answer streamed and one who wants it whole."""
    return Leaver(server, text, streaming=True), Leaver(server, text, streaming=False)


def in_state(state: str, running: int, waiting: int = 0) -> Callable[[JsonObject], bool]:
    """The model is in this state, with so many requests running and waiting."""
    return lambda shown: model_status(shown, "a").get("state") == state and depths(shown) == (running, waiting)


async def check_next_is_served(client: httpx.AsyncClient, model: str = "a") -> None:
    """Whoever comes after is answered, long before the leavers would have been."""
    with anyio.fail_after(10):
        assert content(await ask(client, model, "next")) == "next"


async def test_leaving_during_the_load(server: StartServer) -> None:
    """The load goes on, for whoever comes next, and holds nothing for those who left."""
    running = server({"a": EchoOptions(load_seconds=0.7)}, scheduling={"max_running": 2})
    leavers = both(running)
    async with connect(running) as client, anyio.create_task_group() as tasks:
        for leaver in leavers:
            tasks.start_soon(leaver.stay)
        await until_status(client, in_state("loading", 2))
        for leaver in leavers:
            leaver.leave()
        await until_status(client, in_state("loading", 0))
        await until_status(client, in_state("ready", 0))
        await until_all_returned(client)
        await check_next_is_served(client)
        assert model_status(await status(client), "a")["restarts"] == 0


async def test_leaving_the_queue(server: StartServer) -> None:
    """Whoever leaves the line is out of it at once, and those behind move up, not those before."""
    running = server({"a": EchoOptions(token_seconds=0.05)}, scheduling={"max_running": 1})
    holder = Leaver(running, LONG, streaming=True)
    answers: list[str] = []
    async with connect(running) as client, anyio.create_task_group() as tasks:

        async def wait_behind() -> None:
            answers.append(content(await ask(client, "a", "behind")))

        tasks.start_soon(holder.stay)
        await holder.has_text.wait()
        leavers = both(running)
        for number, leaver in enumerate(leavers, start=1):
            tasks.start_soon(leaver.stay)
            await until_status(client, in_state("ready", 1, number))
        tasks.start_soon(wait_behind)
        await until_status(client, in_state("ready", 1, 3))
        for number, leaver in zip((2, 1), leavers, strict=True):
            leaver.leave()
            await until_status(client, in_state("ready", 1, number))
        assert not answers
        holder.leave()
        await until_all_returned(client)
    assert answers == ["behind"]


async def test_leaving_during_prefill(server: StartServer) -> None:
    """A prompt is not read to its end for nobody."""
    running = server(
        {"a": EchoOptions(prefill_seconds_per_token=0.005)},
        scheduling={"max_running": 2, "prefill_chunk_tokens": 16},
    )
    leavers = both(running, words(4000))
    async with connect(running) as client, anyio.create_task_group() as tasks:
        for leaver in leavers:
            tasks.start_soon(leaver.stay)
        await until_status(client, in_state("ready", 2))
        for leaver in leavers:
            leaver.leave()
        await until_all_returned(client)
        await check_next_is_served(client)


async def test_leaving_while_decoding(server: StartServer) -> None:
    """An answer is not written to its end for nobody."""
    running = server({"a": EchoOptions(token_seconds=0.05)}, scheduling={"max_running": 2})
    streaming, whole = both(running)
    async with connect(running) as client, anyio.create_task_group() as tasks:
        tasks.start_soon(whole.stay)
        await until_status(client, in_state("ready", 1))
        # It came later, so once it has text the other has too.
        tasks.start_soon(streaming.stay)
        await streaming.has_text.wait()
        whole.leave()
        await until_status(client, in_state("ready", 1))
        streaming.leave()
        await until_all_returned(client)
        await check_next_is_served(client)


async def test_leaving_with_more_than_one_request_under_way(server: StartServer) -> None:
    """Of requests sent behind each other, the one being answered is not the last that came; it ends all the same."""
    running = server({"a": EchoOptions(token_seconds=0.05)}, scheduling={"max_running": 2})
    async with connect(running) as client:
        for streaming in (True, False):
            body = json.dumps(chat("a", LONG, stream=streaming)).encode()
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            async with await anyio.connect_tcp("127.0.0.1", running.port) as leaver:
                await leaver.send((head + body) * 2)
                await until_status(client, in_state("ready", 1))
                await leaver.send(head + body)
            await until_all_returned(client)
        await check_next_is_served(client)
    assert "request_crashed" not in running.log.read_text()


# When a visitor leaves, and how many of them there are in a run; the rest leave after a random time.
MOMENTS = ("before the headers are sent", "in the middle of the body", "as soon as it is asked", "between chunks")
LEAVERS = 500
SEED = 20260215


class Visitor:
    """A client who speaks bare HTTP, so that it may leave in the middle of a word."""

    def __init__(self, server: RunningServer, body: JsonObject, moment: str, patience: float) -> None:
        self._server = server
        self._moment = moment
        self._patience = patience
        self._content = json.dumps(body).encode()
        self._head = b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n" % (
            CHAT.encode(),
            len(self._content),
        )

    async def visit(self) -> None:
        """Connects, asks as far as it gets, and hangs up."""
        async with await anyio.connect_tcp("127.0.0.1", self._server.port) as connection:
            if self._moment == MOMENTS[0]:
                return await connection.send(self._head[: len(self._head) // 2])
            await connection.send(self._head + b"\r\n")
            if self._moment == MOMENTS[1]:
                return await connection.send(self._content[: len(self._content) // 2])
            await connection.send(self._content)
            with anyio.move_on_after(self._patience), suppress(anyio.EndOfStream):
                while self._moment != MOMENTS[2]:
                    await connection.receive()
                    if self._moment == MOMENTS[3]:
                        break
        return None


async def visits(running: RunningServer, dice: random.Random, count: int, models: str, answer_words: int) -> None:
    """So many visitors within a few seconds, each to a random model for a random text, streamed or whole."""

    async def visit(delay: float, visitor: Visitor) -> None:
        await anyio.sleep(delay)
        await visitor.visit()

    async with anyio.create_task_group() as tasks:
        for _ in range(count):
            body = chat(dice.choice(models), words(dice.randint(1, answer_words)), stream=dice.random() < 0.5)
            moment = dice.choice((*MOMENTS, "at any time", "at any time"))
            visitor = Visitor(running, body | {"max_tokens": answer_words}, moment, dice.expovariate(5))
            tasks.start_soon(visit, dice.uniform(0, count / 125), visitor)


async def check_nothing_held(client: httpx.AsyncClient, reserved_bytes: int) -> None:
    """Nobody runs or waits, no model is leased, and no memory is promised beyond what idle models hold."""
    await until_all_returned(client)
    shown = await status(client)
    assert depths(shown) == (0, 0)
    assert shown["memory"]["ledger"]["reservations_bytes"] == reserved_bytes


async def reservations(client: httpx.AsyncClient) -> int:
    """What the ledger promises, in bytes."""
    promised: int = (await status(client))["memory"]["ledger"]["reservations_bytes"]
    return promised


async def test_five_hundred_leavers_leave_nothing(server: StartServer) -> None:
    """Whenever they leave, streamed or whole: at the end nothing runs, waits, is promised, leased or open.

    The models load under the first of them; a queue stands in front of both; no worker has died, and nothing was said
    about a failure in the log.
    """
    print(f"seed {SEED}")  # noqa: T201 - what it takes to do it again
    running = server(
        {"a": EchoOptions(token_seconds=0.005, load_seconds=0.3), "b": EchoOptions(prefill_seconds_per_token=0.001)},
        scheduling={"max_running": 4, "max_waiting": 100, "prefill_chunk_tokens": 16},
    )
    process = psutil.Process(running.pid)
    async with connect(running) as client:
        await status(client)
        before = process.num_fds()
        await visits(running, random.Random(SEED), LEAVERS, "ab", 200)
        await until_all_returned(client)
        for model in "ab":
            await check_next_is_served(client, model)
        resting = await reservations(client)
        await visits(running, random.Random(SEED + 1), LEAVERS // 10, "ab", 200)
        await check_nothing_held(client, resting)
        shown = await status(client)
        # A socket and a pipe of standard error for each of the two workers were not there before.
        await until(lambda: open_files(process), lambda count: count <= before + 2 * 2)
    assert {model["id"]: (model["state"], model["restarts"]) for model in shown["models"]} == {
        "a": ("ready", 0),
        "b": ("ready", 0),
    }
    levels = {json.loads(line)["level"] for line in running.log.read_text().splitlines()}
    assert levels <= {"info", "warning"}, levels


@pytest.mark.mlx
async def test_leavers_of_a_real_model_leave_nothing(server: StartServer, tiny_model: Callable[..., Path]) -> None:
    """The same over MLX: loading, prefill and decode of a tiny model, whose reservation falls back to its load's."""
    print(f"seed {SEED}")  # noqa: T201 - what it takes to do it again
    running = server({"a": tiny_model("llama")}, scheduling={"max_running": 4, "max_waiting": 100})
    async with connect(running) as client:
        await visits(running, random.Random(SEED), 60, "a", 100)
        await until_all_returned(client)
        assert (await ask(client, "a", "next", max_tokens=4)).status_code == 200
        resting = await reservations(client)
        await visits(running, random.Random(SEED + 1), 60, "a", 100)
        await check_nothing_held(client, resting)
        assert model_status(await status(client), "a")["restarts"] == 0


async def open_files(process: psutil.Process) -> int:
    """How many files and sockets a process has open."""
    return process.num_fds()
