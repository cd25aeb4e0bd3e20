"""One request on one worker's pipe that is answered by a single frame: an Embed or a Rank."""

import asyncio
from collections.abc import Callable

from opta_lmx.errors import LmxError
from opta_lmx.inference.protocol import Embedded, Ranked


class WorkerReply:
    """What a worker owes for one request. Its reader may leave; it has ended when the worker says so or dies."""

    def __init__(self, cancel: Callable[[], None], on_end: Callable[[], None]) -> None:
        """``on_end`` is called exactly once, when the worker is done with the request, whoever ended it."""
        self._cancel = cancel
        self._then: list[Callable[[], None]] = [on_end]
        self._answer: Embedded | Ranked | None = None
        self._error: LmxError | None = None
        self._told = asyncio.Event()
        self.ended = False

    def then(self, on_end: Callable[[], None]) -> None:
        """Have one more thing done at the end; the reply must not have ended."""
        assert not self.ended
        self._then.append(on_end)

    def finish(self, answer: Embedded | Ranked) -> None:
        """The worker's answer has arrived."""
        if not self.ended:
            self._answer = answer
            self._finish()

    def fail(self, error: LmxError) -> None:
        """End with an error, told to the reader."""
        if not self.ended:
            self._error = self._error or error
            self._finish()

    def give_up(self, error: LmxError) -> None:
        """Tell the reader ``error``, and the worker to let the request go; it ends when the worker says so or dies."""
        if not self.ended and self._error is None:
            self._error = error
            self._cancel()
            self._told.set()

    def cancel(self) -> None:
        """Ask the worker to let the request go."""
        if not self.ended:
            self._cancel()

    async def answer(self) -> Embedded | Ranked:
        """Wait for the answer; raises the error the request ended with. Whoever stops waiting cancels it."""
        try:
            await self._told.wait()
        except BaseException:
            self.cancel()
            raise
        if self._error is not None:
            raise self._error
        assert self._answer is not None
        return self._answer

    def _finish(self) -> None:
        self.ended = True
        self._told.set()
        for act in self._then:
            act()
