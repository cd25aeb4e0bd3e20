"""Who is next: lanes, and within a lane the callers' fair shares. A plain data structure; ``admission.py`` asks.

Start-time fair queueing (Goyal, Vin and Cheng, 1996) with one unit of work for each request: a caller of weight two is
served twice as often as one of weight one while both wait. One who has waited for nothing gains nothing by that.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from opta_lmx.types import Caller, Lane

Item = TypeVar("Item")

# While both lanes wait, one of so many turns is the batch lane's: it is slow, not starved.
BATCH_TURN = 8


@dataclass(slots=True)
class _Flow(Generic[Item]):
    """What one caller has in one lane. ``start`` is the virtual time at which its first item's service begins."""

    weight: float
    start: float
    # A dict for its order and for leaving from the middle; the values mean nothing.
    items: dict[Item, None] = field(default_factory=dict)


class _LaneQueue(Generic[Item]):
    def __init__(self) -> None:
        self.size = 0
        self._time = 0.0
        self._flows: dict[str, _Flow[Item]] = {}

    def push(self, item: Item, caller: Caller) -> None:
        flow = self._flows.get(caller.name)
        if flow is None:
            flow = self._flows[caller.name] = _Flow(caller.weight, self._time)
        elif not flow.items:
            flow.start = max(flow.start, self._time)
        flow.weight = caller.weight
        flow.items[item] = None
        self.size += 1

    def pop(self) -> Item:
        waiting = (flow for flow in self._flows.values() if flow.items)
        flow = min(waiting, key=lambda flow: flow.start)
        item = next(iter(flow.items))
        del flow.items[item]
        self.size -= 1
        self._time = flow.start
        flow.start += 1.0 / flow.weight
        if not self.size:
            # Nobody waits, so nobody is owed anything.
            self._flows.clear()
        return item

    def remove(self, item: Item) -> bool:
        for flow in self._flows.values():
            if item in flow.items:
                del flow.items[item]
                self.size -= 1
                return True
        return False

    def depths(self) -> dict[str, int]:
        return {name: len(flow.items) for name, flow in self._flows.items() if flow.items}


class FairQueue(Generic[Item]):
    """Items (hashable, each once) of callers in two lanes."""

    def __init__(self) -> None:
        self._lanes: dict[Lane, _LaneQueue[Item]] = {lane: _LaneQueue() for lane in Lane}
        self._since_batch = 0

    def __len__(self) -> int:
        return sum(lane.size for lane in self._lanes.values())

    def push(self, item: Item, caller: Caller) -> None:
        """Put an item at the end of its caller's line."""
        self._lanes[caller.lane].push(item, caller)

    def pop(self) -> Item:
        """The next one. 1 What waits alone in its lane's absence. 2 Interactive. 3 Batch, every BATCH_TURN-th time.

        Raises IndexError if nobody waits.
        """
        interactive, batch = self._lanes[Lane.INTERACTIVE], self._lanes[Lane.BATCH]
        if not len(self):
            raise IndexError("nobody waits")
        if not batch.size or not interactive.size:
            self._since_batch = 0
            return (interactive if interactive.size else batch).pop()
        self._since_batch += 1
        if self._since_batch == BATCH_TURN:
            self._since_batch = 0
            return batch.pop()
        return interactive.pop()

    def remove(self, item: Item) -> bool:
        """Take an item out, wherever it is; False if it is not in line."""
        return any(lane.remove(item) for lane in self._lanes.values())

    def depths(self) -> Iterator[tuple[Lane, str, int]]:
        """(lane, caller, items) of everybody who waits."""
        for lane, queue in self._lanes.items():
            for name, items in queue.depths().items():
                yield lane, name, items
