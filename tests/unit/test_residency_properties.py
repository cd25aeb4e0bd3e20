"""Whatever happens to the residency, in whatever order: the cap, the books and the held models stay whole.

Hypothesis writes a history of leases, unloads, pins, holds, crashes, loads that fail, loads and stops that hang,
callers who leave, other programs' memory, and time. After each line all invariants are checked; at the end everybody
lets go, and nobody may still wait.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeAlias

from hypothesis import given
from hypothesis import strategies as st

from opta_lmx.config_models import ModelsConfig
from opta_lmx.errors import Conflict, LoadFailed
from opta_lmx.types import ModelState
from tests.fake_workers import GIB, House, Serving, model_files, run

# Under a cap of 90 GiB a few fit together, one only alone, one never.
MODELS = {
    id: model_files(id, gib, echo=None)
    for id, gib in {"small": 10, "medium": 25, "large": 40, "alone": 70, "never": 95}.items()
}
KV_RESERVE_FRACTION = 0.1

Step: TypeAlias = tuple[Callable[["History", Any], None], Any]


class History:
    """Plays one history on a house, and knows who runs and who waits."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.callers: list[asyncio.Task[Any]] = []
        self.servings: list[Serving] = []

    def lease(self, wish: tuple[str, float | None]) -> None:
        model_id, ttl_seconds = wish
        self.callers.append(self.house.start(self.house.serve(MODELS[model_id], ttl_seconds=ttl_seconds)))

    def end(self, which: int) -> None:
        if self.servings:
            self.servings.pop(which % len(self.servings)).end()

    def leave(self, which: int) -> None:
        if self.callers:
            self.callers[which % len(self.callers)].cancel()

    def unload(self, wish: tuple[str, bool]) -> None:
        model_id, force = wish
        self.callers.append(self.house.start(self.house.residency.unload(model_id, force=force)))

    def pin(self, model_id: str) -> None:
        with suppress(Conflict):
            self.house.residency.pin(model_id)

    def unpin(self, model_id: str) -> None:
        self.house.residency.unpin(model_id)

    def hold(self, wish: tuple[str, float]) -> None:
        model_id, seconds = wish
        with suppress(Conflict):
            self.house.residency.hold(model_id, "bot", seconds)

    def crash(self, model_id: str) -> None:
        for worker in [worker for worker in self.house.machine.workers if worker.model.id == model_id]:
            worker.end(-9)

    def fill(self, model_id: str) -> None:
        """Requests fill the model's KV cache to the brim of its reserve."""
        machine = self.house.machine
        for worker in machine.workers:
            if worker.model.id == model_id:
                worker.footprint_bytes = machine.most_bytes(worker)

    def grow(self, wish: tuple[int, int]) -> None:
        """A running request needs more KV cache than was set aside; what is granted lies under the cap."""
        which, gib = wish
        machine = self.house.machine
        living = [serving.worker for serving in self.servings if serving.worker.alive]
        if living:
            worker = living[which % len(living)]
            before = worker.granted_bytes
            worker.grow(gib * GIB)
            assert worker.granted_bytes <= max(before, machine.most_bytes(worker.model)) or (
                machine.promised_bytes <= machine.limit_bytes
            )

    def fail(self, model_id: str) -> None:
        failures = self.house.machine.failures
        if failures.pop(model_id, None) is None:
            failures[model_id] = LoadFailed(model_id, "broken")

    def hang(self, gates: tuple[bool, bool]) -> None:
        machine = self.house.machine
        for gate, closed in zip((machine.load_gate, machine.stop_gate), gates, strict=True):
            if closed:
                gate.clear()
            else:
                gate.set()

    def others(self, gib: int) -> None:
        self.house.machine.others_bytes = gib * GIB

    def wait(self, seconds: float) -> None:
        self.house.clock.seconds += seconds
        self.house.residency.step(self.house.clock())

    async def play(self, steps: list[Step]) -> None:
        """Take the steps, checking after each."""
        for act, argument in steps:
            act(self, argument)
            await self.house.settle()
            self.collect()
            self.check()

    def collect(self) -> None:
        """Who got a lease begins to serve."""
        for caller in [caller for caller in self.callers if caller.done()]:
            self.callers.remove(caller)
            if not caller.cancelled() and isinstance(caller.result(), Serving):
                self.servings.append(caller.result())

    def check(self) -> None:
        """The leases are the requests that run on living workers; no held model is being stopped; MLX is bounded."""
        machine = self.house.machine
        assert sum(worker.limit_bytes for worker in machine.workers) <= machine.limit_bytes
        serving = [serving.lease.model_id for serving in self.servings if serving.worker.alive]
        stopping = {worker.model.id for worker in machine.workers if worker.stopping}
        for model in self.house.residency.snapshot():
            assert model.leases == serving.count(model.id)
            assert model.id not in stopping or not (model.pinned or model.holds or model.leases)

    async def let_go(self) -> None:
        """Every obstacle goes, every request ends; then nobody waits and only ready models hold promises."""
        everything: list[Step] = [(History.hang, (False, False)), (History.others, 0), (History.wait, 1000.0)]
        self.house.machine.failures.clear()
        await self.play(everything + [(History.unpin, model_id) for model_id in MODELS])
        for _ in range(2 * len(MODELS)):
            await self.play([(History.end, 0) for _ in self.servings] + [(History.wait, 31.0)])
        assert self.callers == []
        assert self.servings == []
        assert {model.state for model in self.house.residency.snapshot()} <= {
            ModelState.READY,
            ModelState.ABSENT,
            ModelState.FAILED,
        }
        ready = [model.need for model in self.house.residency.snapshot() if model.need is not None]
        assert self.house.memory.reserved_bytes == sum(need.held_bytes for need in ready)


