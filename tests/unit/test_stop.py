"""Stop strings over a text that arrives in pieces."""

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from opta_lmx.inference.output.stop import StopStrings

# Two letters, so that stops overlap, nest and repeat.
_TEXTS = st.text("ab", max_size=12)
_STOPS = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3)
_CUTS = st.sets(st.integers(0, 12))


def _pieces(text: str, cuts: set[int]) -> list[str]:
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    return [text[start:end] for start, end in pairwise(places)]


def _shown(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    """All that was shown of the pieces, the rest included if no stop was met; and whether one was."""
    finder, shown = StopStrings(stops), ""
    for piece in pieces:
        text, met = finder.feed(piece)
        shown += text
        if met:
            return shown, True
    return shown + finder.flush(), False


def _expected(stops: list[str], text: str) -> tuple[str, bool]:
    """The stop that is complete first counts; of two complete at once the one that began first."""
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return (text[: min(found)[1]], True) if found else (text, False)


@given(_STOPS, _TEXTS, _CUTS)
@example(["bb", "abba"], "abba", set())
def test_the_text_is_shown_up_to_the_first_stop_however_it_is_cut(stops: list[str], text: str, cuts: set[int]) -> None:
    """What is shown depends on the text and the stops, never on where tokens end."""
    assert _shown(stops, _pieces(text, cuts)) == _expected(stops, text)


@given(_STOPS, _TEXTS, _CUTS)
def test_only_what_may_begin_a_stop_is_held_back(stops: list[str], text: str, cuts: set[int]) -> None:
    """After every piece, all text is shown but the longest end of it that begins some stop."""
    finder, seen, shown = StopStrings(stops), "", ""
    for piece in _pieces(text, cuts):
        part, met = finder.feed(piece)
        if met:
            return
        seen, shown = seen + piece, shown + part
        held = next(size for size in range(len(seen) + 1) if _begins(stops, seen[size:]))
        assert shown == seen[:held]


def _begins(stops: list[str], end: str) -> bool:
    return not end or any(stop.startswith(end) and stop != end for stop in stops)


@pytest.mark.parametrize("pieces", [["a END b"], ["a E", "ND b"], ["a ", "E", "N", "D", " b"], ["a END", " b"]])
def test_the_stop_and_what_follows_it_is_dropped(pieces: list[str]) -> None:
    """Neither the stop string nor anything after it is ever shown."""
    assert _shown(["END"], pieces) == ("a ", True)


def test_without_stops_nothing_is_held_back() -> None:
    """An empty list of stops passes every piece through at once."""
    finder = StopStrings([])
    assert finder.feed("any text") == ("any text", False)
    assert finder.flush() == ""


def test_flush_gives_what_was_held_once() -> None:
    """The start of a stop that never came is shown at the end, and only once."""
    finder = StopStrings(["stop"])
    assert finder.feed("it may st") == ("it may ", False)
    assert (finder.flush(), finder.flush()) == ("st", "")
