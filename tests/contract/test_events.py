"""GET /admin/events: what is told first, each kind of change, and a reader who leaves."""

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import httpx

from opta_lmx.errors import HubUnreachable
from opta_lmx.manager.changes import ChangeFeed, ModelChange
from opta_lmx.manager.download_job import DownloadState
from opta_lmx.manager.residency import ResidentModel
from opta_lmx.types import ModelState
from tests.contract.conftest import Running, connect
from tests.fakes import FixedResidency, World, download, resident

URL = "/admin/events"


def read(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Every event's name and data."""
    events = [event.split("\n") for event in text.removesuffix("\n\n").split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in events]


async def test_the_present_comes_first(client: httpx.AsyncClient, world: World) -> None:
    """As the routes show it that one would ask otherwise; then, at the server's end, nothing more."""
    world.residency.residents = (resident("tiny"),)
    world.changes.close()
    response = await client.get(URL)
    assert response.headers["content-type"].startswith("text/event-stream")
    [(name, snapshot)] = read(response.text)
    assert name == "snapshot"
    assert snapshot["models"] == (await client.get("/admin/models")).json()["models"]
    assert snapshot["downloads"] == (await client.get("/admin/models/download")).json()["downloads"]


class Eventful(FixedResidency):
    """Lets something happen whenever it is looked at, which a reader does once it listens."""

    def __init__(self, happen: Callable[[], object]) -> None:
        super().__init__()
        self._happen = happen

    def snapshot(self) -> tuple[ResidentModel, ...]:
        """Nothing in memory."""
        self._happen()
        return ()


async def test_each_change_is_an_event(world: World) -> None:
    """By its kind, with its time; what a slow reader has missed is counted."""
    world.changes = ChangeFeed(wall=lambda: 7.5, kept=4)

    def happen() -> None:
        changes = (
            ModelChange("lost", ModelState.READY),
            ModelChange("tiny", ModelState.STOPPING, cause="evicted"),
            ModelChange("tiny", ModelState.FAILED, "bad"),
            download(),
            download(DownloadState.FAILED, error=HubUnreachable("No hub.")),
        )
        for change in changes:
            world.changes.publish(change)
        world.changes.close()

    world.residency = Eventful(happen)
    async with connect(world) as client:
        events = read((await client.get(URL)).text)
    stopping = {"at": 7.5, "model_id": "tiny", "state": "stopping", "cause": "evicted", "reason": None}
    assert events[1:4] == [
        ("lagged", {"at": 7.5, "missed": 1}),
        ("model", stopping),
        ("model", stopping | {"state": "failed", "cause": None, "reason": "bad"}),
    ]
    assert [(name, data["state"], data["at"]) for name, data in events[4:]] == [
        ("download", "downloading", 7.5),
        ("download", "failed", 7.5),
    ]
    assert events[5][1]["error"]["code"] == "hub_unreachable"


async def test_silence_is_told_of(world: World) -> None:
    """By a comment, which every reader of events skips and every proxy takes for traffic."""
    world.changes = ChangeFeed(quiet_seconds=0)
    world.residency = Eventful(lambda: asyncio.get_running_loop().call_later(0.01, world.changes.close))
    async with connect(world) as client:
        assert ": heartbeat\n\n: heartbeat\n\n" in (await client.get(URL)).text


def test_a_reader_who_leaves_is_forgotten(running: Running) -> None:
    """As soon as the connection has gone, without waiting for something to tell."""
    with httpx.Client(base_url=running.url, trust_env=False) as client, client.stream("GET", URL) as response:
        # Kept, because an iterator that is dropped closes the connection.
        lines = response.iter_lines()
        assert next(lines) == "event: snapshot"
        assert running.world.changes.readers == 1
    deadline = time.monotonic() + 5
    while running.world.changes.readers and time.monotonic() < deadline:
        time.sleep(0.01)
    assert running.world.changes.readers == 0
