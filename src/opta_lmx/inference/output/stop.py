"""Stop strings over a text that arrives in pieces of any size."""

from collections.abc import Sequence


class StopStrings:
    """Finds the first stop string in a stream and holds back text that may be the start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Text that is safe to show now, and True once a stop string was met (it and what follows are dropped).

        The one complete first counts, of several that end together the longest: as if each character came alone.
        """
        held = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            self._held = ""
            return held[: min(found)[1]], True
        keep = self._start_of_a_stop(held)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False

    def flush(self) -> str:
        """What was held back, once it is certain that nothing follows."""
        held, self._held = self._held, ""
        return held

    def _start_of_a_stop(self, text: str) -> int:
        """Length of the longest end of ``text`` with which some stop string begins."""
        for size in range(min(len(text), self._longest - 1), 0, -1):
            end = text[-size:]
            if any(stop.startswith(end) for stop in self._stops):
                return size
        return 0
