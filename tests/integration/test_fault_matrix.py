"""Every way a worker ends, at every moment of a request, streamed and whole: one outcome each, and nobody else notices.

``scripts/test -m "load or not load" tests/integration/test_fault_matrix.py -s`` runs all of it, and prints how soon
faults were told and how soon the next answer came.
"""

import os
import signal
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

import anyio
import httpx
import pytest

from opta_lmx.types import EchoOptions, JsonObject
from tests.integration.chatting import (
    ask,
    chat,
    check_error,
    connect,
    content,
    model_status,
    status,
    stream,
    until,
    until_all_returned,
    words,
)
from tests.integration.conftest import RunningServer, StartServer
from tests.integration.test_stopping import check_nothing_left, ended

# A token takes 10 ms and a chunk of prompt 64, so that each moment lasts long enough to be met.
VICTIM: Final = EchoOptions(token_seconds=0.01, prefill_seconds_per_token=0.004)
SLOW_LOAD: Final = EchoOptions(load_seconds=0.4)
BYSTANDER: Final = EchoOptions(token_seconds=0.01)

TEXT: Final = words(40)
OTHER: Final = words(30, "b")

# By the kernel, by Metal, by a fault of the interpreter, by an operator; and one that lives on and does nothing.
# The two that differ least from the others are left to -m load.
HANG: Final = signal.SIGSTOP
FAULTS: Final = (
    signal.SIGKILL,
    signal.SIGABRT,
    pytest.param(signal.SIGSEGV, marks=pytest.mark.load),
    pytest.param(signal.SIGTERM, marks=pytest.mark.load),
    HANG,
)

Outcome: TypeAlias = Literal["answered", "lost", "load failed"]


@dataclass(slots=True)
class Cell:
    """One square: the fault, and the form of the request it meets. Times are of one run of it, in seconds."""

    server: RunningServer
    client: httpx.AsyncClient
    fault: signal.Signals
    streams: bool
    struck_at: float = 0.0
    outcomes: list[tuple[Outcome, float]] = field(default_factory=list)

    async def request(self, model: str = "a") -> None:
        """Asks, and takes down how it ended and when; whatever else an answer may be fails here."""
        if self.streams:
            read = await stream(self.client, chat(model, TEXT))
            if read.status != 200:
                outcome = self._refused(read.status, httpx.Response(read.status, content=read.raw))
            elif read.done:
                assert (read.errors, read.text) == ([], TEXT)
                outcome = "answered"
            else:
                [error] = read.errors
                assert "error" in read.events[-1]
                assert TEXT.startswith(read.text)
                outcome = self._lost(error)
        else:
            response = await ask(self.client, model, TEXT)
            if response.status_code == 200:
                assert content(response) == TEXT
                outcome = "answered"
            else:
                outcome = self._refused(response.status_code, response)
        self.outcomes.append((outcome, time.monotonic()))

    async def until_phase(self, phase: str) -> None:
        """Waits until a request for the victim is so far."""

        async def look() -> list[str]:
            shown = (await self.client.get("/admin/requests")).json()["requests"]
            return [one["phase"] for one in shown if one["model_id"] != "b"]

        await until(look, lambda phases: phase in phases)

    async def strike(self) -> None:
        """The victim's worker ends, or stops."""
        self.strike_process(model_status(await status(self.client), "a")["pid"])

    def strike_process(self, pid: int) -> None:
        """Of this process."""
        self.struck_at = time.monotonic()
        os.kill(pid, self.fault)

    def _refused(self, status: int, response: httpx.Response) -> Outcome:
        if status == 422:
            assert self.fault.name in check_error(response, 422, "model_load_failed")["message"]
            return "load failed"
        return self._lost(check_error(response, 503, "worker_lost"))

    def _lost(self, error: JsonObject) -> Outcome:
        assert (error["type"], error["code"], error["param"]) == ("server_error", "worker_lost", None)
        assert ("made no step" if self.fault is HANG else self.fault.name) in error["message"]
        return "lost"


Moment: TypeAlias = Callable[[Cell], Awaitable[None]]


async def idle(cell: Cell) -> None:
    """Nobody is there; who comes next is served."""
    await cell.strike()
    await until(lambda: status(cell.client), lambda shown: model_status(shown, "a")["state"] == "absent")
    await cell.request()


async def loading(cell: Cell) -> None:
    """The load fails for who waits for it, and not for who comes next."""
    await cell.client.post("/admin/models/unload", json={"model_id": "slow"})
    before = {child.pid for child in cell.server.children()}
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(cell.request, "slow")
        await cell.until_phase("load")

        async def started() -> list[int]:
            return [child.pid for child in cell.server.children() if child.pid not in before]

        [worker] = await until(started, bool)
        cell.strike_process(worker)
    await cell.request("slow")


