"""Work that would hold up everybody's streams, done in a process of its own.

A thread would not do: what imports, reads JSON or validates holds the interpreter's lock for as long as a call takes.
"""

from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

from anyio import BrokenWorkerProcess, to_process, to_thread

P = ParamSpec("P")
Result = TypeVar("Result")


async def run_apart(work: Callable[P, Result], /, *args: P.args, **kwargs: P.kwargs) -> Result:
    """The outcome of ``work``, which like what it takes and gives can be pickled; raises what it raises.

    The first call waits about a second for its process, which ends after five idle minutes. A process that dies (of a
    Ctrl-C in its terminal, for want of memory) is no fault of the client's: then a thread does the work.
    """
    bound = partial(work, *args, **kwargs)
    try:
        return await to_process.run_sync(bound, cancellable=True)
    except BrokenWorkerProcess:
        return await to_thread.run_sync(bound)
