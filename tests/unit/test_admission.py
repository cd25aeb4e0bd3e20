"""The door of a model: bounds, order, callers who leave, and the time told to those who are refused."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from anyio.lowlevel import checkpoint
from hypothesis import given
from hypothesis import strategies as st

from opta_lmx.errors import QueueFull
from opta_lmx.inference.admission import MAX_RETRY_SECONDS, MIN_RETRY_SECONDS, Admission, House, Slot
from opta_lmx.types import Caller, Lane
from tests.fake_workers import Clock, run, settle


async def test_as_many_run_as_may() -> None:
    """Up to the bound a slot is there at once; its release lets one more in."""
    admission = Admission("m", 2, 0)
    first = await admission.enter()
    await admission.enter()
    assert admission.depths() == (2, 0)
    with pytest.raises(QueueFull):
        await admission.enter()
    first.release()
    assert admission.depths() == (1, 0)
    await admission.enter()


async def test_slots_go_first_come_first_served() -> None:
    """A release hands the slot to whoever has waited longest; it is never free in between."""
    admission = Admission("m", 1, 3)
    held = await admission.enter()
    came: list[int] = []

    async def caller(number: int) -> None:
        slot = await admission.enter()
        came.append(number)
        slot.release()

    async with asyncio.TaskGroup() as group:
        for number in range(3):
            group.create_task(caller(number))
            await settle()
        assert admission.depths() == (1, 3)
        held.release()
        assert admission.depths() == (1, 2)
    assert came == [0, 1, 2]
    assert admission.depths() == (0, 0)


async def test_bounds_can_change_under_those_who_are_there() -> None:
    """More room is used at once; less sends nobody away, and nobody enters until it is kept."""
    admission = Admission("m", 1, 2)
    slots = [await admission.enter()]
    async with asyncio.TaskGroup() as group:
        waiting = [group.create_task(admission.enter()) for _ in range(2)]
        await settle()
        assert admission.depths() == (1, 2)
        admission.reconfigure(2, 0)
        await settle()
        assert admission.depths() == (2, 1)
        admission.reconfigure(1, 0)
        slots.pop().release()
        await settle()
        assert admission.depths() == (1, 1)
        with pytest.raises(QueueFull):
            await admission.enter()
        waiting[0].result().release()
    waiting[1].result().release()
    assert admission.depths() == (0, 0)


async def test_nobody_overtakes_the_queue() -> None:
    """A slot that has been handed over but not yet picked up is taken: a newcomer waits behind."""
    admission = Admission("m", 1, 2)
    held = await admission.enter()
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(admission.enter())
        await settle()
        held.release()
        late = group.create_task(admission.enter())
        await settle()
        assert waiting.done()
        assert not late.done()
        waiting.result().release()


async def test_a_slot_is_released_once() -> None:
    """Releasing a slot again frees nobody else's."""
    admission = Admission("m", 2, 0)
    first, _ = await admission.enter(), await admission.enter()
    first.release()
    first.release()
    assert admission.depths() == (1, 0)


async def test_a_full_queue_refuses_and_says_why() -> None:
    """The refusal names the model, the length of its queue and when to come back."""
    admission = Admission("m", 1, 1)
    held = await admission.enter()
    async with asyncio.TaskGroup() as group:
        group.create_task(admission.enter())
        await settle()
        with pytest.raises(QueueFull, match=r"'m' is full \(1 requests wait\)") as caught:
            await admission.enter()
        assert caught.value.retry_after_seconds == MIN_RETRY_SECONDS
        held.release()


async def test_who_leaves_the_queue_is_forgotten() -> None:
    """A cancelled caller makes place in the queue, and the next release passes it by."""
    admission = Admission("m", 1, 2)
    held = await admission.enter()
    async with asyncio.TaskGroup() as group:
        first = group.create_task(admission.enter())
        second = group.create_task(admission.enter())
        await settle()
        first.cancel()
        await settle()
        assert admission.depths() == (1, 1)
        held.release()
        await settle()
        assert second.done()
        assert admission.depths() == (1, 0)


async def test_a_slot_given_to_a_leaver_goes_to_the_next() -> None:
    """Granted and cancelled in the same turn of the loop: the slot is passed on, not lost."""
    admission = Admission("m", 1, 2)
    held = await admission.enter()
    async with asyncio.TaskGroup() as group:
        first = group.create_task(admission.enter())
        second = group.create_task(admission.enter())
        await settle()
        held.release()
        first.cancel()
        await settle()
        assert first.cancelled()
        assert second.done()
        assert admission.depths() == (1, 0)
        second.result().release()
    assert admission.depths() == (0, 0)


async def test_a_leaver_not_yet_gone_is_passed_by() -> None:
    """Cancelled first and released in the same turn: the slot goes to the next at once."""
    admission = Admission("m", 1, 2)
    held = await admission.enter()
    async with asyncio.TaskGroup() as group:
        first = group.create_task(admission.enter())
        second = group.create_task(admission.enter())
        await settle()
        first.cancel()
        held.release()
        await settle()
        assert second.done()
        assert admission.depths() == (1, 0)


@pytest.mark.parametrize(
    ("gaps", "expected"),
    [
        pytest.param([], MIN_RETRY_SECONDS, id="nothing known"),
        pytest.param([4.0, 8.0], 6.0, id="mean"),
        pytest.param([0.01, 0.01], MIN_RETRY_SECONDS, id="quick queue"),
        pytest.param([600.0], MAX_RETRY_SECONDS, id="slow queue"),
        pytest.param([50.0] + [2.0] * 15, 2.0, id="only the recent"),
    ],
)
async def test_retry_after_is_the_pace_of_the_queue(gaps: list[float], expected: float) -> None:
    """The mean time between recent releases of a full house, within 1 and 60 seconds."""
    clock = Clock()
    admission = Admission("m", 1, 0, now=clock)
    for gap in [0.0, *gaps]:
        clock.seconds += gap
        slot = await admission.enter()
        slot.release()
    assert admission.retry_after_seconds() == pytest.approx(expected)


