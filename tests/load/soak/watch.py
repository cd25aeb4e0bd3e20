"""Readings of the server's own process, and the checks made of them."""

from collections.abc import Awaitable, Callable, Sequence
from time import perf_counter
from typing import Final

import anyio
import psutil

from tests.load.soak.sheet import Reading, Sheet, slope

_MIB: Final = 1024**2

# A pool of threads grows to what was wanted at once and shrinks when it is next used: anyio's holds 40, asyncio's 6.
_POOLED_THREADS: Final = 46
# The allocator keeps what a burst took: growth is only a leak if it goes on. A minute is too short to tell the two
# apart as finely as an hour does.
_MOST_GROWTH: Final = 40 * _MIB
_MOST_SLOPE: Final = {60.0: 12 * _MIB, 300.0: 3 * _MIB, 1800.0: 0.5 * _MIB}


def read(process: psutil.Process) -> Reading:
    """How it is now."""
    with process.oneshot():
        return Reading(
            perf_counter(),
            process.memory_info().rss,
            process.num_fds(),
            process.num_threads(),
            len(process.children(recursive=True)),
        )


async def watch(process: psutil.Process, readings: list[Reading]) -> None:
    """Adds a reading each second, until cancelled."""
    while True:
        readings.append(read(process))
        await anyio.sleep(1)


async def until(holds: Callable[[], Awaitable[bool]], seconds: float) -> None:
    """Waits until ``holds``, but no longer than so many seconds: whoever needs to know looks again."""
    with anyio.move_on_after(seconds):
        while not await holds():  # noqa: ASYNC110 - another process does not set our events
            await anyio.sleep(0.05)


async def settled(process: psutil.Process, before: Reading) -> Reading:
    """A reading once files and children are back to what they were; after 20 seconds whatever they are."""

    async def is_back() -> bool:
        now = read(process)
        return now.files <= before.files and now.children == before.children

    await until(is_back, 20)
    return read(process)


def compare(sheet: Sheet, before: Reading, after: Reading, during: Sequence[Reading]) -> None:
    """The lines on what the server held before the traffic and after it, and on its growth in the last two thirds."""
    sheet.hold("open files", after.files, f"<= {before.files}", holds=after.files <= before.files)
    sheet.hold("child processes", after.children, before.children, holds=after.children == before.children)
    most = before.threads + _POOLED_THREADS
    sheet.hold("threads", after.threads, f"<= {most}", holds=after.threads <= most)
    grown = after.rss - before.rss
    sheet.hold("RSS grown, MiB", f"{grown / _MIB:.1f}", f"<= {_MOST_GROWTH / _MIB:.0f}", holds=grown <= _MOST_GROWTH)
    late = during[len(during) // 3 :]
    per_minute = 60 * slope([(reading.at, reading.rss) for reading in late])
    allowed = [bound for seconds, bound in _MOST_SLOPE.items() if sheet.seconds >= seconds]
    if allowed:
        found = f"{per_minute / _MIB:.2f}"
        sheet.hold("RSS slope, MiB a minute", found, f"<= {allowed[-1] / _MIB:.1f}", holds=per_minute <= allowed[-1])
