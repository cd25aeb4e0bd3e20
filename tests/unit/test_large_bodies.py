"""What a killed server left of large bodies is removed by the next one, and nothing else is."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from opta_lmx.api.large_bodies import clear_leftovers


def test_only_what_nobody_comes_back_for_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the process in its name: one that has ended; not a living one's, nor anything called otherwise."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name in (f"opta-lmx-body-{ended.pid}-x", f"opta-lmx-body-{os.getpid()}-x", "opta-lmx-body-x-y", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "body").write_text("a prompt")
    clear_leftovers()
    assert {path.name for path in tmp_path.iterdir()} == {
        f"opta-lmx-body-{os.getpid()}-x",
        "opta-lmx-body-x-y",
        "other",
    }