async def test_quiet_times_do_not_count_as_a_slow_queue() -> None:
    """Releases while slots were free say nothing about how fast a full house empties."""
    clock = Clock()
    admission = Admission("m", 2, 0, now=clock)
    for _ in range(3):
        first, second = await admission.enter(), await admission.enter()
        first.release()
        clock.seconds += 1000
        second.release()
    assert admission.retry_after_seconds() == MIN_RETRY_SECONDS


class Crowd:
    """Callers of one door, and what a plain list says about them."""

    def __init__(self, group: asyncio.TaskGroup, max_running: int, max_waiting: int) -> None:
        self.admission = Admission("m", max_running, max_waiting)
        self.bounds = (max_running, max_waiting)
        self.group = group
        self.slots: list[Slot] = []
        self.waiting: list[asyncio.Task[None]] = []

    async def _enter(self) -> None:
        self.slots.append(await self.admission.enter())

    async def enter(self) -> None:
        running, waiting = self.admission.depths()
        if (running, waiting) == self.bounds:
            with pytest.raises(QueueFull):
                await self.admission.enter()
        else:
            self.waiting.append(self.group.create_task(self._enter()))

    async def leave(self, which: int) -> None:
        if self.waiting:
            self.waiting[which % len(self.waiting)].cancel()

    async def release(self, which: int) -> None:
        if self.slots:
            self.slots.pop(which % len(self.slots)).release()

    def check(self) -> None:
        """After everybody has moved: slots held are slots counted, and nobody waits beside a free one."""
        self.waiting = [caller for caller in self.waiting if not caller.done()]
        assert self.admission.depths() == (len(self.slots), len(self.waiting))
        assert len(self.slots) <= self.bounds[0]
        assert not self.waiting or len(self.slots) == self.bounds[0]


_WHICH = st.integers(0, 9)
_CALLS = st.one_of(st.just(("enter", None)), st.tuples(st.just("leave"), _WHICH), st.tuples(st.just("release"), _WHICH))


@given(
    max_running=st.integers(1, 3),
    max_waiting=st.integers(0, 4),
    # Calls of one inner list come in the same turn of the loop.
    turns=st.lists(st.lists(_CALLS, max_size=4), min_size=5, max_size=20),
)
def test_no_slot_is_lost_or_made(max_running: int, max_waiting: int, turns: list[list[tuple[str, Any]]]) -> None:
    """Over any sequence of arrivals, departures and releases, however they coincide, the door's count is true."""

    async def scenario() -> None:
        async with asyncio.TaskGroup() as group:
            crowd = Crowd(group, max_running, max_waiting)
            for turn in turns:
                for name, which in turn:
                    call: Coroutine[Any, Any, None] = crowd.enter() if name == "enter" else getattr(crowd, name)(which)
                    await call
                    if name == "enter":
                        await checkpoint()
                await settle()
                crowd.check()
            while crowd.slots:
                await crowd.release(0)
                await settle()
                crowd.check()
            assert crowd.admission.depths() == (0, 0)

    run(scenario())


async def test_all_models_share_one_house() -> None:
    """Bounds over all models: a release at one door lets the next in at another, and a full line refuses everywhere."""
    house = House(2, 2)
    one, other = (Admission(name, 2, 2, house=house) for name in "ab")
    held = [await one.enter(), await one.enter()]
    async with asyncio.TaskGroup() as group:
        waiting = [group.create_task(door.enter()) for door in (other, one)]
        await settle()
        assert (one.depths(), other.depths()) == ((2, 1), (0, 1))
        with pytest.raises(QueueFull):
            await other.enter()
        held.pop().release()
        await settle()
        assert sum(task.done() for task in waiting) == 1
        held.pop().release()
    assert (one.depths(), other.depths()) == ((1, 0), (1, 0))
    house.reconfigure(1, 0)
    with pytest.raises(QueueFull):
        await other.enter()
    for task in waiting:
        task.result().release()
    (await other.enter()).release()


async def test_callers_take_turns() -> None:
    """One who comes behind another's flood is called up second, and an urgent one before a batch."""
    admission = Admission("m", 1, 20)
    held = await admission.enter()
    came: list[str] = []

    async def caller(who: Caller) -> None:
        slot = await admission.enter(who)
        came.append(who.name)
        await checkpoint()
        slot.release()

    flood, lone, job = Caller("flood"), Caller("lone"), Caller("job", lane=Lane.BATCH)
    async with asyncio.TaskGroup() as group:
        for who in (job, flood, flood, flood, flood, lone):
            group.create_task(caller(who))
            await settle()
        assert set(admission.line()) == {
            (Lane.INTERACTIVE, "flood", 4),
            (Lane.INTERACTIVE, "lone", 1),
            (Lane.BATCH, "job", 1),
        }
        held.release()
    assert came == ["flood", "lone", "flood", "flood", "flood", "job"]


async def test_the_pace_told_is_that_of_the_bound_in_the_way() -> None:
    """Where all models together are too many, the time told is that of releases at any door."""
    clock = Clock()
    house = House(2, 0)
    one, other = (Admission(name, 2, 0, clock, house) for name in "ab")
    held = [await one.enter(), await one.enter()]
    for _ in range(4):
        clock.seconds += 5
        held.pop(0).release()
        held.append(await one.enter())
    with pytest.raises(QueueFull) as refused:
        await other.enter()
    assert refused.value.retry_after_seconds == 5
