"""Requests of one model whose worker died under them before their first token: one of them may have killed it.

They are started again one at a time, in the order in which they had come, and newer requests wait for them. So a
request that kills its worker again is known, and dies alone; the others lose some time.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Quarantine:
    """Who may start a request now."""

    def __init__(self) -> None:
        self._inside = 0
        self._turn = asyncio.Lock()  # first come, first served
        self._empty = asyncio.Event()
        self._empty.set()

    async def over(self) -> None:
        """Wait until nobody is inside: for requests that have seen no worker die."""
        await self._empty.wait()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Hold newer requests up from now on, and wait for one's turn."""
        self._inside += 1
        self._empty.clear()
        try:
            async with self._turn:
                yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()
