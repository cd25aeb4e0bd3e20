"""When a model whose worker died may be started again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opta_lmx.manager.restarts import next_start


@pytest.mark.parametrize(
    ("deaths", "expected"),
    [
        pytest.param([], 100.0, id="never died"),
        pytest.param([99.0], 100.0, id="one accident costs no wait"),
        pytest.param([98.0, 99.5], 100.5, id="the second a second"),
        pytest.param([97.0, 98.0, 99.5], 101.5, id="the third two"),
        pytest.param([96.0, 97.0, 98.0, 99.5], 103.5, id="the fourth four"),
        pytest.param([95.0, 96.0, 97.0, 98.0, 99.5], None, id="the fifth is one too many"),
        pytest.param([1.0, 2.0, 3.0, 4.0, 99.5], 100.0, id="those before the window are forgiven"),
    ],
)
def test_each_death_costs_more_until_there_were_too_many(deaths: list[float], expected: float | None) -> None:
    """Delays count from the last death; what is due already may start now."""
    assert next_start(deaths, 100.0, limit=5, window_seconds=60) == expected


@given(st.lists(st.floats(0, 1000), max_size=30).map(sorted), st.floats(1000, 2000), st.integers(1, 20))
def test_the_wait_is_bounded(deaths: list[float], now: float, limit: int) -> None:
    """Whoever may be started at all may be so within half a minute of the last death."""
    start = next_start(deaths, now, limit, window_seconds=300)
    assert start is None or start <= max(now, deaths[-1] + 30 if deaths else now)
    assert (start is None) == (sum(now - death < 300 for death in deaths) >= limit)
