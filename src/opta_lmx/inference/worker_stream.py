"""One request on one worker's pipe, as the server holds it: what has arrived, and how it ended."""

import asyncio
from collections.abc import Callable

from opta_lmx.errors import LmxError
from opta_lmx.inference.protocol import Started
from opta_lmx.types import CacheReport, Delta, FinishReason


class WorkerStream:
    """One request on one pipe. The deltas wait here, in one list, until the reader comes for them."""

    def __init__(self, choices: int, cancel: Callable[[], None], on_end: Callable[[], None]) -> None:
        """``on_end`` is called exactly once, when the worker is done with the request, whoever ended it."""
        self._then: list[Callable[[], None]] = [on_end]
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.cache = CacheReport()
        # Every way in which a choice has ended.
        self.finishes: set[FinishReason] = set()
        self.in_reasoning = False
        self._cancel = cancel
        self._open_choices = choices
        self._deltas: list[Delta] = []
        self._error: LmxError | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def ended(self) -> bool:
        """True once nothing more will arrive."""
        return self._open_choices == 0

    @property
    def error(self) -> LmxError | None:
        """What it ended with, if that was an error."""
        return self._error

    def then(self, on_end: Callable[[], None]) -> None:
        """Have one more thing done at the end; the stream must not have ended."""
        assert not self.ended
        self._then.append(on_end)

    def began(self, frame: Started) -> None:
        """The request has entered the batch."""
        self.prompt_tokens, self.cache, self.in_reasoning = frame.prompt_tokens, frame.cache, frame.in_reasoning

    def push(self, delta: Delta) -> None:
        """Take one delta in, and end when it was the last choice's last."""
        self._deltas.append(delta)
        self.completion_tokens += delta.token_count
        if delta.finish is not None:
            self.finishes.add(delta.finish)
            self._open_choices -= 1
            if self._open_choices == 0:
                self._end()
        self._wake()

    def fail(self, error: LmxError) -> None:
        """End with an error, told to the reader after what arrived before it."""
        if not self.ended:
            self._open_choices = 0
            self._error = self._error or error
            self._end()
            self._wake()

    def give_up(self, error: LmxError) -> None:
        """Tell the reader ``error``, and the worker to let the request go; it ends when the worker says so or dies."""
        if not self.ended and self._error is None:
            self._error = error
            self._cancel()
            self._wake()

    def cancel(self) -> None:
        """Ask the worker to let the request go; it has ended when the worker says so or dies."""
        if not self.ended:
            self._cancel()

    async def arrived(self) -> None:
        """Wait until there is something to take; raises the error the request ended with, if that is all there is."""
        while not self._deltas:
            if self._error is not None:
                raise self._error
            if self.ended:
                return
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def take(self) -> list[Delta]:
        """Everything that has arrived since the last look."""
        deltas, self._deltas = self._deltas, []
        return deltas

    def _end(self) -> None:
        for act in self._then:
            act()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
