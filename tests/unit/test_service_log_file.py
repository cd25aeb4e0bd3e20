"""The end of a log, and what comes, whatever becomes of the file meanwhile."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from opta_lmx.service.log_file import read_log


def follow(path: Path, *deeds: Callable[[], object], lines: int = 100) -> list[bytes]:
    """What is read while one deed after the other is done to the file, each between two looks."""
    to_do: Iterator[Callable[[], object]] = iter(deeds)

    def wait() -> bool:
        deed = next(to_do, None)
        if deed is not None:
            deed()
        return deed is not None

    return list(read_log(path, lines, wait))


def append(path: Path, text: bytes) -> Callable[[], object]:
    def deed() -> None:
        with path.open("ab") as file:
            file.write(text)

    return deed


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A log of three lines."""
    path = tmp_path / "server.log"
    path.write_bytes(b"one\ntwo\nthree\n")
    return path


@pytest.mark.parametrize(
    ("lines", "shown"),
    [
        (0, []),
        (1, [b"three\n"]),
        (2, [b"two\n", b"three\n"]),
        (3, [b"one\n", b"two\n", b"three\n"]),
        (9, [b"one\n", b"two\n", b"three\n"]),
    ],
)
def test_the_last_lines_are_shown(log: Path, lines: int, shown: list[bytes]) -> None:
    """As many as asked for, or all there are."""
    assert list(read_log(log, lines)) == shown


def test_a_line_without_its_end_counts(log: Path) -> None:
    """What a server wrote as it died is a line."""
    append(log, b"fo")()
    assert list(read_log(log, 2)) == [b"three\n", b"fo\n"]


def test_the_end_of_a_large_log_is_found(tmp_path: Path) -> None:
    """Lines are counted across the blocks that are read, and one longer than a block is whole."""
    path = tmp_path / "server.log"
    rows = [b"%d %s\n" % (number, b"x" * (number * 37 % 5000)) for number in range(200)]
    rows[-3] = b"y" * 200_000 + b"\n"
    path.write_bytes(b"".join(rows))
    for lines in (1, 3, 50, 199):
        assert list(read_log(path, lines)) == rows[-lines:]


def test_what_comes_is_shown_in_whole_lines(log: Path) -> None:
    """A line that is written in two pieces is one line."""
    assert follow(log, append(log, b"fo"), append(log, b"ur\nfive\n"), lines=1) == [b"three\n", b"four\n", b"five\n"]


def test_a_rotated_log_is_followed(log: Path) -> None:
    """What was written before the move is not lost, and the new file is read from its beginning."""

    def rotate() -> None:
        append(log, b"four\nfi")()
        log.rename(log.with_suffix(".1"))

    def begin() -> None:
        log.write_bytes(b"six\n")

    assert follow(log, rotate, begin, append(log, b"seven\n"), lines=0) == [b"four\n", b"fi\n", b"six\n", b"seven\n"]


def test_a_cut_log_is_read_anew(log: Path) -> None:
    """A file made shorter in its place begins again."""
    assert follow(log, lambda: log.write_bytes(b"new\n"), append(log, b"er\n"), lines=0) == [b"new\n", b"er\n"]


def test_no_log_is_an_error(tmp_path: Path) -> None:
    """A file that was never there is not waited for."""
    with pytest.raises(FileNotFoundError):
        list(read_log(tmp_path / "none.log", 1, lambda: True))
