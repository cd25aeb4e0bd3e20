"""The hashes of a file that grows: one thread writes it, another reads back what the disk has and hashes that.

``fetch.py`` has one for each file. What is hashed is what a later reader gets, not what a connection gave; and because
hashlib lets go of the interpreter, it costs a download no time where there is a second core. A third thread has the
system write to the disk meanwhile, so that little is left to wait for at the end.
"""

import hashlib
import os
import threading
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any, Final

from opta_lmx.manager.hub import HubFile
from opta_lmx.manager.integrity import FileRecord

_CHUNK_BYTES: Final = 1024 * 1024

# What may pile up in the system's cache before it is sent to the disk: enough for long writes, done in a moment.
_SYNC_BYTES: Final = 64 * 1024 * 1024


class FileHash:
    """Of the file at ``path``, which the caller appends to and never changes otherwise while this lives."""

    def __init__(self, file: HubFile, path: Path) -> None:
        self._path = path
        self._sha256 = hashlib.sha256()
        # git's name for a file's content: SHA-1 over a header and the bytes.
        self._sha1: Any = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False) if file.sha256 is None else None
        self._status: os.stat_result | None = None
        self._error: OSError | None = None
        self._written = 0
        self._whole = False
        self._discarded = False
        self._changed = threading.Condition()
        works = (self._read_back, self._sync)
        self._threads = [threading.Thread(target=self._run, args=(work,), daemon=True) for work in works]
        for thread in self._threads:
            thread.start()

    def grown(self, size: int) -> None:
        """So many bytes are written."""
        # Nobody is woken for less: a chunk of the network is a sixteenth of it.
        if size - self._written >= _CHUNK_BYTES:
            with self._changed:
                self._written = size
                self._changed.notify_all()

    def finish(self) -> tuple[str, FileRecord]:
        """Once nothing is written any more: the hash that the hub names the file by, and the file's record.

        Waits for the disk. Raises OSError if the file cannot be read or written to it.
        """
        self._end()
        if self._error is not None:
            raise self._error
        status, sha256 = self._status, self._sha256.hexdigest()
        assert status is not None
        record = FileRecord(status.st_size, sha256, status.st_mtime_ns, status.st_ino)
        return (sha256 if self._sha1 is None else str(self._sha1.hexdigest())), record

    def discard(self) -> None:
        """The file is begun again, or given up: its bytes need not be read."""
        self._discarded = True
        self._end()

    def _end(self) -> None:
        with self._changed:
            self._whole = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self, work: Callable[[FileIO], None]) -> None:
        try:
            with self._path.open("rb", buffering=0) as source:
                work(source)
        except OSError as error:
            self._error = error

    def _wait(self, size: int) -> bool:
        """Until more than ``size`` bytes are written, or all of them; True if all."""
        with self._changed:
            while not (self._whole or self._written > size):
                self._changed.wait()
            return self._whole

    def _read_back(self, source: FileIO) -> None:
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        at = 0
        while not self._discarded:
            if self._wait(at) and self._status is None:
                # Before the last bytes: a change while they are read must not pass for the state that was hashed.
                self._status = os.fstat(source.fileno())
            size = source.readinto(buffer)
            if not size:
                return
            at += size
            self._sha256.update(buffer[:size])
            if self._sha1 is not None:
                self._sha1.update(buffer[:size])

    def _sync(self, source: FileIO) -> None:
        at = os.fstat(source.fileno()).st_size
        while not self._wait(at + _SYNC_BYTES):
            at = self._written
            os.fsync(source.fileno())
        if not self._discarded:
            os.fsync(source.fileno())
