"""``opta-lmx top``: what the server works on now, drawn again every second. Looks only; changes nothing."""

import json
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from opta_lmx.cli.arguments import Arguments
from opta_lmx.cli.failure import ExitCode, Failure
from opta_lmx.cli.memory_bar import holders_bar
from opta_lmx.cli.remote import PLAIN_COLUMNS, ask, find_remote, show_size

_LOOK_SECONDS: Final = 1.0
# Long enough to even out a second in which nothing was read, short enough to follow what happens.
_RATE_SECONDS: Final = 5.0
# Percentiles of fewer first tokens than come in a minute say little.
_TTFT_SECONDS: Final = 60.0

_BOLD: Final = "\x1b[1m{}\x1b[0m"

_Row = Mapping[str, Any]


def run_top(arguments: Arguments, environ: Mapping[str, str]) -> int:
    """Show it until q or Control-C; once, where there is no terminal or that is asked for. Raises Failure."""
    watch = Watch(partial(ask, find_remote(arguments, environ), "GET"))
    figures = watch.look()
    on_terminal = sys.stdout.isatty()
    colour = on_terminal and not environ.get("NO_COLOR")
    if arguments.json:
        print(json.dumps(figures, indent=2))
    elif arguments.once or not on_terminal:
        columns = shutil.get_terminal_size().columns if on_terminal else PLAIN_COLUMNS
        print("\n".join(frame(figures, columns, colour=colour)))
    else:
        _show_live(watch, figures, colour=colour)
    return ExitCode.DONE


def _show_live(watch: "Watch", figures: _Row, *, colour: bool) -> None:
    from opta_lmx.cli.screen import Screen

    note = ""
    try:
        with Screen() as screen:
            while True:
                columns, rows = shutil.get_terminal_size()
                lines = [*([note[:columns]] if note else ()), *frame(figures, columns, colour=colour)]
                screen.draw(_within(lines, rows - 1))
                if "q" in screen.keys(_LOOK_SECONDS).lower():
                    return
                try:
                    figures, note = watch.look(), ""
                except Failure as failure:
                    # A server that is started again is watched on.
                    note = f"error: {failure}"
    except KeyboardInterrupt:
        return


def _within(lines: Sequence[str], rows: int) -> Sequence[str]:
    if len(lines) <= rows:
        return lines
    return [*lines[: rows - 1], f"... {len(lines) - rows + 1} more"]


@dataclass(frozen=True, slots=True)
class _Past:
    """Counters at one moment, here and of the server (seconds): tokens, first tokens by upper bound (cumulative)."""

    at: float
    uptime: float
    tokens: float
    first_tokens: Counter[float]


@dataclass(slots=True)
class Watch:
    """Asks the server, and remembers its counters for as long as rates and percentiles look back.

    ``get`` gives the answer to a path; ``now`` is monotonic, in seconds.
    """

    get: Callable[[str], _Row]
    now: Callable[[], float] = time.monotonic
    _history: deque[_Past] = field(default_factory=deque)

    def look(self) -> dict[str, Any]:
        """The server as it is now: its status, its requests, and the figures over both. Raises what ``get`` does.

        The first look knows no rate: the sum of the requests' own stands for it, and first tokens since the start.
        """
        status, metrics = self.get("/admin/status"), self.get("/admin/metrics/json")
        requests = self.get("/admin/requests")["requests"]
        tokens, uptime = _total(metrics, "lmx_generation_tokens_total"), status["uptime_seconds"]
        past = _Past(self.now(), uptime, tokens, _first_tokens(metrics))
        if self._history and uptime < self._history[-1].uptime:
            self._history.clear()  # another server than before
        while self._history and past.at - self._history[0].at > _TTFT_SECONDS:
            self._history.popleft()
        rates = [row["tokens_per_second"] for row in requests if row["tokens_per_second"] is not None]
        recent = [old for old in self._history if past.at - old.at <= _RATE_SECONDS]
        speed = (past.tokens - recent[0].tokens) / (past.at - recent[0].at) if recent else sum(rates, 0.0)
        lately = Counter(past.first_tokens)
        if self._history:
            lately.subtract(self._history[0].first_tokens)
        self._history.append(past)
        return {
            "version": status["version"],
            "uptime_seconds": status["uptime_seconds"],
            "draining": status["draining"],
            "requests_running": status["requests_running"],
            "requests_waiting": status["requests_waiting"],
            "tokens_per_second": round(speed, 1),
            "ttft_p50_seconds": quantile(0.5, lately),
            "ttft_p95_seconds": quantile(0.95, lately),
            "ttft_window_seconds": round(past.at - self._history[0].at) if len(self._history) > 1 else None,
            "models": status["models"],
            "requests": requests,
            "memory": status["memory"]["ledger"],
        }


