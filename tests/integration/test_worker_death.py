"""A worker that dies costs one model and seconds: what its own requests see, and what nobody else notices."""

import os
import signal
import time
from collections.abc import Callable

import anyio
import httpx
import pytest

from opta_lmx.types import EchoOptions, JsonObject
from tests.integration.chatting import (
    Stream,
    ask,
    chat,
    check_error,
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

SLOW = EchoOptions(token_seconds=0.02)
# A chunk of 16 tokens takes 0.16 seconds.
SLOW_PREFILL = EchoOptions(prefill_seconds_per_token=0.01)
SMALL_CHUNKS = {"prefill_chunk_tokens": 16}

both_signals = pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT], ids=["killed", "aborted"])


def in_state(model: str, state: str) -> Callable[[JsonObject], bool]:
    return lambda shown: model_status(shown, model).get("state") == state


async def workers(server: RunningServer) -> list[int]:
    """The process ids of a server's children, loading ones included."""
    return [child.pid for child in server.children()]


async def kill_worker(client: httpx.AsyncClient, model: str, number: int = signal.SIGKILL) -> int:
    """Ends the worker of a loaded model; its process id."""
    pid: int = model_status(await status(client), model)["pid"]
    os.kill(pid, number)
    return pid


@both_signals
async def test_a_model_whose_idle_worker_died_is_loaded_again(server: StartServer, number: signal.Signals) -> None:
    """Its death is seen without a request, named in status and health, and mended by the next request."""
    running = server({"a": EchoOptions()}, models={"default_model": "a"})
    async with connect(running) as client:
        assert content(await ask(client, "a", "before")) == "before"
        killed = await kill_worker(client, "a", number)
        shown = model_status(await until_status(client, in_state("a", "absent")), "a")
        assert shown["pid"] is None
        assert f"{-number}" in shown["reason"] or number.name in shown["reason"]
        health = (await client.get("/admin/health")).json()
        assert health["status"] == "degraded"
        assert health["reason"].startswith("a: ")
        assert content(await ask(client, "a", "after")) == "after"
        shown = model_status(await status(client), "a")
        assert (shown["state"], shown["restarts"], shown["reason"]) == ("ready", 1, None)
        assert shown["pid"] != killed
        assert (await client.get("/admin/health")).json()["status"] == "ok"


@both_signals
async def test_streams_of_a_dead_worker_end_with_one_error(server: StartServer, number: signal.Signals) -> None:
    """Each keeps what it got, then one typed error, no [DONE]; another model's stream is the one it would have been."""
    running = server({"dies": SLOW, "lives": SLOW})
    text = words(40)
    streams: dict[str, Stream] = {}
    async with connect(running) as client:
        undisturbed = await stream(client, chat("lives", text))

        async def read(name: str, model: str, begun: anyio.Event) -> None:
            streams[name] = await stream(client, chat(model, text), begun, at=3)

        async with anyio.create_task_group() as tasks:
            events = {name: anyio.Event() for name in ("first", "second", "other")}
            for name, begun in events.items():
                tasks.start_soon(read, name, "lives" if name == "other" else "dies", begun)
            for begun in events.values():
                await begun.wait()
            await kill_worker(client, "dies", number)
        await until_all_returned(client)
        assert content(await ask(client, "dies", "again")) == "again"
    for name in ("first", "second"):
        cut = streams[name]
        [error] = cut.errors
        assert cut.status == 200
        assert not cut.done
        assert "error" in cut.events[-1]
        assert (error["type"], error["code"], error["param"]) == ("server_error", "worker_lost", None)
        assert "dies" in error["message"]
        assert number.name in error["message"]
        assert 3 <= len(cut.text.split()) < 40
        assert text.startswith(cut.text)
    assert streams["other"].text == text
    assert in_one_piece(streams["other"]) == in_one_piece(undisturbed)


def in_one_piece(read: Stream) -> list[JsonObject]:
    """A finished stream without names and times, its text joined: how it was cut into chunks is the machine's mood."""
    assert read.done
    plain = [{key: value for key, value in event.items() if key not in ("id", "created")} for event in read.events]
    return [plain[0], {"text": read.text}, *plain[1 + len(read.pieces) :]]


