"""An environment for each foreign client, made once from its pinned requirements and kept below ``.clients/``.

The clients contradict each other's and our own dependencies, so none of them is installed beside the project. A
requirements file (``langchain.txt``, ``node.txt``) names exact versions; what they bring along is frozen by the date
in pyproject.toml. Called by the fixtures of ``conftest.py``.
"""

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest

HERE: Final = Path(__file__).parent
_ROOT: Final = HERE.parents[1]
_CACHE: Final = _ROOT / ".clients"

# Seconds, for one environment: a few are usual, most of them downloads.
_BUILD_BOUND: Final = 240.0

# Written last: an environment without it was not finished.
_MARK: Final = "complete"


def python_environment(name: str) -> Path:
    """The interpreter of the environment of ``NAME.txt``; fails with the installer's words if there is none."""
    requirements = HERE / f"{name}.txt"
    directory = _directory(name, requirements, sys.version)
    python = directory / "bin" / "python"
    with (_CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (directory / _MARK).exists():
            _clear(name)
            _build([*_uv(), "venv", "--quiet", "--python", sys.executable, str(directory)])
            dated = ["--exclude-newer", _frozen_at(), "--python", str(python)]
            _build([*_uv(), "pip", "install", "--quiet", *dated, "--requirement", str(requirements)])
            (directory / _MARK).touch()
    return python


def node_environment() -> Path:
    """The directory with the ``node_modules`` of ``node.txt``; skips the test where there is no node, but not in CI."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("node and npm must be on PATH in CI")
        pytest.skip("node and npm are not on PATH")
    requirements = HERE / "node.txt"
    directory = _directory("node", requirements, npm)
    with (_CACHE / "node.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (directory / _MARK).exists():
            _clear("node")
            directory.mkdir()
            packages = [line.partition("#")[0].strip() for line in requirements.read_text().splitlines()]
            options = ["--no-save", "--no-audit", "--no-fund", "--before", _frozen_at(), "--prefix", str(directory)]
            _build([npm, "install", *options, *filter(None, packages)])
            (directory / _MARK).touch()
    return directory


def _directory(name: str, requirements: Path, interpreter: str) -> Path:
    """Where an environment lives: another requirement, date or interpreter is another environment."""
    _CACHE.mkdir(exist_ok=True)
    key = hashlib.sha256("\n".join((requirements.read_text(), _frozen_at(), interpreter)).encode()).hexdigest()
    return _CACHE / f"{name}-{key[:12]}"


def _clear(name: str) -> None:
    """Removes what an earlier list of requirements, or a build cut short, left."""
    for old in _CACHE.glob(f"{name}-*"):
        shutil.rmtree(old)


def _frozen_at() -> str:
    """Nothing published after this date is installed, as for the project itself."""
    settings = tomllib.loads((_ROOT / "pyproject.toml").read_text())
    date: str = settings["tool"]["uv"]["exclude-newer"]
    return date


def _uv() -> Sequence[str]:
    """How to call uv: the one that started us, on PATH, beside this interpreter, or a module of it."""
    beside = Path(sys.executable).parent / "uv"
    for found in (os.environ.get("UV"), shutil.which("uv"), str(beside)):
        if found and Path(found).exists():
            return [found]
    if importlib.util.find_spec("uv") is not None:
        return [sys.executable, "-m", "uv"]
    pytest.fail(
        "uv is needed to install the clients, and is not on PATH, nor beside this interpreter, nor a module of it"
    )


def _build(command: Sequence[str]) -> None:
    # Not from the checkout: uv would read the overrides in pyproject.toml, which leave out what clients need.
    with tempfile.TemporaryDirectory() as elsewhere:
        try:
            done = subprocess.run(
                command, cwd=elsewhere, capture_output=True, text=True, timeout=_BUILD_BOUND, check=False
            )
        except subprocess.TimeoutExpired:
            pytest.fail(f"no end within {_BUILD_BOUND} s (is the package registry reached?): {' '.join(command)}")
    if done.returncode != 0:
        pytest.fail(f"cannot be installed (is the package registry reached?): {' '.join(command)}\n{done.stderr}")
