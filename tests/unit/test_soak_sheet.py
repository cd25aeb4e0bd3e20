"""The soak's arithmetic: what a balance is, and that it does not come out even by itself."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.load.soak.sheet import End, Sheet, Verdict, percentile, slope


def sheet(**ends: int) -> Sheet:
    """A sheet of chats that have ended so."""
    made = Sheet(seed=1, seconds=60)
    for end, count in ends.items():
        for _ in range(count):
            made.sent["chat"] += 1
            made.add("chat", Verdict(End(end), "503 worker_lost" if end == "refused" else "why"))
    return made


def test_a_sheet_is_even_if_every_request_has_an_end() -> None:
    """Answered, refused and cancelled ones add up, and refusals are told by their codes."""
    made = sheet(answered=3, refused=2, cancelled=1)
    made.balance()
    assert made.is_even
    assert made.refusals == {"503 worker_lost": 2}
    assert "3 + 2 + 1" in made.to_text()
    assert made.to_json()["requests"]["chat"] == {"sent": 6, "answered": 3, "refused": 2, "cancelled": 1, "fault": 0}


@pytest.mark.parametrize("what", ["fault", "lost"])
def test_a_fault_or_a_lost_request_makes_it_uneven(what: str) -> None:
    """And the sheet shows it."""
    made = sheet(answered=3, fault=1 if what == "fault" else 0)
    made.sent["chat"] += what == "lost"
    made.balance()
    assert not made.is_even
    assert "NOT EVEN" in made.to_text()
    assert made.to_json()["even"] is False
    assert ("chat: why" in made.to_text()) is (what == "fault")


def test_times_are_gathered_from_every_verdict() -> None:
    """First tokens, and all gaps."""
    made = Sheet(seed=1, seconds=60)
    made.add("chat", Verdict(End.ANSWERED, "", 0.25, [0.01, 0.03]))
    made.add("chat", Verdict(End.ANSWERED))
    told = made.to_json()
    assert told["ttft"] == {"p50": 0.25, "p95": 0.25, "p99": 0.25}
    assert (told["itl"]["p50"], told["itl"]["p99"]) == (0.01, 0.03)


@pytest.mark.parametrize(("rank", "expected"), [(50, 50), (95, 95), (99, 99), (100, 100), (1, 1)])
def test_percentiles_are_values_that_were_seen(rank: int, expected: int) -> None:
    """By nearest rank; of nothing there is none."""
    assert percentile(list(range(100, 0, -1)), rank) == expected
    assert percentile([], rank) is None


@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), st.sets(st.integers(0, 1000), min_size=2))
def test_the_slope_of_a_line_is_its_own(steepness: float, height: float, places: set[int]) -> None:
    """Wherever it is looked at."""
    points = [(float(x), steepness * x + height) for x in places]
    assert slope(points) == pytest.approx(steepness, abs=1e-6)


def test_there_is_no_slope_at_one_place() -> None:
    """Nor of nothing."""
    assert slope([]) == slope([(1, 1), (1, 5)]) == 0
