"""Leases and the loads behind them: who joins, who leaves, who dies, what status shows, how it all ends."""

import asyncio
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from opta_lmx.config import MemoryConfig
from opta_lmx.config_models import ModelsConfig
from opta_lmx.errors import Draining, LoadFailed, WorkerLost
from opta_lmx.manager.memory import MemoryMonitor
from opta_lmx.manager.residency import Residency
from opta_lmx.types import LoadOptions, ModelState
from tests.fake_workers import GIB, WALL_OFFSET_SECONDS, House, Machine, model_files, settle

A, B, C = model_files("a", 40), model_files("b", 40), model_files("c", 40)


async def test_callers_of_one_model_join_one_load() -> None:
    """However many ask while it loads, a model is loaded once, and each gets a lease of its own."""
    async with House() as house:
        house.machine.load_gate.clear()
        callers = [house.start(house.serve(A)) for _ in range(3)]
        await house.settle()
        assert house.shown("a").state is ModelState.LOADING
        assert house.shown("a").waiters == 3
        house.machine.load_gate.set()
        servings = [await caller for caller in callers]
        assert house.machine.loads == ["a"]
        assert house.shown("a").leases == 3
        for serving in servings:
            serving.end()
        assert house.shown("a").leases == 0


async def test_a_ready_model_is_leased_at_once() -> None:
    """A second request for a loaded model starts nothing."""
    async with House() as house:
        first, second = await house.serve(A), await house.serve(A)
        assert first.worker is second.worker
        assert first.lease.model_id == "a"
        assert house.machine.loads == ["a"]
        first.end()
        second.end()


async def test_a_lease_is_released_once() -> None:
    """Releasing a lease twice gives back one hold, not two."""
    async with House() as house:
        first, second = await house.residency.lease(A), await house.residency.lease(A)
        first.release()
        first.release()
        assert house.shown("a").leases == 1
        second.release()


async def test_a_failed_load_is_told_to_all_and_tried_again() -> None:
    """Everybody who joined gets the load's failure; the reason stays in sight until the next try succeeds."""
    async with House(failures={"a": LoadFailed("a", "no tensors")}) as house:
        callers = [house.start(house.residency.lease(A)) for _ in range(2)]
        await house.settle()
        assert [str(await caller) for caller in callers] == ["The model 'a' could not be loaded: no tensors"] * 2
        assert house.shown("a").state is ModelState.FAILED
        assert "no tensors" in (house.shown("a").reason or "")
        assert house.memory.reserved_bytes == 0
        house.machine.failures.clear()
        (await house.serve(A)).end()
        assert house.shown("a").state is ModelState.READY
        assert house.shown("a").reason is None
        assert house.shown("a").restarts == 0


async def test_a_worker_that_dies_as_its_load_ends_is_lost() -> None:
    """A death between the worker's return and the news of it is a failed load, not a lease on nothing."""

    class Fragile(Machine):
        async def __call__(self, *args: Any) -> Any:
            worker = await super().__call__(*args)
            worker.end(-9, "out of memory")
            return worker

    house = House()
    house.machine = Fragile(clock=house.clock)
    async with house:
        with pytest.raises(WorkerLost, match=r"signal SIGKILL: out of memory"):
            await house.residency.lease(A)
        assert house.shown("a").state is ModelState.FAILED


async def test_load_keeps_no_lease_and_measures() -> None:
    """A load leaves the model idle, and says what the machine uses and how long it took, waiting included."""
    async with House(others_bytes=5 * GIB) as house:
        house.machine.load_gate.clear()
        caller = house.start(house.residency.load(A))
        await house.settle()
        await house.advance(7)
        house.machine.load_gate.set()
        result = await caller
        assert (result.model_id, result.memory_after_bytes, result.seconds) == ("a", 45 * GIB, 7)
        assert house.shown("a").leases == 0
        assert house.shown("a").request_count == 0
        assert (await house.residency.load(A)).seconds == 0
        assert house.machine.loads == ["a"]


async def test_nothing_is_loaded_or_stopped_for_nobody() -> None:
    """A caller who leaves the queue for room leaves no trace in it."""
    async with House() as house:
        a, b = await house.serve(A), await house.serve(B)
        caller = house.start(house.residency.lease(C))
        await house.settle()
        caller.cancel()
        a.end()
        b.end()
        await house.settle()
        assert house.machine.loads == ["a", "b"]
        assert len(house.machine.workers) == 2
        assert [model.id for model in house.residency.snapshot()] == ["a", "b"]


async def test_a_load_goes_on_when_its_caller_leaves() -> None:
    """A load that has been started ends ready and idle, for the next caller."""
    async with House() as house:
        house.machine.load_gate.clear()
        caller = house.start(house.residency.lease(A))
        await house.settle()
        caller.cancel()
        house.machine.load_gate.set()
        await house.settle()
        assert house.shown("a").state is ModelState.READY
        assert house.shown("a").leases == 0