def _steps(act: Callable[[History, Any], None], argument: st.SearchStrategy[Any]) -> st.SearchStrategy[Step]:
    return st.tuples(st.just(act), argument)


_MODEL = st.sampled_from(sorted(MODELS))
_WHICH = st.integers(0, 5)
_TTL = st.sampled_from([None, None, 20.0, 900.0])
HISTORIES = st.lists(
    st.one_of(
        # Twice as likely as the rest: without leases nothing happens.
        _steps(History.lease, st.tuples(_MODEL, _TTL)),
        _steps(History.lease, st.tuples(_MODEL, _TTL)),
        _steps(History.end, _WHICH),
        _steps(History.end, _WHICH),
        _steps(History.leave, _WHICH),
        _steps(History.unload, st.tuples(_MODEL, st.booleans())),
        _steps(History.pin, _MODEL),
        _steps(History.unpin, _MODEL),
        _steps(History.hold, st.tuples(_MODEL, st.sampled_from([5.0, 100.0]))),
        _steps(History.crash, _MODEL),
        _steps(History.fill, _MODEL),
        _steps(History.grow, st.tuples(_WHICH, st.sampled_from([1, 5, 20, 40]))),
        _steps(History.fail, _MODEL),
        _steps(History.hang, st.tuples(st.booleans(), st.booleans())),
        _steps(History.others, st.sampled_from([0, 10, 30, 60])),
        _steps(History.wait, st.sampled_from([0.1, 1.0, 31.0, 400.0])),
    ),
    min_size=15,
    max_size=45,
)


@given(steps=HISTORIES, auto_evict=st.booleans())
def test_no_history_breaks_the_cap_the_books_or_a_hold(steps: list[Step], auto_evict: bool) -> None:
    """No load starts without room for all that is promised; no reservation leaks; no held model is stopped."""

    async def scenario() -> None:
        config = ModelsConfig(ttl_seconds=300)
        async with House(config, auto_evict=auto_evict, kv_reserve_fraction=KV_RESERVE_FRACTION) as house:
            history = History(house)
            await history.play(steps)
            await history.let_go()

    run(scenario())


@given(order=st.permutations([*MODELS] * 2))
def test_everybody_who_can_be_served_is_served(order: list[str]) -> None:
    """Whatever order callers come in: if each ends soon, all that fit at all are loaded, one after another."""

    async def scenario() -> None:
        async with House() as house:
            callers = {house.start(house.serve(MODELS[model_id])): model_id for model_id in order}
            served: list[str] = []
            while callers:
                await house.settle()
                finished = [caller for caller in callers if caller.done()]
                assert finished, f"nobody moves: {sorted(callers.values())}"
                for caller in finished:
                    model_id = callers.pop(caller)
                    if isinstance(caller.result(), Serving):
                        caller.result().end()
                        served.append(model_id)
            assert sorted(served) == sorted(model_id for model_id in order if model_id != "never")

    run(scenario())
