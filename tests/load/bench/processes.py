"""Child processes that end with what started them, whatever happens."""

import asyncio
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import psutil

_ROOT: Final = Path(__file__).resolve().parents[3]

# Seconds between SIGTERM and SIGKILL: above our server's own drain of two.
_STOP_SECONDS: Final = 10.0


class BenchError(Exception):
    """Something could not be measured; the message says what and why."""


def child_environment(home: Path) -> dict[str, str]:
    """This process's environment with an empty home, no settings of the server, no proxy and no model hub."""
    dropped = ("OPTA_LMX", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_")
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(dropped)}
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return kept | {"HOME": str(home), "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


@asynccontextmanager
async def running(
    command: Sequence[str], home: Path, log: Path, *, piped: bool = False, limit_bytes: int = 2**16
) -> AsyncIterator[Process]:
    """A process whose diagnostics go to ``log``; on leaving it and all its children have ended.

    ``piped`` gives standard input and output to the caller, with lines of at most ``limit_bytes``.
    """
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=PIPE if piped else asyncio.subprocess.DEVNULL,
            stdout=PIPE if piped else output,
            stderr=output,
            env=child_environment(home),
            cwd=home,
            start_new_session=True,
            limit=limit_bytes,
        )
    try:
        yield process
    finally:
        await _end(process)


async def run_to_end(command: Sequence[str], home: Path, log: Path, seconds: float) -> None:
    """Runs a program; raises BenchError if it fails or takes too long."""
    async with running(command, home, log) as process:
        try:
            async with asyncio.timeout(seconds):
                code = await process.wait()
        except TimeoutError:
            raise BenchError(f"{' '.join(command[1:3])} took more than {seconds:.0f} s") from None
    if code != 0:
        raise BenchError(f"{' '.join(command[1:3])} ended with {code}: {tail(log)}")


def own_python(*arguments: str) -> list[str]:
    """A command that runs one of our modules in this interpreter."""
    return [sys.executable, "-P", *arguments]


def tail(log: Path, lines: int = 3) -> str:
    """The last lines of a log, for a message."""
    return " | ".join(log.read_text(errors="replace").strip().splitlines()[-lines:]) or "its log is empty"


def descendants(pid: int) -> list[psutil.Process]:
    """Every living child of a process, and theirs."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def is_running(process: psutil.Process) -> bool:
    """False once it has ended; one nobody has reaped runs no more."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def _end(process: Process) -> None:
    """Ask, wait, kill; then kill what it started and left behind."""
    children = descendants(process.pid) if process.returncode is None else []
    if process.returncode is None:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
    if process.stdin is not None:
        process.stdin.close()
    try:
        async with asyncio.timeout(_STOP_SECONDS):
            await process.wait()
    except TimeoutError:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
