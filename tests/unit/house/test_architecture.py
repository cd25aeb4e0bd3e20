"""docs/plans/ARCHITECTURE.md draws the folders as they are."""

import re
from pathlib import Path

import pytest

from tests.unit.house.source import PACKAGE, ROOT

_PAGE = ROOT / "docs" / "plans" / "ARCHITECTURE.md"

# "│   ├── one.py two.py   what they are": the bars give the depth, files and folders come first.
_LINE = re.compile(r"^(?P<bars>(?:│   |    )*)[├└]── (?P<names>\S+(?:\.py|/)(?: \S+(?:\.py|/)(?= ))*)")


@pytest.fixture(scope="module")
def drawn() -> dict[Path, set[str]]:
    """Folder -> the names the page draws in it."""
    tree: dict[Path, set[str]] = {PACKAGE: set()}
    branch = [PACKAGE]
    for line in _PAGE.read_text().splitlines():
        if (match := _LINE.match(line)) is None:
            continue
        depth = len(match["bars"]) // 4
        names = match["names"].split()
        tree[branch[depth]].update(name.rstrip("/") for name in names)
        if names[0].endswith("/"):
            branch[depth + 1 :] = [branch[depth] / names[0].rstrip("/")]
            tree[branch[-1]] = set()
    assert tree[PACKAGE]
    return tree


def test_what_is_drawn_exists(drawn: dict[Path, set[str]]) -> None:
    """No name on the page outlives its file."""
    paths = {folder / name for folder, names in drawn.items() for name in names}
    assert {str(path) for path in paths if not path.exists()} == set()


def test_every_folder_is_drawn(drawn: dict[Path, set[str]]) -> None:
    """A room nobody drew is a room nobody decided on."""
    rooms = {path.parent for path in PACKAGE.rglob("__init__.py")} - {PACKAGE}
    assert {str(room) for room in rooms if room.name not in drawn.get(room.parent, set())} == set()


def test_a_folder_drawn_with_files_is_drawn_whole(drawn: dict[Path, set[str]]) -> None:
    """Where the page lists modules it lists all of them."""
    for folder, names in drawn.items():
        if any(name.endswith(".py") for name in names):
            modules = {path.name for path in folder.glob("*.py") if path.name != "__init__.py"}
            assert modules - names == set(), folder
