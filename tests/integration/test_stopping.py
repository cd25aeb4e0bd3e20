"""How a server ends: drained, at once, or killed; whatever the way, nothing of it is left."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import anyio
import httpx
import psutil
import pytest

from opta_lmx.manager.catalog import ECHO_NAME
from opta_lmx.manager.importing import STAGING_SUFFIX
from opta_lmx.manager.integrity import ModelsLock
from opta_lmx.manager.starter import STARTER_ID
from opta_lmx.service.lock import LOCK_NAME
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
    stream,
    until,
    until_status,
    words,
)
from tests.integration.conftest import RunningServer, StartServer, temporary_directory, wait_gone
from tests.integration.test_import_job import held

SLOW = EchoOptions(token_seconds=0.02)
FOR_A_MINUTE = EchoOptions(token_seconds=0.06)
LONG = words(1000)

# Seconds from the end of a server to the end of the last of its processes.
GONE_BOUND = 1.0


async def ended(server: RunningServer, bound: float) -> float:
    """Seconds until the server's process has ended; fails after ``bound`` of them."""
    started = time.monotonic()
    with anyio.fail_after(bound):
        while server.process.poll() is None:  # noqa: ASYNC110 - a process of its own sets no event here
            await anyio.sleep(0.005)
    return time.monotonic() - started


def check_nothing_left(server: RunningServer, exit_code: int = 0) -> None:
    """The server ended with this code and took every process it ever had with it."""
    assert server.process.returncode == exit_code, server.log.read_text()
    left = wait_gone(server.seen, GONE_BOUND)
    assert not left, f"still there after {GONE_BOUND} s: {[process.cmdline() for process in left]}"
    # Whoever starts it again finds its port free, and nothing of it in the way.
    with socket.create_server(("127.0.0.1", server.port)):
        assert list(temporary_directory(server.log.parent).iterdir()) == []


async def load(client: httpx.AsyncClient, model: str) -> None:
    """Has a model in memory."""
    response = await client.post("/admin/models/load", json={"model_id": model})
    assert response.status_code == 200, response.text


async def commands(server: RunningServer) -> str:
    """The command lines of the server's children, one a line."""
    lines = []
    for child in server.children():
        with contextlib.suppress(psutil.NoSuchProcess):
            lines.append(" ".join(child.cmdline()))
    return "\n".join(lines)


async def test_a_killed_server_takes_its_workers_with_it(server: StartServer) -> None:
    """Workers at work and idle, a spare that is still starting and a running import are gone within a second."""
    running = server(
        {"busy": EchoOptions(token_seconds=30), "idle": EchoOptions()}, models={"starter": True, "spare_worker": True}
    )
    async with connect(running) as client, anyio.create_task_group() as tasks:
        await load(client, "idle")
        await load(client, "busy")
        tasks.start_soon(ask, client, "busy", LONG)
        await until_status(client, lambda shown: depths(shown) == (1, 0))
        shown = await until(lambda: commands(running), lambda shown: "worker.convert" in shown)
        assert shown.count("worker --fd") == 3, shown
        running.process.kill()
        running.process.wait()
        tasks.cancel_scope.cancel()
    check_nothing_left(running, -signal.SIGKILL)


async def test_the_first_sigterm_lets_accepted_requests_finish(server: StartServer) -> None:
    """Running ones, and one whose model has only begun to load; newcomers are told to come back; it ends with 0."""
    running = server({"a": SLOW, "late": EchoOptions(load_seconds=0.5)}, server={"drain_seconds": 20})
    text = words(60)
    answers: dict[str, str] = {}
    async with connect(running) as client:

        async def whole(model: str) -> None:
            answers[model] = content(await ask(client, model, text))

        async def streamed(begun: anyio.Event) -> None:
            read = await stream(client, chat("a", text), begun)
            assert read.done
            answers["streamed"] = read.text

        async with anyio.create_task_group() as tasks:
            begun = anyio.Event()
            tasks.start_soon(whole, "a")
            tasks.start_soon(streamed, begun)
            await begun.wait()
            tasks.start_soon(whole, "late")
            await until_status(client, lambda shown: model_status(shown, "late").get("state") == "loading")
            await until(lambda: commands(running), lambda shown: shown.count("--echo") == 2)
            running.process.terminate()
            await until_status(client, lambda shown: shown["draining"])
            await check_refused_while_draining(client)
    assert answers == {"a": text, "late": text, "streamed": text}
    await ended(running, 3)
    check_nothing_left(running)


