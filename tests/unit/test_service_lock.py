"""One server for one models directory, and what the next one is told."""

import os
from pathlib import Path

import pytest

from opta_lmx.service.lock import LOCK_NAME, DirectoryInUse, find_holder, hold


def test_a_held_directory_is_refused_with_its_holder(tmp_path: Path) -> None:
    """The second to ask learns at once who has it; another directory is free."""
    with hold(tmp_path / "models"):
        refused = pytest.raises(DirectoryInUse, match=f"models is in use by another server .pid {os.getpid()}.$")
        with refused, hold(tmp_path / "models"):
            pytest.fail("held twice")
        with hold(tmp_path / "others"):
            assert find_holder(tmp_path / "others") is not None


def test_a_free_directory_has_no_holder(tmp_path: Path) -> None:
    """Before a server, after it, and where there is no such directory."""
    assert find_holder(tmp_path / "models") is None
    with hold(tmp_path / "models"):
        holder = find_holder(tmp_path / "models")
        assert holder is not None
        assert holder.pid == os.getpid()
    assert find_holder(tmp_path / "models") is None
    with hold(tmp_path / "models"):
        assert find_holder(tmp_path / "models") is not None


def test_a_holder_that_left_no_number_is_still_one(tmp_path: Path) -> None:
    """What the file holds is for people only; the lock is the system's."""
    with hold(tmp_path):
        (tmp_path / LOCK_NAME).write_text("?")
        holder = find_holder(tmp_path)
        assert holder is not None
        assert holder.pid is None
        assert str(holder).endswith("in use by another server")


def test_the_directory_and_the_lock_are_their_owners(tmp_path: Path) -> None:
    """What is made for the lock is closed to others, whatever the shell's umask."""
    with hold(tmp_path / "models"):
        assert (tmp_path / "models").stat().st_mode & 0o777 == 0o700
        assert (tmp_path / "models" / LOCK_NAME).stat().st_mode & 0o777 == 0o600


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    """A link in the lock's place harms no file elsewhere."""
    (tmp_path / "precious").write_text("text")
    (tmp_path / LOCK_NAME).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"), hold(tmp_path):
        pytest.fail("held")
    assert (tmp_path / "precious").read_text() == "text"
