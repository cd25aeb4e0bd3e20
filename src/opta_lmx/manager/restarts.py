"""When a model whose worker died may be started again. Pure; ``residency.py`` asks."""

from collections.abc import Sequence

# The first death may be an accident: it costs nobody a wait. Further ones cost 1, 2, 4 ... seconds.
_FIRST_DELAY_SECONDS = 1.0
_LONGEST_DELAY_SECONDS = 30.0


def next_start(deaths: Sequence[float], now: float, limit: int, window_seconds: float) -> float | None:
    """The moment from which a worker may be started; None once ``limit`` died within the window before ``now``.

    ``deaths`` are moments of the clock that gives ``now``, oldest first. What lies before the window is forgiven.
    """
    recent = [death for death in deaths if now - death < window_seconds]
    if len(recent) >= limit:
        return None
    if len(recent) < 2:
        return now
    delay: float = _FIRST_DELAY_SECONDS * 2 ** (len(recent) - 2)
    return recent[-1] + min(delay, _LONGEST_DELAY_SECONDS)