async def check_refused_while_draining(client: httpx.AsyncClient) -> None:
    """New work is refused with the reason and a time to come back; health is about the process and stays good."""
    for response in (
        await ask(client, "a", "late"),
        await client.post("/v1/chat/completions", json=chat("a", "late", stream=True)),
        await client.post("/admin/models/load", json={"model_id": "a"}),
        await client.get("/admin/ready"),
    ):
        check_error(response, 503, "draining")
        assert int(response.headers["retry-after"]) >= 1
    assert (await client.get("/admin/health")).status_code == 200


async def test_the_second_sigterm_ends_at_once(server: StartServer) -> None:
    """Whoever cannot wait asks twice: no drain, no worker left, exit code 0."""
    running = server({"a": FOR_A_MINUTE}, server={"drain_seconds": 60})
    async with connect(running) as client, anyio.create_task_group() as tasks:
        begun = anyio.Event()
        tasks.start_soon(stream_until_cut, client, begun)
        await begun.wait()
        running.children()
        running.process.terminate()
        await until_status(client, lambda shown: shown["draining"])
        running.process.terminate()
        await ended(running, 2)
    check_nothing_left(running)


async def test_the_drain_has_a_limit(server: StartServer) -> None:
    """Whoever is not served by then is told: an error event in a stream, 503 for a whole answer. SIGINT is SIGTERM."""
    running = server({"a": FOR_A_MINUTE}, server={"drain_seconds": 0.3})
    streamed: list[Stream] = []
    whole: list[httpx.Response] = []
    async with connect(running) as client:

        async def read(begun: anyio.Event) -> None:
            streamed.append(await stream(client, chat("a", LONG), begun))

        async def wait() -> None:
            whole.append(await ask(client, "a", LONG))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await until_status(client, lambda shown: depths(shown) == (1, 0))
            begun = anyio.Event()
            tasks.start_soon(read, begun)
            await begun.wait()
            running.children()
            running.process.send_signal(signal.SIGINT)
            # The limit, and the ends of two processes.
            await ended(running, 2)
    check_nothing_left(running)
    assert not streamed[0].done
    [error] = streamed[0].errors
    assert error["type"] == "server_error"
    assert whole[0].status_code == 503, whole[0].text
    assert whole[0].json()["error"]["type"] == "server_error"


async def test_a_load_in_flight_does_not_hold_up_the_end(server: StartServer) -> None:
    """At the limit of the drain whoever waits for a load is told, and the worker that was loading has gone."""
    running = server({"a": EchoOptions(load_seconds=60)}, server={"drain_seconds": 0.3})
    async with connect(running) as client, anyio.create_task_group() as tasks:

        async def wait() -> None:
            check_error(await ask(client, "a", "hello"), 503, "draining")

        tasks.start_soon(wait)
        await until(lambda: commands(running), lambda shown: "--echo" in shown)
        running.process.terminate()
        await ended(running, 4)
    check_nothing_left(running)


async def test_an_import_in_flight_does_not_hold_up_the_end(server: StartServer) -> None:
    """Nobody waits for the starter's import at the start: it is ended at once, and leaves no half of a model behind."""
    running = server({}, models={"starter": True}, server={"drain_seconds": 20})
    await until(lambda: commands(running), lambda shown: "worker.convert" in shown)
    running.process.terminate()
    await ended(running, 4)
    check_nothing_left(running)
    models = running.log.parent / "models"
    left = {path.name for path in models.iterdir() if not path.name.endswith(".incomplete")}
    assert left <= {LOCK_NAME, "models.lock"}


async def test_an_import_that_is_waited_for_does_not_hold_up_the_end(server: StartServer, tmp_path: Path) -> None:
    """At the limit of the drain the import ends, and whoever waits for it is told: for a request, and for a load."""
    asked: list[httpx.Response] = []
    with held(tmp_path / f"{STARTER_ID}{STAGING_SUFFIX}"):
        models = {"starter": True, "models_directory": str(tmp_path)}
        running = server({}, models=models, server={"drain_seconds": 0.3})
        async with connect(running) as client, anyio.create_task_group() as tasks:

            async def wait(path: str, body: JsonObject) -> None:
                asked.append(await client.post(path, json=body))

            tasks.start_soon(wait, "/admin/models/load", {"model_id": STARTER_ID})
            tasks.start_soon(wait, "/v1/chat/completions", chat(STARTER_ID, "hello"))
            await until_status(client, lambda shown: depths(shown) == (1, 0))
            running.process.terminate()
            await ended(running, 4)
    for response in asked:
        check_error(response, 503, "draining")
    check_nothing_left(running)
    assert "Traceback" not in running.log.read_text()


