"""Requests on their way to the compiler, and their cancels."""

from opta_lmx.inference.protocol import Cancel
from opta_lmx.inference.worker.backend import Prepared
from opta_lmx.inference.worker.uncompiled import Uncompiled
from opta_lmx.types import SamplingParams


def request(id: int) -> Prepared:
    """A request without anything to compile."""
    return Prepared(id, str(id), [1], 1, SamplingParams())


def test_requests_leave_in_the_order_they_came() -> None:
    """The line is a line."""
    line = Uncompiled()
    for id in (3, 1, 2):
        line.put(request(id))
    assert [line.take().id for _ in range(3)] == [3, 1, 2]


def test_a_cancel_follows_its_request() -> None:
    """It is held while its request is in line or being compiled, and handed over when the request has left."""
    line = Uncompiled()
    line.put(request(1))
    line.put(request(2))
    assert line.hold(Cancel(2))
    assert not line.is_cancelled(line.take().id)
    assert line.hold(Cancel(1))
    assert line.is_cancelled(1)
    assert line.leave(1) == Cancel(1)
    assert line.is_cancelled(line.take().id)
    assert line.leave(2) == Cancel(2)


def test_a_cancel_of_what_is_not_here_is_not_held() -> None:
    """It is for a request that never came by, or has left, and goes to the owner at once."""
    line = Uncompiled()
    line.put(request(1))
    assert not line.hold(Cancel(7))
    assert line.leave(line.take().id) is None
    assert not line.hold(Cancel(1))