def _total(metrics: _Row, name: str) -> float:
    return sum((sample["value"] for sample in metrics[name]["samples"]), 0.0)


def _first_tokens(metrics: _Row) -> Counter[float]:
    counts: Counter[float] = Counter()
    for sample in metrics["lmx_time_to_first_token_seconds"]["samples"]:
        for bound, count in sample["buckets"].items():
            counts[float(bound)] += count
    return counts


def quantile(share: float, buckets: Mapping[float, int]) -> float | None:
    """The value below which a ``share`` of all lies, as Prometheus's histogram_quantile has it; None of nothing.

    ``buckets`` count by upper bound what was at most that; one of them is infinite.
    """
    bounds = sorted(buckets)
    if not bounds or buckets[bounds[-1]] <= 0:
        return None
    rank = share * buckets[bounds[-1]]
    low, below = 0.0, 0
    for bound in bounds:
        if buckets[bound] >= rank:
            inside = buckets[bound] - below
            return low if bound == float("inf") else round(low + (bound - low) * (rank - below) / max(inside, 1), 6)
        low, below = bound, buckets[bound]
    raise AssertionError(share)


def frame(figures: _Row, columns: int, *, colour: bool) -> Iterator[str]:
    """The lines for people, none wider than ``columns``; a table leaves out columns that find no room."""
    state = "draining" if figures["draining"] else f"up {_duration(figures['uptime_seconds'])}"
    yield f"opta-lmx {figures['version']}  {state}"[:columns]
    yield _totals(figures)[:columns]
    bar, legend = holders_bar(figures["memory"], max(columns - 3, 10), colour=colour)
    yield bar
    yield legend[:columns]
    models = [_model(row) for row in figures["models"]]
    requests = [_request(row) for row in figures["requests"]]
    for rows, expendable in ((models, _EXPENDABLE_OF_MODELS), (requests, _EXPENDABLE_OF_REQUESTS)):
        if rows:
            yield ""
            head, *body = _columns(rows, expendable, columns)
            yield _BOLD.format(head) if colour else head
            yield from body


def _totals(figures: _Row) -> str:
    window = figures["ttft_window_seconds"]
    since = "since its start" if window is None else f"last {window} s"
    times = f"TTFT p50 {_seconds(figures['ttft_p50_seconds'])} p95 {_seconds(figures['ttft_p95_seconds'])} ({since})"
    running, waiting = figures["requests_running"], figures["requests_waiting"]
    return f"{running} running  {waiting} waiting  {figures['tokens_per_second']:.1f} tok/s  {times}"


def _model(row: _Row) -> dict[str, str]:
    return {
        "MODEL": row["id"],
        "STATE": row["state"],
        "RUN": str(row["requests_running"]),
        "WAIT": str(row["requests_waiting"]),
        "MEMORY": show_size(row["memory_bytes"]),
        "RESTARTS": str(row["restarts"]),
    }


def _request(row: _Row) -> dict[str, str]:
    speed, prompt = row["tokens_per_second"], row["prompt_tokens"]
    return {
        "REQUEST": row["request_id"],
        "MODEL": row["model_id"] or "-",
        "PHASE": row["phase"],
        "PROMPT": "-" if prompt is None else str(prompt),
        "CACHED": "-" if prompt is None else str(row["cached_tokens"]),
        "TOKENS": str(row["completion_tokens"]),
        "TOK/S": "-" if speed is None else f"{speed:.1f}",
        "TTFT": _seconds(row["ttft_seconds"]),
        "AGE": _seconds(row["age_seconds"]),
    }


# What a narrow terminal leaves out, first the first.
_EXPENDABLE_OF_MODELS: Final = ("RESTARTS", "MEMORY", "STATE")
_EXPENDABLE_OF_REQUESTS: Final = ("CACHED", "PROMPT", "TTFT", "AGE", "MODEL")
# Left-aligned; the others are numbers.
_TEXTS: Final = frozenset({"MODEL", "STATE", "REQUEST", "PHASE"})


def _columns(rows: Sequence[Mapping[str, str]], expendable: Iterable[str], width: int) -> Iterator[str]:
    """A head and a line for each row; texts to the left, numbers to the right."""
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    for name in expendable:
        if sum(widths.values()) + 2 * (len(widths) - 1) <= width:
            break
        del widths[name]
    for row in ({name: name for name in widths}, *rows):
        cells = (row[name].ljust(size) if name in _TEXTS else row[name].rjust(size) for name, size in widths.items())
        yield "  ".join(cells)[:width].rstrip()


def _seconds(value: float | None) -> str:
    """A short time for people, in the unit that suits it."""
    if value is None:
        return "-"
    if value < 1:
        return f"{value * 1000:.0f} ms"
    return f"{value:.1f} s" if value < 60 else _duration(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
