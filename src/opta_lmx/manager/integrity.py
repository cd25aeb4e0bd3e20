"""models.lock: what every file of a model was when it came to this machine, and whether it still is.

One JSON file in the models directory, replaced atomically, readable by its owner only. Everything here blocks
(hashing runs at disk speed), so callers on the event loop use a thread for ``record``, ``verify`` and ``check``;
``is_unchanged`` only looks at sizes and times. Several processes may share one models directory: writers take a
lock on it, and readers notice a new file.
"""

import fcntl
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import msgspec

from opta_lmx.errors import Draining, IntegrityMismatch

LOCK_NAME = "models.lock"

# Read at once: some milliseconds of hashing at most.
_CHUNK_BYTES = 1024 * 1024

# Stands in an IntegrityMismatch where the record or the disk has no such file.
_ABSENT = "no such file"


class Verdict(StrEnum):
    """How a file was found: the first two are right, all others wrong."""

    UNCHANGED = "unchanged"  # size, time and inode are those of the last hash
    VERIFIED = "verified"  # hashed now
    DIFFERENT = "different"
    MISSING = "missing"  # recorded, and not on disk
    ADDED = "added"  # on disk, and not recorded
    UNREADABLE = "unreadable"

    @property
    def right(self) -> bool:
        """True if the file is what its record says."""
        return self in (Verdict.UNCHANGED, Verdict.VERIFIED)


@dataclass(frozen=True, slots=True)
class FileCheck:
    """One file beside its record: both SHA-256, None where there is no record, or no file that can be read."""

    name: str
    verdict: Verdict
    expected: str | None
    actual: str | None


class FileRecord(msgspec.Struct, frozen=True):
    """One file. ``mtime_ns`` and ``inode`` stand for "not touched since ``sha256`` was computed"."""

    size: int
    sha256: str
    mtime_ns: int
    inode: int

    def stands_for(self, found: os.stat_result) -> bool:
        """True if a file of this status has not been touched since it was hashed."""
        return (self.size, self.mtime_ns, self.inode) == (found.st_size, found.st_mtime_ns, found.st_ino)


class ModelRecord(msgspec.Struct, frozen=True):
    """``source`` is a repository or a file's name, ``revision`` what tells two states of it apart.

    ``patterns`` chose the files of a download from the repository's; empty where nothing was said.
    """

    source: str
    revision: str
    files: dict[str, FileRecord]
    patterns: tuple[str, ...] = ()


class _LockFile(msgspec.Struct):
    version: int = 1
    models: dict[str, ModelRecord] = {}


_decoder = msgspec.json.Decoder(_LockFile)


