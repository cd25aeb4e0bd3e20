"""The balance sheet: every request has one end, what was taken was given back. Pure."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from tests.load.bench.report import table

# Faults of one kind repeat; so many are shown whole.
_SHOWN_FAULTS: Final = 20
_PERCENTILES: Final = (50, 95, 99)


class End(StrEnum):
    """How a request ended, as its client saw it."""

    ANSWERED = "answered"
    # By a status and a typed body, or by a typed error event.
    REFUSED = "refused"
    # The client left.
    CANCELLED = "cancelled"
    # Anything else: what the soak is there to find.
    FAULT = "fault"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one request. ``why`` is the error code of a refusal, or what is wrong. Times in seconds."""

    end: End
    why: str = ""
    ttft: float | None = None
    gaps: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Reading:
    """The server's own process at one moment: ``at`` in seconds, ``rss`` in bytes, the others are counts."""

    at: float
    rss: int
    files: int
    threads: int
    children: int


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the sheet that has to hold."""

    name: str
    found: str
    wanted: str
    holds: bool


@dataclass(slots=True)
class Sheet:
    """What was sent and how it ended; ``lines`` are the checks at the end."""

    seed: int
    seconds: float
    sent: Counter[str] = field(default_factory=Counter)
    ends: Counter[tuple[str, End]] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    troubles: Counter[str] = field(default_factory=Counter)
    ttft: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)

    def add(self, kind: str, verdict: Verdict) -> None:
        """One request has ended."""
        self.ends[kind, verdict.end] += 1
        if verdict.end is End.REFUSED:
            self.refusals[verdict.why] += 1
        if verdict.end is End.FAULT:
            self.faults.append(f"{kind}: {verdict.why}")
        if verdict.ttft is not None:
            self.ttft.append(verdict.ttft)
        self.gaps.extend(verdict.gaps)

    def total(self, end: End) -> int:
        """Requests of all kinds with this end."""
        return sum(count for (_, found), count in self.ends.items() if found is end)

    def hold(self, name: str, found: object, wanted: object, *, holds: bool) -> None:
        """A line that holds or does not."""
        self.lines.append(Line(name, str(found), str(wanted), holds))

    def balance(self) -> None:
        """Requests in are requests out, and none was a fault."""
        parts = [self.total(end) for end in (End.ANSWERED, End.REFUSED, End.CANCELLED)]
        sent = sum(self.sent.values())
        self.hold(
            "requests = answered + refused + cancelled", " + ".join(map(str, parts)), sent, holds=sum(parts) == sent
        )
        self.hold("faults", len(self.faults), 0, holds=not self.faults)

    @property
    def is_even(self) -> bool:
        """True if every line holds."""
        return all(line.holds for line in self.lines)

    def to_text(self) -> str:
        """For reading."""
        kinds = [
            [kind, str(self.sent[kind]), *(str(self.ends[kind, end]) for end in End)] for kind in sorted(self.sent)
        ]
        whole = ["all", str(sum(self.sent.values())), *(str(self.total(end)) for end in End)]
        parts = [
            f"seed {self.seed}, {self.seconds:.0f} s",
            "\n".join(table(["requests", "sent", *End], [*kinds, whole])),
            _counts("refused for", self.refusals),
            _counts("done to it", self.troubles),
            "\n".join(table(["times, ms", *(f"p{rank}" for rank in _PERCENTILES)], self._times())),
            "\n".join(
                table(
                    ["balance", "found", "wanted", ""],
                    [[line.name, line.found, line.wanted, "ok" if line.holds else "NOT EVEN"] for line in self.lines],
                )
            ),
        ]
        if self.faults:
            parts.append("\n".join(["faults", *(f"  {fault}" for fault in self.faults[:_SHOWN_FAULTS])]))
        return "\n\n".join(parts) + "\n"

    def to_json(self) -> dict[str, Any]:
        """For programs; times in seconds."""
        return {
            "seed": self.seed,
            "seconds": self.seconds,
            "even": self.is_even,
            "requests": {
                kind: {"sent": self.sent[kind], **{end.value: self.ends[kind, end] for end in End}}
                for kind in self.sent
            },
            "refusals": dict(self.refusals),
            "troubles": dict(self.troubles),
            "faults": self.faults,
            "ttft": {f"p{rank}": percentile(self.ttft, rank) for rank in _PERCENTILES},
            "itl": {f"p{rank}": percentile(self.gaps, rank) for rank in _PERCENTILES},
            "lines": [
                {"name": line.name, "found": line.found, "wanted": line.wanted, "holds": line.holds}
                for line in self.lines
            ],
        }

    def _times(self) -> list[list[str]]:
        rows = []
        for name, values in (("time to first token", self.ttft), ("between tokens", self.gaps)):
            found = [percentile(values, rank) for rank in _PERCENTILES]
            rows.append([name, *("-" if value is None else f"{value * 1000:.1f}" for value in found)])
        return rows


def percentile(values: Sequence[float], rank: int) -> float | None:
    """The value that ``rank`` percent do not exceed (nearest rank); None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * rank // 100) - 1)]


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Least squares: by how much y grows for each unit of x; 0 for fewer than two places."""
    if len({x for x, _ in points}) < 2:
        return 0.0
    middle_x = sum(x for x, _ in points) / len(points)
    middle_y = sum(y for _, y in points) / len(points)
    above = sum((x - middle_x) * (y - middle_y) for x, y in points)
    return above / sum((x - middle_x) ** 2 for x, _ in points)


def _counts(title: str, counts: Mapping[str, int]) -> str:
    rows = [[name, str(count)] for name, count in sorted(counts.items(), key=lambda item: -item[1])]
    return "\n".join(table([title, ""], rows or [["nothing", "0"]]))
