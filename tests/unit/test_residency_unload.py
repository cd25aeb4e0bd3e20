"""Unloads that meet leases, loads, pins and each other; files that change."""

import pytest

from opta_lmx.errors import Conflict, LoadFailed, ModelLoading
from tests.fake_workers import GIB, House, model_files

A, B, C = model_files("a", 40), model_files("b", 40), model_files("c", 40)


async def test_unload_tells_what_came_back() -> None:
    """The freed bytes are measured on the machine after the process has gone."""
    async with House() as house:
        await house.residency.load(A)
        result = await house.residency.unload("a")
        assert (result.model_id, result.freed_bytes) == ("a", 40 * GIB)
        assert house.machine.workers == []
        assert house.residency.snapshot() == ()


async def test_freed_bytes_are_never_negative() -> None:
    """Other processes that grow meanwhile do not make an unload cost memory."""
    async with House() as house:
        await house.residency.load(A)
        house.machine.stop_gate.clear()
        unload = house.start(house.residency.unload("a"))
        await house.settle()
        house.machine.others_bytes = 50 * GIB
        house.machine.stop_gate.set()
        assert (await unload).freed_bytes == 0


async def test_unload_waits_for_leases_and_lets_no_new_one_in() -> None:
    """Requests that run are not torn; one that comes after the unload waits, and loads the model again."""
    async with House() as house:
        serving = await house.serve(A)
        unload = house.start(house.residency.unload("a"))
        await house.settle()
        late = house.start(house.serve(A))
        await house.settle()
        assert not unload.done()
        assert not late.done()
        serving.end()
        assert (await unload).freed_bytes == 40 * GIB
        (await late).end()
        assert house.machine.loads == ["a", "a"]


async def test_unload_while_loading_serves_the_joined_first() -> None:
    """Who joined the load gets a lease; the unload follows when the last of them has ended."""
    async with House() as house:
        house.machine.load_gate.clear()
        caller = house.start(house.serve(A))
        await house.settle()
        unload = house.start(house.residency.unload("a"))
        await house.settle()
        house.machine.load_gate.set()
        serving = await caller
        await house.settle()
        assert not unload.done()
        serving.end()
        assert (await unload).freed_bytes == 40 * GIB


async def test_unload_of_a_load_that_fails_frees_nothing() -> None:
    """An unload that waited for a failing load is answered: the model is not in memory."""
    async with House(failures={"a": LoadFailed("a", "broken")}) as house:
        house.machine.load_gate.clear()
        caller = house.start(house.residency.load(A))
        await house.settle()
        unload = house.start(house.residency.unload("a"))
        await house.settle()
        house.machine.load_gate.set()
        assert isinstance(await caller, LoadFailed)
        assert (await unload).freed_bytes == 0


async def test_unloads_of_one_model_join() -> None:
    """Everybody who asks for the unload, before or while it runs, gets its result."""
    async with House() as house:
        await house.residency.load(A)
        house.machine.stop_gate.clear()
        unloads = [house.start(house.residency.unload("a")) for _ in range(2)]
        await house.settle()
        unloads.append(house.start(house.residency.unload("a")))
        await house.settle()
        house.machine.stop_gate.set()
        assert [(await unload).freed_bytes for unload in unloads] == [40 * GIB] * 3


async def test_an_unload_given_up_lets_the_model_serve_again() -> None:
    """When nobody asks for the unload any more, the callers it kept back get their leases on the same worker."""
    async with House() as house:
        serving = await house.serve(A)
        unload = house.start(house.residency.unload("a"))
        await house.settle()
        late = house.start(house.serve(A))
        await house.settle()
        unload.cancel()
        again = await late
        assert again.worker is serving.worker
        serving.end()
        again.end()


async def test_waiting_behind_an_unload_is_bounded() -> None:
    """A caller kept back by an unload that cannot end in time is told to come back."""
    async with House() as house:
        serving = await house.serve(A)
        unload = house.start(house.residency.unload("a"))
        await house.settle()
        late = house.start(house.residency.lease(A))
        await house.settle()
        await house.advance(30)
        assert isinstance(await late, ModelLoading)
        serving.end()
        await unload


async def test_a_lease_while_stopping_loads_again() -> None:
    """A model on its way out is loaded anew once its process has gone."""
    async with House() as house:
        await house.residency.load(A)
        house.machine.stop_gate.clear()
        unload = house.start(house.residency.unload("a"))
        await house.settle()
        caller = house.start(house.serve(A))
        await house.settle()
        assert house.machine.loads == ["a"]
        house.machine.stop_gate.set()
        await unload
        (await caller).end()
        assert house.machine.loads == ["a", "a"]


async def test_unload_of_what_is_not_in_memory_is_a_conflict() -> None:
    """Unknown, unloaded, and waiting for room: none of them can be unloaded."""
    async with House() as house:
        with pytest.raises(Conflict):
            await house.residency.unload("a")
        a, b = await house.serve(A), await house.serve(B)
        waiting = house.start(house.residency.lease(C))
        await house.settle()
        with pytest.raises(Conflict):
            await house.residency.unload("c")
        waiting.cancel()
        a.end()
        b.end()
        await house.residency.unload("b")
        with pytest.raises(Conflict):
            await house.residency.unload("b")


async def test_unload_of_a_protected_model_needs_force() -> None:
    """A pin or a bot's lease refuses an unload, naming itself; force ends both, but no request."""
    async with House() as house:
        serving = await house.serve(A)
        house.residency.pin("a")
        with pytest.raises(Conflict, match="pinned"):
            await house.residency.unload("a")
        house.residency.unpin("a")
        house.residency.hold("a", "nightly", 60)
        with pytest.raises(Conflict, match="leased by nightly"):
            await house.residency.unload("a")
        house.residency.pin("a")
        unload = house.start(house.residency.unload("a", force=True))
        await house.settle()
        assert not unload.done()
        serving.end()
        assert (await unload).freed_bytes == 40 * GIB
        await house.residency.load(A)
        assert not house.shown("a").pinned


async def test_files_change_only_while_the_model_is_out() -> None:
    """Keeping a model out is refused while it is in memory or waited for, and refuses leases while it lasts."""
    async with House() as house:
        a, b = await house.serve(A), await house.serve(B)
        waiting = house.start(house.residency.lease(C))
        await house.settle()
        for model_id in ("a", "c"):
            with pytest.raises(Conflict), house.residency.kept_out(model_id):
                pass
        waiting.cancel()
        a.end()
        b.end()
        await house.residency.unload("a")
        with house.residency.kept_out("a"):
            with pytest.raises(Conflict):
                await house.residency.lease(A)
            with pytest.raises(Conflict), house.residency.kept_out("a"):
                pass
        (await house.serve(A)).end()
