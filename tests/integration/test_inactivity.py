"""A request that gets no new token for too long is ended as failed; loading, and waiting in line, do not count."""

import time

import anyio
import psutil

from opta_lmx.types import EchoOptions
from tests.integration.chatting import (
    ask,
    chat,
    check_error,
    connect,
    content,
    depths,
    model_status,
    status,
    stream,
    until_all_returned,
    until_status,
    words,
)
from tests.integration.conftest import StartServer

LIMIT = {"request_inactivity_seconds": 0.6}


async def test_a_request_without_a_token_ends_with_504(server: StartServer) -> None:
    """Whole or streamed; the worker is told to let it go, so that slot and lease are back and the next is served."""
    running = server(
        {"a": EchoOptions(prefill_seconds_per_token=0.01)}, server=LIMIT, scheduling={"prefill_chunk_tokens": 16}
    )
    async with connect(running) as client:
        assert content(await ask(client, "a", "hello")) == "hello"
        for streaming in (False, True):
            started = time.monotonic()
            response = await client.post("/v1/chat/completions", json=chat("a", words(2000), stream=streaming))
            error = check_error(response, 504, "generation_stalled")
            assert error["type"] == "server_error"
            assert "0.6 seconds" in error["message"]
            assert response.headers["x-should-retry"] == "false"
            assert 0.6 <= time.monotonic() - started < 5
        await until_all_returned(client)
        assert content(await ask(client, "a", "again")) == "again"


async def test_a_stream_that_falls_silent_ends_with_an_error_event(server: StartServer) -> None:
    """After its text; the stream of a model that goes on, however slowly, is left alone."""
    running = server({"a": EchoOptions(hang_at=5), "b": EchoOptions(token_seconds=0.3)}, server=LIMIT)
    async with connect(running) as client, anyio.create_task_group() as tasks:

        async def slowly() -> None:
            assert content(await ask(client, "b", words(8))) == words(8)

        tasks.start_soon(slowly)
        read = await stream(client, chat("a", words(20)))
        assert (read.status, read.done) == (200, False)
        assert [error["code"] for error in read.errors] == ["generation_stalled"]
        assert read.text
        assert words(20).startswith(read.text)
        # A worker that hangs does not hear of the server's end: only signals end it, after their graces.
        psutil.Process(model_status(await status(client), "a")["pid"]).kill()


async def test_loading_and_waiting_do_not_count(server: StartServer) -> None:
    """Twice the limit to load, twice the limit in line: answered all the same."""
    running = server(
        {"a": EchoOptions(load_seconds=1.5, token_seconds=0.1)}, server=LIMIT, scheduling={"max_running": 1}
    )
    answers: list[str] = []
    async with connect(running) as client, anyio.create_task_group() as tasks:

        async def talk() -> None:
            answers.append(content(await ask(client, "a", words(15))))

        tasks.start_soon(talk)
        await until_status(client, lambda shown: depths(shown) == (1, 0))
        tasks.start_soon(talk)
    assert answers == [words(15)] * 2