async def test_whole_answers_of_a_dead_worker_are_refused_with_the_cause(server: StartServer) -> None:
    """Words the client never saw are no answer: 503, the cause by name, and when to come back."""
    running = server({"a": SLOW})
    refused: list[httpx.Response] = []
    async with connect(running) as client:

        async def whole() -> None:
            refused.append(await ask(client, "a", words(200)))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(whole)
            await until_status(client, lambda shown: depths(shown) == (1, 0) and in_state("a", "ready")(shown))
            # It joined later, so whatever it has got the whole answer has got too.
            begun = anyio.Event()
            tasks.start_soon(stream, client, chat("a", words(200)), begun)
            await begun.wait()
            await kill_worker(client, "a")
        await until_all_returned(client)
    error = check_error(refused[0], 503, "worker_lost")
    assert error["type"] == "server_error"
    assert "SIGKILL" in error["message"]
    assert int(refused[0].headers["retry-after"]) >= 1


async def test_requests_without_a_token_yet_are_started_again(server: StartServer) -> None:
    """A worker that dies during prefill costs its requests time and nothing else, streamed or whole."""
    running = server({"a": SLOW_PREFILL}, scheduling=SMALL_CHUNKS)
    text = words(64)
    answers: list[str] = []
    async with connect(running) as client:

        async def whole() -> None:
            answers.append(content(await ask(client, "a", text)))

        async def streamed() -> None:
            read = await stream(client, chat("a", text))
            assert read.done
            assert not read.errors
            answers.append(read.text)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(whole)
            tasks.start_soon(streamed)
            await until_status(client, lambda shown: depths(shown) == (2, 0) and in_state("a", "ready")(shown))
            await kill_worker(client, "a")
        shown = model_status(await status(client), "a")
        await until_all_returned(client)
    assert answers == [text, text]
    assert shown["restarts"] == 1


async def test_a_request_that_kills_its_worker_twice_is_refused(server: StartServer) -> None:
    """It is likelier the cause than the victim: two starts, then 503 with the exit code; no third worker."""
    running = server({"poisoned": EchoOptions(exit_at=1), "b": EchoOptions()})
    async with connect(running) as client:
        error = check_error(await ask(client, "poisoned", "x"), 503, "worker_lost")
        shown = model_status(await status(client), "poisoned")
        await until_all_returned(client)
        assert content(await ask(client, "b", "unharmed")) == "unharmed"
    assert "exit code 9" in error["message"]
    assert (shown["state"], shown["restarts"]) == ("absent", 1)
    assert "exit code 9" in shown["reason"]


async def test_a_worker_killed_while_loading_fails_that_load_only(server: StartServer) -> None:
    """Everybody who waits is told what became of it; the next request loads the model."""
    running = server({"a": EchoOptions(load_seconds=0.5)})
    refused: list[httpx.Response] = []
    async with connect(running) as client:

        async def wait() -> None:
            refused.append(await ask(client, "a", "x"))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            tasks.start_soon(wait)
            await until_status(client, lambda shown: depths(shown) == (2, 0) and in_state("a", "loading")(shown))
            [worker] = await until(lambda: workers(running), bool)
            os.kill(worker, signal.SIGKILL)
        shown = model_status(await status(client), "a")
        assert shown["state"] == "failed"
        assert "SIGKILL" in shown["reason"]
        assert content(await ask(client, "a", "again")) == "again"
    for response in refused:
        assert "SIGKILL" in check_error(response, 422, "model_load_failed")["message"]


async def test_a_death_is_seen_at_once(server: StartServer) -> None:
    """A stream hears of its worker's end as soon as the process is gone, not by a timeout."""
    running = server({"a": EchoOptions(token_seconds=30)})
    async with connect(running) as client:
        # The first token comes at once with the second step; the next would take half a minute.
        assert (await client.post("/admin/models/load", json={"model_id": "a"})).status_code == 200
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask, client, "a", "x y z")
            await until_status(client, lambda shown: depths(shown) == (1, 0))
            killed_at = time.monotonic()
            await kill_worker(client, "a")
            await until_status(client, lambda shown: model_status(shown, "a")["restarts"] == 1)
            seconds = time.monotonic() - killed_at
            tasks.cancel_scope.cancel()
    assert seconds < 1, f"from the death to the next load: {seconds:.3f} s"
