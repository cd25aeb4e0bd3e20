"""A request's generation, tied to the client who waits for it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anyio import CancelScope, create_task_group
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from opta_lmx.inference.engine import Generation, InferenceEngine
from opta_lmx.types import GenerateRequest


@asynccontextmanager
async def generating(engine: InferenceEngine, wanted: GenerateRequest, receive: Receive) -> AsyncIterator[Generation]:
    """Opens the generation of ``wanted`` and closes it on every way out of the block.

    A client who leaves cancels the block at once, also while the request still waits for room or for its model;
    ClientDisconnect is raised then. ``receive`` must be the request's own, its body already read. Raises what
    ``engine.open`` raises.
    """
    gone = False

    async def watch(scope: CancelScope) -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        scope.cancel()

    try:
        async with create_task_group() as tasks:
            tasks.start_soon(watch, tasks.cancel_scope)
            generation = await engine.open(wanted)
            try:
                yield generation
            finally:
                with CancelScope(shield=True):
                    await generation.aclose()
                tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        # The group's wrapping is an accident of the watcher; callers want the error itself.
        if len(group.exceptions) > 1:
            raise
        raise group.exceptions[0] from None
    if gone:
        raise ClientDisconnect
