"""Requests that saw their worker die: one at a time, before newer ones."""

import asyncio

from opta_lmx.inference.quarantine import Quarantine
from tests.fake_workers import run, settle


def test_the_first_comes_first_and_newer_ones_wait() -> None:
    """Each is alone in it; a request that has seen no death passes only when the last has left."""

    async def scenario() -> None:
        quarantine, order, gates = Quarantine(), [], [asyncio.Event() for _ in range(3)]

        async def suspect(number: int) -> None:
            async with quarantine.alone():
                order.append(f"in {number}")
                await gates[number].wait()
                order.append(f"out {number}")

        async def newer() -> None:
            await quarantine.over()
            order.append("newer")

        async with asyncio.TaskGroup() as group:
            for number in range(3):
                group.create_task(suspect(number))
            await settle()
            group.create_task(newer())
            for gate in gates:
                await settle()
                gate.set()
        assert order == ["in 0", "out 0", "in 1", "out 1", "in 2", "out 2", "newer"]

    run(scenario())


def test_whoever_leaves_holds_nobody_up() -> None:
    """A suspect whose client goes, in line or inside, makes way."""

    async def scenario() -> None:
        quarantine = Quarantine()

        async def suspect() -> None:
            async with quarantine.alone():
                await asyncio.Event().wait()

        leavers = [asyncio.ensure_future(suspect()) for _ in range(2)]  # noqa: TID251 - cancelled below
        await settle()
        for leaver in reversed(leavers):
            leaver.cancel()
        await settle()
        await quarantine.over()

    run(scenario())
