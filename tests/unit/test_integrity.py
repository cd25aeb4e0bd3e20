"""What models.lock notices, and what it does not look at twice."""

import os
import stat
from pathlib import Path

import pytest

from opta_lmx.errors import IntegrityMismatch
from opta_lmx.manager.integrity import ModelsLock, Verdict

SOURCE = ("publisher/name", "main")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "name"
    (directory / "1_Pooling").mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(b"weights")
    (directory / "config.json").write_bytes(b"{}")
    (directory / "1_Pooling" / "config.json").write_bytes(b"[]")
    (directory / ".DS_Store").write_bytes(b"noise")
    return directory


@pytest.fixture
def lock(tmp_path: Path, model: Path) -> ModelsLock:
    lock = ModelsLock(tmp_path)
    lock.record("name", model, *SOURCE)
    return lock


def touch(path: Path) -> None:
    """Another modification time, as a copy or a restored backup has."""
    later = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(later, later))


def test_a_record_is_read_back_by_another_process(lock: ModelsLock, tmp_path: Path) -> None:
    """Source, revision, and each visible file's size and hash survive in the file."""
    record = ModelsLock(tmp_path).find("name")
    assert record is not None
    assert (record.source, record.revision) == SOURCE
    assert set(record.files) == {"model.safetensors", "config.json", "1_Pooling/config.json"}
    assert record.files["config.json"].size == 2
    # The SHA-256 of "{}".
    assert record.files["config.json"].sha256 == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


def test_only_its_owner_can_read_the_file(lock: ModelsLock, tmp_path: Path) -> None:
    """Mode 0600, and nothing half-written lies beside it."""
    assert stat.S_IMODE((tmp_path / "models.lock").stat().st_mode) == 0o600
    assert {path.name for path in tmp_path.iterdir()} == {"name", "models.lock"}


def test_untouched_files_are_not_hashed(lock: ModelsLock, model: Path) -> None:
    """The fast path trusts size, time and inode; a full check does not."""
    assert lock.is_unchanged("name", model)
    assert set(lock.verify("name", model).values()) == {Verdict.UNCHANGED}
    assert set(lock.verify("name", model, full=True).values()) == {Verdict.VERIFIED}


def test_a_touched_file_is_hashed_once(lock: ModelsLock, model: Path) -> None:
    """The same bytes under another time pass, and the new time is remembered."""
    touch(model / "model.safetensors")
    assert not lock.is_unchanged("name", model)
    verdicts = lock.verify("name", model)
    assert verdicts["model.safetensors"] is Verdict.VERIFIED
    assert verdicts["config.json"] is Verdict.UNCHANGED
    assert lock.is_unchanged("name", model)


def test_a_flipped_bit_is_found(lock: ModelsLock, model: Path) -> None:
    """Another byte of the same length raises with the file's relative name and both hashes."""
    recorded = lock.find("name")
    assert recorded is not None
    (model / "1_Pooling" / "config.json").write_bytes(b"[}")
    touch(model / "1_Pooling" / "config.json")
    with pytest.raises(IntegrityMismatch) as raised:
        lock.verify("name", model)
    assert raised.value.path == "1_Pooling/config.json"
    assert raised.value.expected == recorded.files["1_Pooling/config.json"].sha256
    assert len(raised.value.actual) == 64
    assert raised.value.actual != raised.value.expected


def test_a_full_check_finds_a_change_that_kept_the_time(lock: ModelsLock, model: Path) -> None:
    """Bytes changed behind an unchanged time pass the fast path but not a full check."""
    path = model / "model.safetensors"
    before = path.stat()
    path.write_bytes(b"weightz")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(IntegrityMismatch, match=r"model\.safetensors"):
        lock.verify("name", model, full=True)


def test_missing_and_added_files_are_found(lock: ModelsLock, model: Path) -> None:
    """Every visible file must be in the record and the other way round; hidden ones may come and go."""
    (model / ".DS_Store").unlink()
    assert lock.is_unchanged("name", model)
    (model / "model-extra.safetensors").write_bytes(b"more")
    assert not lock.is_unchanged("name", model)
    with pytest.raises(IntegrityMismatch, match=r"model-extra\.safetensors: expected no such file"):
        lock.verify("name", model)
    (model / "model-extra.safetensors").unlink()
    (model / "config.json").unlink()
    with pytest.raises(IntegrityMismatch, match=r"config\.json: expected .* found no such file"):
        lock.verify("name", model)


def test_a_model_without_a_record_is_allowed(lock: ModelsLock, tmp_path: Path, model: Path) -> None:
    """Nothing is known of it, so nothing is claimed and nothing refused."""
    assert lock.verify("other", model) == {}
    assert not lock.is_unchanged("other", model)
    assert ModelsLock(tmp_path / "empty").find("name") is None


def test_a_forgotten_model_leaves_the_others(lock: ModelsLock, tmp_path: Path, model: Path) -> None:
    """Only the named record goes."""
    lock.record("other", model, *SOURCE)
    lock.forget("name")
    lock.forget("never-there")
    assert lock.find("name") is None
    assert ModelsLock(tmp_path).find("other") is not None


def test_another_writer_is_noticed(lock: ModelsLock, tmp_path: Path, model: Path) -> None:
    """Two processes that share a directory see each other's records, and neither loses one."""
    other = ModelsLock(tmp_path)
    assert other.find("name") is not None
    lock.record("second", model, *SOURCE)
    other.record("third", model, *SOURCE)
    assert lock.find("third") is not None
    assert other.find("second") is not None


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"version": 2, "models": {}}', b'{"models": {"name": {"files": 1}}}'],
)
def test_a_damaged_lock_is_never_taken_for_an_empty_one(content: bytes, tmp_path: Path, model: Path) -> None:
    """A models.lock that cannot be read blocks loads and is not overwritten."""
    (tmp_path / "models.lock").write_bytes(content)
    lock = ModelsLock(tmp_path)
    with pytest.raises(IntegrityMismatch, match=r"models\.lock"):
        lock.verify("name", model)
    with pytest.raises(IntegrityMismatch, match=r"models\.lock"):
        lock.record("name", model, *SOURCE)
    assert (tmp_path / "models.lock").read_bytes() == content