class ModelsLock:
    """The records of one models directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path = directory / LOCK_NAME
        # What models.lock held when it last had this status; one attribute, because threads read it too.
        self._cached: tuple[os.stat_result, Mapping[str, ModelRecord]] | None = None
        self._closing = False

    def close(self) -> None:
        """Ends what is being hashed, in whatever thread, with Draining: a large model takes minutes."""
        self._closing = True

    def find(self, model_id: str) -> ModelRecord | None:
        """The record, None if there is none. Raises IntegrityMismatch if models.lock itself cannot be read."""
        return self._read().get(model_id)

    def record(
        self,
        model_id: str,
        directory: Path,
        source: str,
        revision: str,
        known: Mapping[str, FileRecord] | None = None,
        patterns: tuple[str, ...] = (),
    ) -> None:
        """Writes the model's record, replacing an older one; hashes every file that is not ``known`` or was touched."""
        hashed = known or {}
        files: dict[str, FileRecord] = {}
        for name, path in _files(directory):
            earlier = hashed.get(name)
            files[name] = earlier if earlier is not None and earlier.stands_for(path.stat()) else self._hash(path)
        with self._changing() as models:
            models[model_id] = ModelRecord(source, revision, files, patterns)

    def forget(self, model_id: str) -> None:
        """Removes the record, if there is one."""
        if model_id in self._read():
            with self._changing() as models:
                models.pop(model_id, None)

    def is_unchanged(self, model_id: str, directory: Path) -> bool:
        """True if the model is recorded and no file was touched since its last hash; reads no file."""
        record = self.find(model_id)
        if record is None:
            return False
        try:
            found = {name: path.stat() for name, path in _files(directory)}
        except FileNotFoundError:
            return False
        return found.keys() == record.files.keys() and all(
            record.files[name].stands_for(status) for name, status in found.items()
        )

    def verify(self, model_id: str, directory: Path, *, full: bool = False) -> dict[str, Verdict]:
        """Checks every file against the record; empty for a model without one, which is allowed.

        Hashes what was touched since its last hash, everything if ``full``. Raises IntegrityMismatch with the
        first file that is missing, added or different; its ``path`` is relative to the model's directory.
        """
        record = self.find(model_id)
        if record is None:
            return {}
        found = dict(_files(directory))
        verdicts: dict[str, Verdict] = {}
        fresh: dict[str, FileRecord] = {}
        for name in sorted(found.keys() | record.files.keys()):
            check, now = self._compare(name, record.files.get(name), found.get(name), full=full)
            if not check.verdict.right:
                raise IntegrityMismatch(name, check.expected or _ABSENT, check.actual or _ABSENT)
            verdicts[name] = check.verdict
            if now is not None:
                fresh[name] = now
        self._renew(model_id, record, fresh)
        return verdicts

    def check(self, model_id: str, directory: Path) -> list[FileCheck]:
        """Hashes every file and tells of each by name, wrong or right; empty for a model without a record."""
        record = self.find(model_id)
        if record is None:
            return []
        found = dict(_files(directory))
        checks: list[FileCheck] = []
        fresh: dict[str, FileRecord] = {}
        for name in sorted(found.keys() | record.files.keys()):
            before = record.files.get(name)
            try:
                check, now = self._compare(name, before, found.get(name), full=True)
            except OSError:
                check, now = FileCheck(name, Verdict.UNREADABLE, before.sha256 if before else None, None), None
            checks.append(check)
            if now is not None and check.verdict.right:
                fresh[name] = now
        self._renew(model_id, record, fresh)
        return checks

    def _compare(
        self, name: str, before: FileRecord | None, path: Path | None, *, full: bool
    ) -> tuple[FileCheck, FileRecord | None]:
        """How the file at ``path`` (None: there is none) stands to its record, and its new record if it was hashed."""
        expected = None if before is None else before.sha256
        if path is None:
            return FileCheck(name, Verdict.MISSING, expected, None), None
        if before is not None and not full and before.stands_for(path.stat()):
            return FileCheck(name, Verdict.UNCHANGED, expected, expected), None
        now = self._hash(path)
        verdict = Verdict.VERIFIED if now.sha256 == expected else Verdict.ADDED if before is None else Verdict.DIFFERENT
        return FileCheck(name, verdict, expected, now.sha256), now

    def _hash(self, path: Path) -> FileRecord:
        with path.open("rb", buffering=0) as file:
            # Before the bytes: a change while they are read must not pass for the state that was hashed.
            status = os.fstat(file.fileno())
            sha256, chunk = hashlib.sha256(), memoryview(bytearray(_CHUNK_BYTES))
            while size := file.readinto(chunk):
                if self._closing:
                    raise Draining()
                sha256.update(chunk[:size])
        return FileRecord(status.st_size, sha256.hexdigest(), status.st_mtime_ns, status.st_ino)

    def _renew(self, model_id: str, record: ModelRecord, fresh: dict[str, FileRecord]) -> None:
        """Remembers when files that are right were hashed, unless the model has got another record meanwhile."""
        if any(record.files[name] != now for name, now in fresh.items()):
            with self._changing() as models:
                if models.get(model_id) == record:
                    models[model_id] = msgspec.structs.replace(record, files=record.files | fresh)

    def _read(self) -> Mapping[str, ModelRecord]:
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return {}
        cached = self._cached
        if cached is None or not _same(cached[0], found):
            cached = self._cached = (found, self._decode().models)
        return cached[1]

    def _decode(self) -> _LockFile:
        try:
            lock = _decoder.decode(self._path.read_bytes())
        except FileNotFoundError:
            return _LockFile()
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise IntegrityMismatch(LOCK_NAME, expected="the records of the models", actual=str(error)) from error
        if lock.version != 1:
            raise IntegrityMismatch(LOCK_NAME, expected="version 1", actual=f"version {lock.version}")
        return lock

    @contextmanager
    def _changing(self) -> Iterator[dict[str, ModelRecord]]:
        """The present records, written back at the end; only one process or thread is inside."""
        guard = os.open(self._directory, os.O_RDONLY)
        try:
            fcntl.flock(guard, fcntl.LOCK_EX)
            lock = self._decode()
            yield lock.models
            self._write(msgspec.json.format(msgspec.json.encode(lock), indent=1))
        finally:
            os.close(guard)

    def _write(self, text: bytes) -> None:
        fresh = self._directory / f".{LOCK_NAME}.new"
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self._path)


def _files(directory: Path) -> Iterator[tuple[str, Path]]:
    """Every file below the directory by its relative name; hidden ones are not the model's."""
    for folder, folders, names in os.walk(directory):
        folders[:] = [name for name in folders if not name.startswith(".")]
        prefix = "" if folder == str(directory) else Path(folder).relative_to(directory).as_posix() + "/"
        for name in names:
            path = directory / prefix / name
            if not name.startswith(".") and path.is_file():
                yield prefix + name, path


def _same(a: os.stat_result, b: os.stat_result) -> bool:
    return (a.st_ino, a.st_mtime_ns, a.st_size) == (b.st_ino, b.st_mtime_ns, b.st_size)
