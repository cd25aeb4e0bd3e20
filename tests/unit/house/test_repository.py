"""What is in the repository can be rebuilt, read and run by a stranger."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.unit.house.source import ROOT

# `"name==1.2; marker",   # why it is here`
_REQUIREMENT = re.compile(r'^\s*"(?P<requirement>[^"]+)",?\s*(?P<comment>#\s*\S.*)?$')

# Somebody's own folders (not those of "someone" or "you"), and package hosts: both differ on the next machine.
_PLACES = re.compile(
    r"(?<![\w.~/:-])/(?:work|root|home|Users)/(?!someone\b|you\b)\w+|\b(?:pypi\.org/simple|files\.pythonhosted\.org|extra-index-url)\b"
)


def _requirements(key: str) -> list[re.Match[str]]:
    """The lines of one array of pyproject.toml, comments and all."""
    array = (ROOT / "pyproject.toml").read_text().partition(f"\n{key} = [\n")[2].partition("\n]")[0]
    return [match for line in array.splitlines() if (match := _REQUIREMENT.match(line))]


@pytest.mark.parametrize("key", ["dependencies", "dev"])
def test_direct_dependencies_are_pinned_and_explained(key: str) -> None:
    """Each is pinned with == and says beside itself what it is for."""
    found = _requirements(key)
    assert found
    assert [line["requirement"] for line in found if "==" not in line["requirement"] or not line["comment"]] == []


def test_what_is_kept_out_is_explained() -> None:
    """Each override says why nobody misses the package."""
    found = _requirements("override-dependencies")
    assert found
    assert [line["requirement"] for line in found if not line["comment"]] == []


def test_the_build_is_pinned() -> None:
    """The build backend is part of what a release is made of."""
    assert re.search(r'^requires = \["[a-z]+==[\d.]+"\]$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


def test_no_file_names_a_machine() -> None:
    """No absolute path of somebody's machine and no package host stands in any file of the repository."""
    wrong = []
    for path in _repository_files():
        if path == Path(__file__):
            continue
        for number, line in enumerate(path.read_bytes().decode(errors="replace").splitlines(), start=1):
            if place := _PLACES.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {place[0]}")
    assert not wrong, "\n".join(wrong)


def test_scripts_can_be_run() -> None:
    """Everything in scripts/ and .ci/ is executable and names its interpreter."""
    scripts = [path for folder in ("scripts", ".ci") for path in (ROOT / folder).iterdir() if path.is_file()]
    assert scripts
    assert [path.name for path in scripts if not os.access(path, os.X_OK) or path.read_bytes()[:2] != b"#!"] == []


def test_readme_names_the_test_command() -> None:
    """.ci/run takes the command from there, so there must be exactly one."""
    commands = set(re.findall(r"pip install [^`|\n]*scripts/test\b", (ROOT / "README.md").read_text()))
    assert commands == {"pip install uv && uv run scripts/test"}


def _repository_files() -> list[Path]:
    """Every file that is tracked, or would be with the next ``git add``."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
        timeout=20,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    paths = (ROOT / name for name in listed.stdout.decode().split("\0") if name)
    return [path for path in paths if path.is_file()]
