"""Room: who is evicted, who waits for how long, who is refused, and the plan that says so beforehand."""

import pytest

from opta_lmx.errors import MemoryLimit
from opta_lmx.manager.memory import Verdict
from opta_lmx.types import LoadOptions, ModelState
from tests.fake_workers import GIB, House, model_files

A, B, C = model_files("a", 40), model_files("b", 40), model_files("c", 40)


async def test_the_least_recently_used_idle_model_makes_room() -> None:
    """Of two idle models the older goes; a release counts as use."""
    async with House() as house:
        serving = await house.serve(A)
        house.clock.seconds += 1
        (await house.serve(B)).end()
        house.clock.seconds += 1
        serving.end()
        (await house.serve(C)).end()
        assert [model.id for model in house.residency.snapshot()] == ["a", "c"]


async def test_a_load_starts_only_when_its_victim_has_gone() -> None:
    """While the victim's process lives, nothing is loaded in its place."""
    async with House() as house:
        await house.residency.load(A)
        await house.residency.load(B)
        house.machine.stop_gate.clear()
        caller = house.start(house.serve(C))
        await house.settle()
        assert house.shown("a").state is ModelState.STOPPING
        assert house.machine.loads == ["a", "b"]
        house.machine.stop_gate.set()
        (await caller).end()
        assert house.machine.loads == ["a", "b", "c"]


async def test_a_busy_model_is_waited_for() -> None:
    """A model that serves is evicted only after its last lease has ended."""
    async with House() as house:
        a, b = await house.serve(A), await house.serve(B)
        caller = house.start(house.serve(C))
        await house.settle()
        await house.advance(20)
        assert not caller.done()
        b.end()
        (await caller).end()
        assert [model.id for model in house.residency.snapshot()] == ["a", "c"]
        a.end()


async def test_waiting_for_room_is_bounded() -> None:
    """After ``room_wait_seconds`` the caller is refused with the arithmetic, and nothing was disturbed."""
    async with House() as house:
        a, b = await house.serve(A), await house.serve(B)
        caller = house.start(house.residency.lease(C))
        await house.settle()
        await house.advance(29)
        assert not caller.done()
        await house.advance(1)
        error = await caller
        assert isinstance(error, MemoryLimit)
        assert error.plan["verdict"] == "must_wait"
        assert (error.need_bytes, error.free_bytes) == (40 * GIB, 10 * GIB)
        a.end()
        b.end()
        await house.settle()
        assert house.machine.loads == ["a", "b"]


async def test_what_can_never_fit_is_refused_at_once() -> None:
    """A model larger than the cap is refused without a wait, an eviction or a load."""
    async with House(others_bytes=20 * GIB) as house:
        await house.residency.load(A)
        with pytest.raises(MemoryLimit) as caught:
            await house.residency.lease(model_files("huge", 71))
        plan = caught.value.plan
        assert plan["arithmetic"] == f"{60 * GIB} used + 0 reserved + {71 * GIB} needed > {90 * GIB} limit"
        assert plan["headroom_bytes"] == -41 * GIB
        assert house.shown("a").state is ModelState.READY


@pytest.mark.parametrize("protect", ["pin", "hold"])
async def test_protected_models_are_never_evicted(protect: str) -> None:
    """Pinned or held, an idle model stays; without another way the load is refused at once."""
    async with House() as house:
        for files in (A, B):
            await house.residency.load(files)
            if protect == "pin":
                house.residency.pin(files.id)
            else:
                house.residency.hold(files.id, "bot", 60)
        with pytest.raises(MemoryLimit):
            await house.residency.lease(C)
        assert len(house.machine.workers) == 2


async def test_the_end_of_a_protection_makes_room() -> None:
    """Who waits for a busy model is served as soon as another one loses its pin."""
    async with House() as house:
        a = await house.serve(A)
        await house.residency.load(B)
        house.residency.pin("b")
        caller = house.start(house.serve(C))
        await house.settle()
        assert not caller.done()
        house.residency.unpin("b")
        (await caller).end()
        a.end()


