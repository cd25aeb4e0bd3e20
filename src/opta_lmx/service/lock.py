"""One server for one models directory: a lock the system takes back when its holder ends, however it ends.

``cli/serve.py`` takes it for as long as the server runs; ``doctor`` asks who has it.
"""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

# In the models directory, which holds all that a server writes. The catalog passes over names with a dot.
LOCK_NAME: Final = ".server.lock"

# A pid and its line's end; what is longer was not written here.
_MOST_BYTES: Final = 32

# A server that cannot write in the directory harms no other there, and needs no lock.
_READ_ONLY: Final = (errno.EROFS, errno.EACCES, errno.EPERM)


class DirectoryInUse(Exception):
    """Another server has the directory. ``pid`` is None where that cannot be seen."""

    def __init__(self, directory: Path, pid: int | None) -> None:
        by = f"another server (pid {pid})" if pid else "another server"
        super().__init__(f"the models directory {directory} is in use by {by}")
        self.pid = pid


@contextmanager
def hold(directory: Path) -> Iterator[None]:
    """The directory is this process's own inside; it is made if it is not there.

    Children do not inherit the lock: no worker that outlives the server for a moment keeps the next one out. Raises
    DirectoryInUse at once, and OSError if the directory cannot be made or its file system knows no locks.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        # Like all that Python opens, the descriptor is closed in a program that is started.
        descriptor = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        if error.errno not in _READ_ONLY:
            raise
        yield
        return
    try:
        if not _lock(descriptor, fcntl.LOCK_EX):
            raise DirectoryInUse(directory, _read_pid(descriptor))
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def find_holder(directory: Path) -> DirectoryInUse | None:
    """Who has the directory now; None if it is free. Raises OSError if the file cannot be read."""
    try:
        descriptor = os.open(directory / LOCK_NAME, os.O_RDONLY | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        # Held for microseconds, in which a server that starts would be refused.
        return None if _lock(descriptor, fcntl.LOCK_SH) else DirectoryInUse(directory, _read_pid(descriptor))
    finally:
        os.close(descriptor)


def _lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_pid(descriptor: int) -> int | None:
    text = os.pread(descriptor, _MOST_BYTES, 0).strip()
    return int(text) if text.isdigit() else None
