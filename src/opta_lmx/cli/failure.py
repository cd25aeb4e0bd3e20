"""How a command ends when it does not end well."""

from enum import IntEnum


class ExitCode(IntEnum):
    """What the shell is told."""

    DONE = 0
    REFUSED = 1
    USAGE = 2
    UNREACHABLE = 3
    INTERRUPTED = 130


class Failure(Exception):
    """Ends the command: ``error: message``, ``hint: hint``, exit ``code``."""

    def __init__(self, message: str, hint: str, code: ExitCode = ExitCode.REFUSED) -> None:
        super().__init__(message)
        self.hint = hint
        self.code = code
