"""Who may read what the server keeps: files that others can open although nobody else should.

Asked by ``opta-lmx doctor``. The server itself creates files with 0600 and directories with 0700, and changes no mode
of what it finds.
"""

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO


@dataclass(frozen=True, slots=True)
class Lax:
    """A file or a directory with rights for others; ``mode`` is what chmod takes."""

    path: Path
    mode: int


def find_lax(*places: Path) -> list[Lax]:
    """Places with rights for others, and what lies in them if they are directories that others may enter.

    Behind a directory that is closed to others nothing can be reached, and nothing is listed. Links are not followed;
    what cannot be looked at is passed over.
    """
    return [lax for place in places for lax in _walk([place])]


def _walk(places: Iterable[Path]) -> Iterator[Lax]:
    for place in places:
        try:
            mode = place.lstat().st_mode
        except OSError:
            continue
        if stat.S_ISLNK(mode) or not mode & _OTHERS:
            continue
        yield Lax(place, stat.S_IMODE(mode))
        if stat.S_ISDIR(mode):
            yield from _walk(_entries(place))


def _entries(directory: Path) -> list[Path]:
    try:
        with os.scandir(directory) as entries:
            return sorted(Path(entry.path) for entry in entries)
    except OSError:
        return []
