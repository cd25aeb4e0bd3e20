"""Bodies so large that understanding them would hold up everybody's streams: that is done in a process of its own.

A thread would not do. JSON, pydantic and msgpack hold the interpreter's lock for as long as a call of theirs takes: for
10 MB of 10,000 messages 10 ms to read, 20 ms to validate, 15 ms to write the frame, and 20 ms for each full collection
of garbage meanwhile (two-core machine, CPython 3.11). Here the event loop's process never touches more than a piece: no
turn of it took more than 2.2 ms of CPU for such a body, or one with 128 tools of 60 parameters each, but for the first
of them, which starts the other process: that took 5 ms.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from shutil import rmtree
from tempfile import gettempdir, mkdtemp
from typing import Final, TypeVar

import psutil
from anyio import CancelScope, to_thread

from opta_lmx.api.apart import run_apart

Result = TypeVar("Result")

# The process id follows: by it the next server knows what nobody is coming back for.
_PREFIX: Final = "opta-lmx-body-"

# What a socket takes at once, or a little more; copying it takes 20 us.
_PIECE_BYTES: Final = 128 * 1024


async def understand_apart(
    work: Callable[[bytes], tuple[Result, Sequence[bytes]]], body: Sequence[bytes]
) -> tuple[Result, list[tuple[bytes, ...]]]:
    """The outcome of ``work`` on a body that came in pieces: something small that pickles, and bulks, in pieces again.

    Raises what ``work`` raises. Bytes go there and back in files only this user can read, deleted before this returns.
    """
    folder = Path(await to_thread.run_sync(mkdtemp, None, f"{_PREFIX}{os.getpid()}-"))
    try:
        await to_thread.run_sync(_write, folder / "body", body)
        result, made = await run_apart(_work, work, folder)
        return result, [await to_thread.run_sync(_read, file) for file in made]
    finally:
        # Giving 20 MB of pages back takes milliseconds: that, too, is for a thread.
        with CancelScope(shield=True):
            await to_thread.run_sync(rmtree, folder)


def clear_leftovers() -> None:
    """Removes the bodies of servers that were killed while they understood them: prompts are nobody's to find."""
    for folder in Path(gettempdir()).glob(f"{_PREFIX}*-*"):
        pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            # Another user's, or another server that clears up at this moment.
            rmtree(folder, ignore_errors=True)


def _work(work: Callable[[bytes], tuple[Result, Sequence[bytes]]], folder: Path) -> tuple[Result, list[Path]]:
    result, bulks = work((folder / "body").read_bytes())
    made = [folder / f"made-{at}" for at in range(len(bulks))]
    for file, bulk in zip(made, bulks, strict=True):
        file.write_bytes(bulk)
    return result, made


def _write(path: Path, pieces: Sequence[bytes]) -> None:
    with path.open("wb", buffering=0) as file:
        for piece in pieces:
            file.write(piece)


def _read(path: Path) -> tuple[bytes, ...]:
    with path.open("rb", buffering=0) as file:
        return tuple(iter(partial(file.read, _PIECE_BYTES), b""))
