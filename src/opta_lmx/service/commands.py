"""How the service room runs the system's own tools, and how it says that one of them refused.

``launchd.py`` and ``systemd.py`` ask through ``RunCommand``; tests answer from a record.
"""

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

# launchctl bootout and systemctl stop return when the server has drained, which takes the setting's seconds and more.
# This bound is for a tool that hangs.
_TOOL_SECONDS: Final = 600.0

# The shell's word for a command that does not exist.
NOT_FOUND: Final = 127


class ServiceError(Exception):
    """What was asked of the service cannot be done. ``hint`` says what to do instead."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended."""

    exit_code: int
    stdout: str = ""
    stderr: str = ""

    @property
    def reason(self) -> str:
        """What it said when it failed, on one line."""
        said = (self.stderr.strip() or self.stdout.strip()).splitlines()
        return said[0].strip() if said else f"exit code {self.exit_code}"


# Runs a program with its arguments and waits for its end; never raises for what the program does.
RunCommand: TypeAlias = Callable[[Sequence[str]], Outcome]


def run_command(argv: Sequence[str]) -> Outcome:
    """Runs it for real. Exit code 127 if there is no such program, as a shell has it."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_TOOL_SECONDS, check=False)
    except OSError as error:
        return Outcome(NOT_FOUND, stderr=f"{argv[0]}: {error.strerror}")
    except subprocess.TimeoutExpired:
        return Outcome(1, stderr=f"{argv[0]}: no end within {_TOOL_SECONDS:g} seconds")
    return Outcome(done.returncode, done.stdout, done.stderr)