async def test_a_grant_nobody_took_is_given_back() -> None:
    """A caller cancelled in the same turn as its lease was granted holds nothing."""
    async with House() as house:
        await house.residency.load(A)
        serving = await house.serve(A)
        unload = house.start(house.residency.unload("a"))
        caller = house.start(house.residency.lease(A))
        await house.settle()
        unload.cancel()
        while house.shown("a").waiters:
            await checkpoint()
        caller.cancel()
        await house.settle()
        assert caller.cancelled()
        assert house.shown("a").leases == 1
        serving.end()


async def test_a_dead_worker_is_replaced_by_the_next_lease() -> None:
    """Its leases are void and harmless, the reason is kept, and the next request loads the model again."""
    async with House() as house:
        serving = await house.serve(A)
        serving.worker.end(-6, "Abort trap\n")
        await house.settle()
        assert house.shown("a").state is ModelState.ABSENT
        assert house.shown("a").reason == "signal SIGABRT: Abort trap"
        again = await house.serve(A)
        serving.end()
        assert house.shown("a").restarts == 1
        assert house.shown("a").reason is None
        assert house.shown("a").leases == 1
        again.end()


async def test_a_death_answers_the_unload_and_frees_the_waiting() -> None:
    """Whoever waited for the dead model's leases to end goes on at once."""
    async with House() as house:
        serving = await house.serve(A)
        unload = house.start(house.residency.unload("a"))
        await house.settle()
        late = house.start(house.serve(A))
        await house.settle()
        serving.worker.end(-9)
        assert (await unload).freed_bytes == 40 * GIB
        (await late).end()


async def test_a_death_keeps_pin_and_holds() -> None:
    """Protection belongs to the model, not to the process."""
    async with House() as house:
        await house.residency.load(A)
        house.residency.pin("a")
        house.residency.hold("a", "bot", 60)
        house.machine.worker("a").end(-9)
        await house.residency.load(A)
        assert house.shown("a").pinned
        assert house.shown("a").holds == 1


async def test_status_shows_every_part_of_a_resident() -> None:
    """Times on the wall clock, counts, pid and facts are those of the model's present process."""
    async with House() as house:
        (await house.serve(A)).end()
        await house.advance(30)
        serving = await house.serve(A)
        await house.advance(12)
        model = house.shown("a")
        assert model.pid == serving.worker.pid
        assert model.facts == serving.worker.facts
        assert model.loaded_at == 1000 + WALL_OFFSET_SECONDS
        assert model.last_used_at == 1030 + WALL_OFFSET_SECONDS
        assert (model.request_count, model.leases, model.holds, model.pinned) == (2, 1, 0, False)
        assert model.memory_bytes == 40 * GIB
        serving.end()


async def test_close_stops_all_at_once_and_refuses_the_waiting() -> None:
    """Ready, loading and stopping models all go, leased or not; callers get Draining, then and afterwards."""
    async with House() as house:
        serving = await house.serve(model_files("busy", 10))
        await house.residency.load(model_files("going", 10))
        house.machine.load_gate.clear()
        house.machine.stop_gate.clear()
        unload = house.start(house.residency.unload("going"))
        loading = house.start(house.residency.lease(model_files("coming", 10)))
        await house.settle()
        house.machine.closing = True
        closing = house.start(house.residency.close())
        await settle()
        assert isinstance(await loading, Draining)
        assert all(worker.stopping for worker in house.machine.workers)
        house.machine.stop_gate.set()
        await closing
        assert (await unload).freed_bytes >= 10 * GIB
        assert house.machine.workers == []
        assert [model.id for model in house.residency.snapshot()] == ["coming"]
        serving.end()
        with pytest.raises(Draining):
            await house.residency.lease(A)


async def test_close_before_a_load_has_begun_starts_no_process() -> None:
    """A load that was decided but whose task has not run yet ends without a worker."""
    async with House() as house:
        caller = house.start(house.residency.lease(A))
        while not house.residency.snapshot():
            await checkpoint()
        await house.residency.close()
        assert isinstance(await caller, Draining)
        assert house.machine.loads == []
        assert house.machine.workers == []


async def test_an_anyio_task_group_carries_loads_stops_and_deaths() -> None:
    """The group the server uses is a TaskStarter, also when a callback of the loop, not a task, asks it to start."""
    machine = Machine()
    memory = MemoryMonitor(MemoryConfig(kv_reserve_fraction=0), machine, machine.clock)
    async with anyio.create_task_group() as group:
        residency = Residency(ModelsConfig(), memory, machine, lambda files: LoadOptions(), group, machine.clock)
        lease = await residency.lease(A)
        worker = machine.worker("a")
        asyncio.get_running_loop().call_soon(worker.end, -9)
        await settle()
        lease.release()
        assert (await residency.load(A)).memory_after_bytes == 40 * GIB
        await residency.unload("a")
        await residency.close()
        residency.check()
    assert machine.violations == []
