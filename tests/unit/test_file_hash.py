"""The hashes of a file that grows: those of what is on the disk, whenever it came there."""

import hashlib
from pathlib import Path

import pytest

from opta_lmx.errors import IntegrityMismatch
from opta_lmx.manager.file_hash import FileHash
from opta_lmx.manager.hub import HubFile
from opta_lmx.manager.integrity import ModelsLock

CONTENT = hashlib.shake_128(b"file").digest(5_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
BLOB = hashlib.sha1(b"blob %d\0" % len(CONTENT) + CONTENT, usedforsecurity=False).hexdigest()
LARGE = HubFile("w", len(CONTENT), SHA256, None)
SMALL = HubFile("w", len(CONTENT), None, BLOB)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where an earlier attempt has left a part."""
    path = tmp_path / "w"
    path.write_bytes(CONTENT[:1_500_000])
    return path


@pytest.mark.parametrize(("file", "digest"), [(LARGE, SHA256), (SMALL, BLOB)])
def test_the_hub_s_hash_and_a_record_that_stands(path: Path, file: HubFile, digest: str) -> None:
    """Both from one reading: the hash that the hub has, and the SHA-256 with the file's size, time and inode."""
    growing = FileHash(file, path)
    with path.open("ab", buffering=0) as output:
        for at in range(1_500_000, len(CONTENT), 70_000):
            output.write(CONTENT[at : at + 70_000])
            growing.grown(min(at + 70_000, len(CONTENT)))
    found, record = growing.finish()
    assert (found, record.sha256, record.size) == (digest, SHA256, len(CONTENT))
    assert record.stands_for(path.stat())


def test_what_is_hashed_is_what_the_disk_has(path: Path) -> None:
    """Not what a writer believes to have written."""
    growing = FileHash(LARGE, path)
    growing.grown(len(CONTENT))
    assert growing.finish()[0] == hashlib.sha256(CONTENT[:1_500_000]).hexdigest()


def test_a_file_begun_again_is_hashed_from_its_beginning(path: Path) -> None:
    """What was there before has no part in it."""
    FileHash(LARGE, path).discard()
    path.write_bytes(b"")
    growing = FileHash(LARGE, path)
    path.write_bytes(CONTENT)
    assert growing.finish()[0] == SHA256


def test_a_file_that_has_gone_is_told_of(path: Path) -> None:
    """As the error of the disk that it is."""
    path.unlink()
    with pytest.raises(FileNotFoundError):
        FileHash(LARGE, path).finish()


def test_what_is_known_is_not_hashed_again_unless_it_was_touched(path: Path) -> None:
    """A record takes over hashes of files that are as they were, and finds out about all others."""
    model = path.parent
    (model / "config.json").write_bytes(b"{}")
    _, known = FileHash(LARGE, path).finish()
    marked = type(known)(known.size, "0" * 64, known.mtime_ns, known.inode)
    lock = ModelsLock(model)
    lock.record("m", model, "acme/m", "c", {"w": marked})
    record = lock.find("m")
    assert record is not None
    assert record.files["w"].sha256 == "0" * 64
    with pytest.raises(IntegrityMismatch):
        lock.verify("m", model, full=True)
    path.write_bytes(CONTENT)
    lock.record("m", model, "acme/m", "c", {"w": marked})
    record = lock.find("m")
    assert record is not None
    assert record.files["w"].sha256 == SHA256
