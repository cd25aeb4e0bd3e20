"""A worker that dies costs one model and seconds: what its own requests see, and what nobody else notices."""

import os
import signal
import time
from collections.abc import Callable

import anyio
import httpx
import pytest

from opta_lmx.inference.worker.echo_backend import EXIT_WORD
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

# As the system ends a process that takes too much memory, and as Metal ends one whose command buffer failed.
BOTH_SIGNALS = (signal.SIGKILL, signal.SIGABRT)


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


async def test_a_model_whose_idle_worker_died_is_loaded_again(server: StartServer) -> None:
    """Its death is seen without a request, named in status and health, and mended by the next request; every time."""
    running = server({"a": EchoOptions()}, models={"default_model": "a"})
    async with connect(running) as client:
        assert content(await ask(client, "a", "before")) == "before"
        for deaths, number in enumerate(BOTH_SIGNALS, start=1):
            killed = await kill_worker(client, "a", number)
            shown = model_status(await until_status(client, in_state("a", "absent")), "a")
            assert shown["pid"] is None
            assert str(-number) in shown["reason"] or number.name in shown["reason"]
            health = (await client.get("/admin/health")).json()
            assert health["status"] == "degraded"
            assert health["reason"].startswith("a: ")
            assert content(await ask(client, "a", "after")) == "after"
            shown = model_status(await status(client), "a")
            assert (shown["state"], shown["restarts"], shown["reason"]) == ("ready", deaths, None)
            assert shown["pid"] != killed
            assert (await client.get("/admin/health")).json()["status"] == "ok"


async def test_streams_of_a_dead_worker_end_with_one_error(server: StartServer, subtests: pytest.Subtests) -> None:
    """Each keeps what it got, then one typed error, no [DONE]; another model's stream is the one it would have been."""
    running = server({"dies": SLOW, "lives": SLOW})
    text = words(30)
    async with connect(running) as client:
        undisturbed = await stream(client, chat("lives", text))
        for number in BOTH_SIGNALS:
            with subtests.test(number.name):
                *cut, other = await stream_through_a_death(client, text, number)
                for read in cut:
                    check_cut(read, text, number)
                assert other.text == text
                assert in_one_piece(other) == in_one_piece(undisturbed)
                await until_all_returned(client)


async def stream_through_a_death(client: httpx.AsyncClient, text: str, number: int) -> tuple[Stream, Stream, Stream]:
    """Two streams of a worker that is killed while they run, and one of another."""
    streams: dict[int, Stream] = {}

    async def read(index: int, model: str, begun: anyio.Event) -> None:
        streams[index] = await stream(client, chat(model, text), begun, at=3)

    async with anyio.create_task_group() as tasks:
        begun = [anyio.Event() for _ in range(3)]
        for index, model in enumerate(("dies", "dies", "lives")):
            tasks.start_soon(read, index, model, begun[index])
        for event in begun:
            await event.wait()
        await kill_worker(client, "dies", number)
    return streams[0], streams[1], streams[2]


def check_cut(read: Stream, text: str, number: signal.Signals) -> None:
    """The stream has some of its text, and one error that names what became of its worker."""
    [error] = read.errors
    assert read.status == 200
    assert not read.done
    assert "error" in read.events[-1]
    assert (error["type"], error["code"], error["param"]) == ("server_error", "worker_lost", None)
    assert "dies" in error["message"]
    assert number.name in error["message"]
    assert 3 <= len(read.text.split()) < len(text.split())
    assert text.startswith(read.text)


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
    """A worker that dies during prefill costs its requests time and nothing else; its end is seen at once."""
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
            killed_at = time.monotonic()
            await until_status(client, lambda shown: model_status(shown, "a")["restarts"] == 1)
            seconds = time.monotonic() - killed_at
        await until_all_returned(client)
    assert answers == [text, text]
    assert seconds < 1, f"from the death to the next load: {seconds:.3f} s"


async def test_a_model_the_operator_loaded_comes_back_without_jit(server: StartServer) -> None:
    """``jit: false`` keeps requests from choosing what is in memory; a death does not undo the operator's choice."""
    models = {"jit": False, "auto_load": ["a"]}
    running = server({"a": SLOW_PREFILL}, scheduling=SMALL_CHUNKS, models=models)
    answers: list[httpx.Response] = []
    async with connect(running) as client:

        async def whole() -> None:
            answers.append(await ask(client, "a", words(48)))

        await until_status(client, in_state("a", "ready"))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(whole)
            await until_status(client, lambda shown: depths(shown) == (1, 0))
            await kill_worker(client, "a")
        assert content(answers[0]) == words(48)
        assert content(await ask(client, "a", "after")) == "after"


async def test_a_request_that_kills_its_worker_twice_is_refused(server: StartServer) -> None:
    """It is likelier the cause than the victim: two starts, then 503 with the exit code; no third worker."""
    running = server({"poisoned": EchoOptions(exit_at=1), "b": EchoOptions()})
    async with connect(running) as client:
        response = await ask(client, "poisoned", "x")
        error = check_error(response, 503, "request_lost_twice")
        shown = model_status(await status(client), "poisoned")
        await until_all_returned(client)
        assert content(await ask(client, "b", "unharmed")) == "unharmed"
    assert response.headers["x-should-retry"] == "false"
    assert "exit code 9" in error["message"]
    assert (shown["state"], shown["restarts"]) == ("absent", 1)
    assert "exit code 9" in shown["reason"]