async def queued(cell: Cell) -> None:
    """Who runs is lost; who waits in line is served by the next worker."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(cell.request)
        await cell.until_phase("decode")
        tasks.start_soon(cell.request)
        await cell.until_phase("queue")
        await cell.strike()


async def in_prefill(cell: Cell) -> None:
    """Nothing was made yet: it is done again."""
    await _strike_in("prefill", cell)


async def in_decode(cell: Cell) -> None:
    """What was made is gone: the client is told."""
    await _strike_in("decode", cell)


async def _strike_in(phase: str, cell: Cell) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(cell.request)
        await cell.until_phase(phase)
        await cell.strike()


async def unloading(cell: Cell) -> None:
    """An unload waits for the request; the end of the worker ends both."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(cell.request)
        await cell.until_phase("decode")
        tasks.start_soon(_unload, cell.client)
        await cell.strike()


async def _unload(client: httpx.AsyncClient) -> None:
    answer = await client.post("/admin/models/unload", json={"model_id": "a"})
    assert answer.status_code in (200, 409), answer.text


# What becomes of the requests of each moment, in the order in which they end.
MATRIX: Final[dict[Moment, list[Outcome]]] = {
    idle: ["answered"],
    loading: ["load failed", "answered"],
    queued: ["lost", "answered"],
    in_prefill: ["answered"],
    in_decode: ["lost"],
    unloading: ["lost"],
}
# Nothing is asked of a worker then, or its time is the load's own bound: that it has stopped shows nowhere.
UNSEEN_HANGS: Final = (idle, loading)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
async def test_every_moment_has_its_outcome(
    server: StartServer, subtests: pytest.Subtests, fault: signal.Signals
) -> None:
    """And after each: the next request is answered, nothing is held, and another model's stream was never disturbed."""
    running = server(
        {"a": VICTIM, "slow": SLOW_LOAD, "b": BYSTANDER},
        scheduling={"max_running": 1, "prefill_chunk_tokens": 16},
        # Each death is forgiven at once: what is asked here is not how often a model may die.
        workers={"stall_seconds": 1, "restart_window_seconds": 0.001},
    )
    told: list[float] = []
    recovered: list[float] = []
    async with connect(running) as client:
        undisturbed = (await stream(client, chat("b", OTHER))).text
        assert undisturbed == OTHER
        for moment, expected in MATRIX.items():
            for streams in (False, True):
                if fault is HANG and moment in UNSEEN_HANGS:
                    continue
                with subtests.test(moment=moment.__name__, streams=streams):
                    cell = Cell(running, client, fault, streams)
                    await ask(client, "a", "up")
                    await _beside(cell, moment)
                    assert [outcome for outcome, _ in cell.outcomes] == expected
                    told += [at - cell.struck_at for outcome, at in cell.outcomes if outcome == "lost"]
                    assert content(await ask(client, "a", "next")) == "next"
                    if expected == ["lost"]:
                        recovered.append(time.monotonic() - cell.struck_at)
                    await until_all_returned(client)
    _print(fault, told, recovered)
    # 50 ms are promised; a machine's other tenants may take the rest. A hang is noticed after its bound of a second.
    assert statistics.median(told) < (3 if fault is HANG else 0.2)


async def _beside(cell: Cell, moment: Moment) -> None:
    """A moment, while another model streams."""
    async with anyio.create_task_group() as tasks:
        begun = anyio.Event()

        async def talk() -> None:
            assert (await stream(cell.client, chat("b", OTHER), begun)).text == OTHER

        tasks.start_soon(talk)
        await begun.wait()
        await moment(cell)


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGABRT], ids=lambda fault: fault.name)
@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
async def test_a_fault_while_the_server_drains(server: StartServer, fault: signal.Signals, streams: bool) -> None:
    """The request that is waited for is told, and the server ends as it would have."""
    running = server({"a": VICTIM})
    async with connect(running) as client:
        cell = Cell(running, client, fault, streams)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(cell.request)
            await cell.until_phase("decode")
            pid = model_status(await status(client), "a")["pid"]
            running.children()
            running.process.terminate()
            await until(lambda: client.get("/admin/ready"), lambda answer: answer.status_code == 503)
            cell.strike_process(pid)
    assert [outcome for outcome, _ in cell.outcomes] == ["lost"]
    await ended(running, 5)
    check_nothing_left(running)


def _print(fault: signal.Signals, told: list[float], recovered: list[float]) -> None:
    shown = ", ".join(
        f"{name} p50 {statistics.median(values) * 1000:.0f} max {max(values) * 1000:.0f} ms"
        for name, values in (("told", told), ("next answer", recovered))
    )
    print(f"\n{fault.name}: {shown}")  # noqa: T201 - with -s, for the record
