"""Fair shares, lanes, order and leaving."""

from collections import Counter
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from opta_lmx.inference.fair_queue import BATCH_TURN, FairQueue
from opta_lmx.types import Caller, Lane


def _served(queue: FairQueue[str], turns: int) -> Counter[str]:
    """How often each caller came up; items are named caller-number."""
    return Counter(queue.pop().rpartition("-")[0] for _ in range(turns))


def test_one_caller_is_served_in_order() -> None:
    """Without keys everybody is one caller, and the queue is first come first served."""
    queue: FairQueue[int] = FairQueue()
    for item in range(5):
        queue.push(item, Caller())
    assert [queue.pop() for _ in range(5)] == list(range(5))
    with pytest.raises(IndexError):
        queue.pop()


@given(st.lists(st.sampled_from([0.5, 1.0, 2.0, 4.0]), min_size=2, max_size=5), st.integers(10, 60))
def test_shares_follow_the_weights(weights: list[float], turns: int) -> None:
    """While all wait, nobody is ever more than one turn, and one of each other's, away from the share of its weight."""
    queue: FairQueue[str] = FairQueue()
    for at, weight in enumerate(weights):
        for number in range(turns):
            queue.push(f"{at}-{number}", Caller(str(at), weight))
    served = _served(queue, turns)
    for at, weight in enumerate(weights):
        assert abs(served[str(at)] - turns * weight / sum(weights)) <= 1 + len(weights)


def test_a_flood_does_not_delay_a_lone_request() -> None:
    """Whoever comes to a line of a thousand of another's is next but one."""
    queue: FairQueue[str] = FairQueue()
    for number in range(1000):
        queue.push(f"flood-{number}", Caller("flood"))
    _served(queue, 10)
    queue.push("lone-0", Caller("lone"))
    assert "lone" in _served(queue, 2)


def test_nobody_saves_up_turns() -> None:
    """A caller who was away has no claim on the turns of then."""
    queue: FairQueue[str] = FairQueue()
    queue.push("idle-0", Caller("idle"))
    for number in range(200):
        queue.push(f"busy-{number}", Caller("busy"))
    _served(queue, 100)
    for number in range(1, 50):
        queue.push(f"idle-{number}", Caller("idle"))
    assert _served(queue, 20)["idle"] <= 11


def test_interactive_goes_first_and_batch_is_not_starved() -> None:
    """One turn in BATCH_TURN is the batch lane's while both wait; alone, it has all of them."""
    queue: FairQueue[str] = FairQueue()
    for number in range(100):
        queue.push(f"person-{number}", Caller("person"))
        queue.push(f"job-{number}", Caller("job", lane=Lane.BATCH))
    served = _served(queue, 8 * BATCH_TURN)
    assert served == {"person": 8 * (BATCH_TURN - 1), "job": 8}
    assert set(queue.depths()) == {
        (Lane.INTERACTIVE, "person", 100 - served["person"]),
        (Lane.BATCH, "job", 100 - served["job"]),
    }
    _served(queue, len(queue))
    queue.push("job-x", Caller("job", lane=Lane.BATCH))
    assert queue.pop() == "job-x"


class AnyTraffic(RuleBasedStateMachine):
    """Whatever comes, leaves and is called up: nobody is lost, doubled or passed within its own line."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: FairQueue[int] = FairQueue()
        self.lines: dict[tuple[Lane, str], list[int]] = {}
        self.numbers = count()

    @rule(name=st.sampled_from("abc"), weight=st.sampled_from([0.1, 1.0, 10.0]), lane=st.sampled_from(Lane))
    def come(self, name: str, weight: float, lane: Lane) -> None:
        item = next(self.numbers)
        self.queue.push(item, Caller(name, weight, lane))
        self.lines.setdefault((lane, name), []).append(item)

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        waiting = [item for line in self.lines.values() for item in line]
        assert not self.queue.remove(-1)
        if waiting:
            item = data.draw(st.sampled_from(waiting))
            assert self.queue.remove(item)
            next(line for line in self.lines.values() if item in line).remove(item)

    @rule()
    def call_up(self) -> None:
        if len(self.queue):
            item = self.queue.pop()
            line = next(line for line in self.lines.values() if item in line)
            assert line.pop(0) == item

    @invariant()
    def everybody_is_there(self) -> None:
        expected = {(*key, len(line)) for key, line in self.lines.items() if line}
        assert set(self.queue.depths()) == expected
        assert len(self.queue) == sum(depth for *_, depth in expected)


TestAnyTraffic = AnyTraffic.TestCase