async def test_without_auto_evict_nothing_is_evicted() -> None:
    """With ``auto_evict`` off a load that does not fit is refused, idle neighbours or not."""
    async with House(auto_evict=False) as house:
        await house.residency.load(A)
        await house.residency.load(B)
        with pytest.raises(MemoryLimit):
            await house.residency.lease(C)


async def test_a_running_load_counts_twice_until_it_is_ready() -> None:
    """A second load that would fit beside the first waits until the first is footprint and no longer a promise."""
    async with House() as house:
        house.machine.load_gate.clear()
        first = house.start(house.residency.load(A))
        await house.settle()
        second = house.start(house.residency.load(B))
        await house.settle()
        assert house.machine.loads == ["a"]
        house.machine.load_gate.set()
        await first
        await second
        assert len(house.machine.workers) == 2


async def test_loads_start_in_the_order_of_their_callers() -> None:
    """While room is being made for one, a later and smaller load does not slip in and take it."""
    async with House() as house:
        await house.residency.load(A)
        await house.residency.load(B)
        house.machine.stop_gate.clear()
        first = house.start(house.residency.load(C))
        await house.settle()
        second = house.start(house.residency.load(model_files("small", 5)))
        await house.settle()
        assert house.machine.loads == ["a", "b"]
        house.machine.stop_gate.set()
        await first
        await second
        assert house.machine.loads == ["a", "b", "c", "small"]


async def test_a_load_that_waits_for_busy_models_lets_others_pass() -> None:
    """What fits as things stand is not kept waiting by an earlier load that needs a busy model to go."""
    async with House() as house:
        a, b = await house.serve(A), await house.serve(B)
        waiting = house.start(house.residency.load(C))
        await house.settle()
        await house.residency.load(model_files("small", 5))
        assert not waiting.done()
        a.end()
        b.end()
        await waiting


async def test_grown_caches_are_waited_for() -> None:
    """A load that would fit but for what running requests have grown by waits until they end."""
    async with House() as house:
        a = await house.serve(A)
        assert a.worker.grow(20 * GIB)
        house.residency.pin("a")
        caller = house.start(house.residency.load(B))
        await house.settle()
        assert house.residency.plan(B).verdict is Verdict.MUST_WAIT
        a.end()
        await house.advance(1)
        assert (await caller).model_id == "b"


async def test_what_a_ready_model_has_still_to_fill_stays_promised() -> None:
    """KV reserve and prefix cache of a ready model are not free for the next load."""
    async with House(kv_reserve_fraction=0.1) as house:
        house.options = LoadOptions(prefix_cache_bytes=2 * GIB)
        await house.residency.load(A)
        need = house.shown("a").need
        assert need is not None
        assert need.kv_bytes == A.weights_bytes // 10
        assert house.memory.reserved_bytes == need.kv_bytes + 2 * GIB
        assert house.shown("a").memory_bytes == 40 * GIB + need.kv_bytes + 2 * GIB
        await house.residency.unload("a")
        assert house.memory.reserved_bytes == 0


async def test_a_plan_tells_what_a_load_would_do_and_does_nothing() -> None:
    """Verdict and victims are those of the load that follows."""
    async with House() as house:
        assert house.residency.plan(A).verdict is Verdict.FITS
        await house.residency.load(A)
        assert house.residency.plan(A).verdict is Verdict.RESIDENT
        await house.residency.load(B)
        plan = house.residency.plan(C)
        assert (plan.verdict, plan.would_evict) == (Verdict.FITS_AFTER_EVICTION, ("a",))
        await house.settle()
        assert [model.id for model in house.residency.snapshot()] == ["a", "b"]
        await house.residency.load(C)
        assert [model.id for model in house.residency.snapshot()] == ["b", "c"]


async def test_a_plan_counts_the_context_it_is_asked_for() -> None:
    """A shorter context needs a smaller KV reserve."""
    async with House(kv_reserve_fraction=1) as house:
        files = model_files("k", 40, layers=10, kv_heads=8, head_dim=128)
        assert house.residency.plan(files, context_length=100).need.kv_bytes == 10 * 8 * 128 * 4 * 100
