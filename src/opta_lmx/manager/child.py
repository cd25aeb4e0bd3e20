"""Child processes of this room: their pipes are ours, and their session is their own."""

import asyncio
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping

import anyio

# asyncio's own bound on a line of their output.
_LINE_BYTES = 64 * 1024


async def spawn(
    module: str, *arguments: str, env: Mapping[str, str] | None = None, line_bytes: int = _LINE_BYTES
) -> Process:
    """Runs one of our modules; ``env`` None is this process's environment. Raises OSError.

    No file in the directory this server was started from can take the place of a package it imports.

    Whole or not at all: what is cancelled half way through would leave a process that nobody waits for. Its input
    closes with this process, by which it learns of our end.
    """
    with anyio.CancelScope(shield=True):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", module, *arguments),
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            limit=line_bytes,
            env=env,
            start_new_session=True,
        )
    return process  # noqa: RET504 - inside the scope mypy takes it for one that may not be reached
