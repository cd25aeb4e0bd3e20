"""Reading a log that grows, as ``opta-lmx logs`` does: its last lines, and each further one as it comes."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

_BLOCK_BYTES: Final = 64 * 1024


def read_log(path: Path, lines: int, wait: Callable[[], bool] | None = None) -> Iterator[bytes]:
    """The last ``lines`` lines, then new ones for as long as ``wait`` gives True; each ends with a newline.

    None for ``wait`` ends after those that are there. A file that is moved away is read to its end, then the one in its
    place from its beginning; one that was cut is read anew. Raises OSError if there is no file at first.
    """
    file: BinaryIO = path.open("rb")
    try:
        _seek_last(file, lines)
        rest, replaced = b"", None
        while True:
            for line in _lines(file):
                rest += line
                if rest.endswith(b"\n"):
                    yield rest
                    rest = b""
            if rest and (replaced or wait is None):
                yield rest + b"\n"
                rest = b""
            if replaced:
                file.close()
                file, replaced = replaced, None
                continue
            if wait is None or not wait():
                return
            # Looked for before the old one is read to its end: whoever writes has turned to the new one by then.
            replaced = _replacement(path, file)
    finally:
        file.close()


def _seek_last(file: BinaryIO, lines: int) -> None:
    """To the beginning of the last ``lines`` lines, one without its newline counted."""
    position = file.seek(0, os.SEEK_END)
    found = 0
    while position > 0:
        size = min(_BLOCK_BYTES, position)
        file.seek(position - size)
        block = file.read(size)
        if position == file.tell() and not found and not block.endswith(b"\n"):
            found = 1
        at = len(block)
        while (at := block.rfind(b"\n", 0, at)) >= 0:
            found += 1
            if found > lines:
                file.seek(position - size + at + 1)
                return
        position -= size
    file.seek(0)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """From where it is read to now; the last may lack its newline."""
    if os.fstat(file.fileno()).st_size < file.tell():
        file.seek(0)
    yield from iter(file.readline, b"")


def _replacement(path: Path, file: BinaryIO) -> BinaryIO | None:
    """The file that stands at the path now, if it is another one; None while there is none."""
    try:
        other = path.open("rb")
    except FileNotFoundError:
        return None
    if os.path.samestat(os.fstat(other.fileno()), os.fstat(file.fileno())):
        other.close()
        return None
    return other
