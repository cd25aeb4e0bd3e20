"""The feed of changes: what each reader gets, and what a slow one costs."""

import anyio

from opta_lmx.manager.changes import ChangeFeed, Lagged, ModelChange, Quiet, Reader, Told
from opta_lmx.types import ModelState


def feed(kept: int = 4, quiet_seconds: float = 60) -> ChangeFeed:
    """A feed at a fixed time."""
    return ChangeFeed(wall=lambda: 7.0, kept=kept, quiet_seconds=quiet_seconds)


def change(number: int) -> ModelChange:
    """One of many."""
    return ModelChange(f"m{number}", ModelState.READY)


async def rest(reader: Reader) -> list[object]:
    """What a reader is still told, up to the end."""
    told: list[object] = []
    while (one := await reader.next()) is not None:
        assert isinstance(one, Told)
        assert one.at == 7.0
        told.append(one.what)
    return told


async def test_every_reader_gets_every_change_from_its_beginning() -> None:
    """In order, and none that came before it listened."""
    changes = feed()
    changes.publish(change(0))
    with changes.reading() as early:
        changes.publish(change(1))
        with changes.reading() as late:
            changes.publish(change(2))
            changes.close()
            assert await rest(early) == [change(1), change(2)]
            assert await rest(late) == [change(2)]


async def test_a_slow_reader_loses_the_oldest_and_is_told_how_many() -> None:
    """The feed never waits for it, and keeps no more than its bound."""
    changes = feed(kept=3)
    with changes.reading() as reader:
        for number in range(10):
            changes.publish(change(number))
        first = await reader.next()
        changes.publish(change(10))
        changes.close()
        assert first == Told(7.0, Lagged(7))
        assert await rest(reader) == [Lagged(1), change(8), change(9), change(10)]


async def test_a_reader_that_waits_is_woken() -> None:
    """By a change, by the end, and by neither after a time."""
    changes = feed()
    heard: list[object] = []

    async def listen() -> None:
        with changes.reading() as reader:
            heard.extend([await reader.next(), await reader.next()])

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listen)
            await anyio.wait_all_tasks_blocked()
            changes.publish(change(1))
            await anyio.wait_all_tasks_blocked()
            changes.close()
        assert heard == [Told(7.0, change(1)), None]
        with feed(quiet_seconds=0).reading() as reader:
            assert await reader.next() == Quiet()


async def test_who_leaves_is_forgotten() -> None:
    """Also by a cancellation; who comes after the end is told of the end."""
    changes = feed()

    async def listen() -> None:
        with changes.reading() as reader:
            await reader.next()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(listen)
        await anyio.wait_all_tasks_blocked()
        assert changes.readers == 1
        tasks.cancel_scope.cancel()
    assert changes.readers == 0
    changes.close()
    with changes.reading() as late:
        assert await late.next() is None