@pytest.mark.parametrize("path", ["/admin/models/verify", "/admin/models/load", "/v1/chat/completions"])
async def test_files_that_are_hashed_do_not_hold_up_the_end(server: StartServer, tmp_path: Path, path: str) -> None:
    """Half a minute of hashing, for a verification or before a load: it ends with the drain, and its caller is told."""
    weights = tmp_path / "a" / "weights.bin"
    weights.parent.mkdir()
    (weights.parent / ECHO_NAME).write_bytes(b"{}")
    weights.touch()
    ModelsLock(tmp_path).record("a", weights.parent, "acme/a", "main")
    os.truncate(weights, 32 * 2**30)  # of which the disk holds nothing
    models = {"models_directory": str(tmp_path), "starter": False}
    running = server({}, models=models, server={"drain_seconds": 0.3})
    async with connect(running) as client, anyio.create_task_group() as tasks:

        async def wait() -> None:
            body = {"/admin/models/verify": {}, "/admin/models/load": {"model_id": "a"}}.get(path, chat("a", "hello"))
            check_error(await client.post(path, json=body), 503, "draining")

        tasks.start_soon(wait)
        await until(lambda: open_files(running), lambda shown: str(weights) in shown)
        running.process.terminate()
        await ended(running, 4)
    check_nothing_left(running)
    assert "Traceback" not in running.log.read_text()


async def open_files(server: RunningServer) -> set[str]:
    """The files that the server itself has open."""
    return {file.path for file in psutil.Process(server.pid).open_files()}


async def test_a_second_sigterm_ends_a_load_too(server: StartServer) -> None:
    """No grace for anybody."""
    running = server({"a": EchoOptions(load_seconds=60)}, server={"drain_seconds": 60})
    async with connect(running) as client, anyio.create_task_group() as tasks:

        async def wait() -> None:
            with contextlib.suppress(httpx.TransportError):
                assert (await ask(client, "a", "hello")).status_code == 503

        tasks.start_soon(wait)
        await until(lambda: commands(running), lambda shown: "--echo" in shown)
        running.process.terminate()
        await until_status(client, lambda shown: shown["draining"])
        running.process.terminate()
        await ended(running, 2)
    check_nothing_left(running)


def test_a_server_with_a_dead_part_ends_loudly(tmp_path: Path) -> None:
    """A background task that fails, here for want of a program to start, ends the server: exit code 1, and why."""
    config = tmp_path / "config.yaml"
    config.write_text(
        json.dumps({"server": {"port": 0}, "models": {"models_directory": str(tmp_path / "models"), "starter": False}})
    )
    start = (
        "import sys; from opta_lmx.cli import main; sys.executable = '/nowhere/python'; "
        f"sys.exit(main(['serve', '--config', {str(config)!r}]))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", start],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    assert finished.returncode == 1, finished.stderr
    lines = [json.loads(line) for line in finished.stderr.splitlines()]
    [failure] = [line for line in lines if line["level"] == "critical"]
    assert (failure["event"], failure["task"]) == ("task_failed", "WorkerSpawner.warm")
    assert "FileNotFoundError: No such file or directory" in failure["exception"]
    assert lines[-1] | {"event": "server_stopped", "exit_code": 1} == lines[-1]


async def stream_until_cut(client: httpx.AsyncClient, begun: anyio.Event) -> None:
    """Reads a stream that the server's end cuts; it must not look like a finished one."""
    with contextlib.suppress(httpx.TransportError):
        read = await stream(client, chat("a", LONG), begun)
        assert not read.done


async def test_an_idle_server_stops_at_once(server: StartServer) -> None:
    """A loaded model and a connection that is kept alive delay nobody."""
    running = server({"a": EchoOptions()})
    async with connect(running) as client:
        assert content(await ask(client, "a", "hello")) == "hello"
        running.children()
        running.process.terminate()
        await ended(running, 1.5)
    check_nothing_left(running)