async def test_one_poisoned_request_costs_the_others_only_time(server: StartServer) -> None:
    """Of nine that saw their worker die, one kills it again and is refused; eight are answered, as are newer ones."""
    running = server({"a": EchoOptions(token_seconds=0.02)})
    answers: dict[str, httpx.Response] = {}
    async with connect(running) as client:
        content(await ask(client, "a", "loaded"))

        async def wait(text: str) -> None:
            answers[text] = await ask(client, "a", text)

        async with anyio.create_task_group() as tasks:
            for text in ("one", "two", "three", "four", f"{EXIT_WORD} all", "five", "six", "seven", "eight"):
                tasks.start_soon(wait, text)
        newer = content(await ask(client, "a", "newer"))
        restarts = model_status(await status(client), "a")["restarts"]
        await until_all_returned(client)
    poisoned = answers.pop(f"{EXIT_WORD} all")
    check_error(poisoned, 503, "request_lost_twice")
    assert newer == "newer"
    assert restarts == 2
    # Whoever had words already when the worker died cannot be started again, and is told so.
    lost = [text for text, answer in answers.items() if answer.status_code != 200]
    for text in lost:
        check_error(answers[text], 503, "worker_lost")
    assert {text: content(answer) for text, answer in answers.items() if text not in lost} == {
        text: text for text in answers if text not in lost
    }


async def test_a_worker_that_dies_again_and_again_is_left_alone(server: StartServer) -> None:
    """After the deaths the settings allow the model has failed, and says why; a load by hand starts it again."""
    running = server({"a": EchoOptions(), "b": EchoOptions()}, workers={"restart_limit": 3})
    async with connect(running) as client:
        for _ in range(3):
            content(await ask(client, "a", "up"))
            await kill_worker(client, "a")
            await until_status(client, lambda shown: not in_state("a", "ready")(shown))
        refused = await ask(client, "a", "x")
        error = check_error(refused, 503, "model_failed")
        shown = model_status(await status(client), "a")
        assert (shown["state"], "SIGKILL" in shown["reason"]) == ("failed", True)
        assert content(await ask(client, "b", "unharmed")) == "unharmed"
        loaded = await client.post("/admin/models/load", json={"model_id": "a"})
        assert loaded.status_code == 200, loaded.text
        assert content(await ask(client, "a", "back")) == "back"
    assert "SIGKILL" in error["message"]
    assert "/admin/models/load" in error["message"]
    assert refused.headers["x-should-retry"] == "false"


async def test_a_worker_that_makes_no_step_is_replaced(server: StartServer) -> None:
    """Stopped like a process that waits for ever: not ready by its name, then ended; its requests go on elsewhere."""
    running = server({"a": EchoOptions(), "b": SLOW}, workers={"stall_seconds": 2})
    async with connect(running) as client:
        content(await ask(client, "a", "up"))
        stopped: int = model_status(await status(client), "a")["pid"]
        os.kill(stopped, signal.SIGSTOP)
        answers: list[httpx.Response] = []

        async def wait() -> None:
            answers.append(await ask(client, "a", "again"))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            not_ready = await until(lambda: client.get("/admin/ready"), lambda answer: answer.status_code == 503)
            assert "a has made no step" in not_ready.json()["reason"]
        assert content(answers[0]) == "again"
        shown = model_status(await status(client), "a")
        assert (shown["state"], shown["restarts"]) == ("ready", 1)
        assert shown["pid"] != stopped
        assert (await client.get("/admin/ready")).status_code == 200
        assert content(await ask(client, "b", "unharmed")) == "unharmed"
    assert "worker_stalled" in running.log.read_text()


async def test_a_stream_of_a_stalled_worker_ends_with_its_reason(server: StartServer) -> None:
    """Words, then silence for the bound, then one error that says what was wrong."""
    running = server({"a": EchoOptions(hang_at=5)}, workers={"stall_seconds": 1})
    async with connect(running) as client:
        read = await stream(client, chat("a", words(20)))
        await until_all_returned(client)
    assert b"w0" in read.raw
    assert b"made no step for" in read.raw
    assert b"[DONE]" not in read.raw


async def test_a_model_that_is_to_be_loaded_comes_back_unasked(server: StartServer) -> None:
    """One that ``auto_load`` names is started again at once, so that the server becomes ready by itself."""
    running = server({"a": EchoOptions()}, models={"auto_load": ["a"]})
    async with connect(running) as client:
        await until_status(client, in_state("a", "ready"))
        killed = await kill_worker(client, "a")
        shown = await until_status(
            client, lambda shown: in_state("a", "ready")(shown) and model_status(shown, "a")["pid"] != killed
        )
        assert (await client.get("/admin/ready")).status_code == 200
    assert model_status(shown, "a")["restarts"] == 1


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
