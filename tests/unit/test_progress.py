"""Telling a worker that hangs from one that is idle, slow, or looked at too late."""

from opta_lmx.manager.progress import ProgressWatch


def _look(
    watch: ProgressWatch, seconds: int, *, since: float = 0.0, busy: bool = True, progress: int = 1
) -> list[bool]:
    """One look a second, that many times, with a bound of ten seconds."""
    return [
        watch.look(since + second, busy=busy, progress=progress, stall_seconds=10.0) for second in range(1, seconds + 1)
    ]


def test_work_without_a_step_is_suspect_and_then_stalled() -> None:
    """Ten seconds after the first look that saw no progress, and suspect from half of that on."""
    watch = ProgressWatch()
    assert _look(watch, 5) == [False] * 5
    assert not watch.suspect
    assert _look(watch, 1, since=5) == [False]
    assert watch.suspect
    assert _look(watch, 5, since=6) == [False] * 4 + [True]


def test_an_idle_worker_is_never_stalled() -> None:
    """Silence without work says nothing, however long; nor does it count once work comes."""
    watch = ProgressWatch()
    assert not any(_look(watch, 100, busy=False))
    assert not any(_look(watch, 9, since=100))


def test_each_step_begins_the_count_anew() -> None:
    """Any change of the number is progress."""
    watch = ProgressWatch()
    for turn in range(20):
        assert not any(_look(watch, 9, since=9 * turn, progress=turn))


def test_late_looks_count_for_little() -> None:
    """A machine that slept for an hour has no stalled workers when it wakes."""
    watch = ProgressWatch()
    _look(watch, 3)
    assert not watch.look(3600.0, busy=True, progress=1, stall_seconds=10.0)
    assert watch.silent_seconds <= 4


def test_a_worker_with_slow_steps_gets_more_time() -> None:
    """One that took eight seconds and went on may take twenty-four."""
    watch = ProgressWatch()
    _look(watch, 9)
    assert watch.silent_seconds == 8
    assert not any(_look(watch, 24, since=9, progress=2))
    assert all(_look(watch, 2, since=33, progress=2))
