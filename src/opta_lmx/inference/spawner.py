"""Starting workers, with one spare kept warm: its imports (about 2 s) are behind it when a load is asked for."""

import asyncio
from collections.abc import Callable

from opta_lmx.inference.worker_client import WorkerClient
from opta_lmx.types import LoadOptions, ModelFiles, WorkerExit


class WorkerSpawner:
    """The residency's ``SpawnWorker``. Owns the spare."""

    def __init__(self, *, keep_spare: bool, start_soon: Callable[..., object]) -> None:
        """``start_soon`` runs a coroutine function in the background, supervised."""
        self._keep_spare = keep_spare
        self._start_soon = start_soon
        self._spare: WorkerClient | None = None
        self._warming = False
        self._closed = False

    async def __call__(
        self, model: ModelFiles, options: LoadOptions, on_exit: Callable[[WorkerExit], None]
    ) -> WorkerClient:
        """A worker with the model loaded; raises LoadFailed."""
        client = self._take_spare() if options.echo is None else None
        if client is None:
            client = await WorkerClient.start(echo=options.echo is not None)
        try:
            await client.load(model, options, on_exit)
        finally:
            self._start_soon(self.warm)
        return client

    async def warm(self) -> None:
        """Start the spare if there is none."""
        if not self._keep_spare or self._closed or self._warming or self._has_spare():
            return
        self._warming = True
        try:
            spare = await WorkerClient.start(echo=False)
        finally:
            self._warming = False
        if self._closed:
            await spare.stop(0)
        else:
            self._spare = spare

    def _has_spare(self) -> bool:
        return self._spare is not None and self._spare.alive

    def _take_spare(self) -> WorkerClient | None:
        """The spare, if it lives; a dead one is forgotten."""
        spare = self._spare if self._has_spare() else None
        self._spare = None
        return spare

    async def close(self) -> None:
        """End the spare and start no other."""
        self._closed = True
        spare, self._spare = self._spare, None
        if spare is not None:
            await asyncio.shield(spare.stop(0))
