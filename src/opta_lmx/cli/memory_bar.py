"""Memory as a bar for people: the plan of a load with what the model would add, and who holds what now."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

_GIB: Final = 1024**3

# The bar may be piped into a file or a terminal that knows no Unicode: plain letters say the same.
_FREE: Final = "."
_CAP: Final = "|"
_RESET: Final = "\x1b[0m"


@dataclass(frozen=True, slots=True)
class _Part:
    """A stretch of the bar: its letter, its name, the key of its bytes, its colour on a terminal (SGR)."""

    letter: str
    name: str
    key: str
    colour: str


_PARTS: Final = (
    _Part("#", "used now", "used_bytes", "90"),
    _Part("=", "reserved", "reserved_bytes", "33"),
    _Part("W", "weights", "weights_bytes", "34"),
    _Part("o", "worker", "overhead_bytes", "36"),
    _Part("K", "KV cache", "kv_bytes", "35"),
    _Part("P", "prefix cache", "prefix_cache_bytes", "32"),
    _Part("b", "buffers", "buffer_bytes", "35"),
)
# Of a model that is in memory ``used`` and ``reserved`` hold all of it already.
_NOW: Final = _PARTS[:2]

# Who holds the memory of a machine that serves.
_HOLDERS: Final = (
    _Part("#", "others", "others_bytes", "90"),
    _Part("W", "models", "models_bytes", "34"),
    _Part("K", "KV", "kv_bytes", "35"),
    _Part("P", "prefix", "prefix_cache_bytes", "32"),
    _Part("=", "promised", "promised_bytes", "33"),
)


def memory_bar(plan: Mapping[str, Any], cells: int, *, colour: bool) -> Iterator[str]:
    """The lines of a plan: verdict, bar, what each letter stands for, and the sum.

    The bar has ``cells`` characters for the machine's whole memory and one more for the cap; a load that would need
    more than there is makes it longer. ``colour`` adds a terminal's codes.
    """
    parts = _NOW if plan["verdict"] == "resident" else _PARTS
    yield _headline(plan)
    yield f"[{_bar(plan, parts, cells, colour=colour)}]"
    for part in parts:
        yield f"  {part.letter}  {part.name:<13}{_gib(plan[part.key])}"
    added = 0 if parts is _NOW else plan["need_bytes"]
    free = plan["free_bytes"] - added
    share = 100 * plan["limit_bytes"] / plan["total_bytes"]
    yield f"  {_FREE}  {'free' if free >= 0 else 'missing':<13}{_gib(abs(free))}"
    yield f"  {_CAP}  {'cap':<13}{_gib(plan['limit_bytes'])}  {share:.0f} % of {plan['total_bytes'] / _GIB:.2f} GiB"


def holders_bar(ledger: Mapping[str, Any], cells: int, *, colour: bool) -> Iterator[str]:
    """Two lines of the ledger in GET /admin/memory: the bar, as in ``memory_bar``, and what each letter stands for.

    Models hold weights and workers. KV and prefix caches are set aside for them, ``promised`` is what else is reserved.
    """
    kv, prefix = ledger["kv_reserved_bytes"], ledger["prefix_cache_bytes"]
    sizes: dict[str, int] = {
        "total_bytes": ledger["total_bytes"],
        "limit_bytes": ledger["limit_bytes"],
        "others_bytes": ledger["other_processes_bytes"],
        "models_bytes": ledger["used_bytes"] - ledger["other_processes_bytes"],
        "kv_bytes": kv,
        "prefix_cache_bytes": prefix,
        "promised_bytes": max(0, ledger["reservations_bytes"] - kv - prefix),
    }
    yield f"[{_bar(sizes, _HOLDERS, cells, colour=colour)}]"
    shown = {part: f"{sizes[part.key] / _GIB:.1f}" for part in _HOLDERS}
    cap = f"{_CAP} cap {sizes['limit_bytes'] / _GIB:.1f} of {sizes['total_bytes'] / _GIB:.1f} GiB"
    yield "  ".join([cap, *(f"{part.letter} {part.name} {size}" for part, size in shown.items() if size != "0.0")])


def _headline(plan: Mapping[str, Any]) -> str:
    evicted = ", ".join(plan["would_evict"])
    words = {
        "resident": "is in memory",
        "fits": "fits",
        "fits_after_stop": "fits once what is being stopped has gone",
        "fits_after_eviction": f"fits after the eviction of {evicted}",
        "must_wait": "must wait for models that are busy or loading",
        "does_not_fit": "does not fit",
    }
    return f"{plan['model_id']} {words.get(plan['verdict'], plan['verdict'])}"


def _bar(sizes: Mapping[str, Any], parts: Sequence[_Part], cells: int, *, colour: bool) -> str:
    """Each part ends where the sum so far ends, so that roundings do not add up."""
    letters = ""
    end_bytes = 0
    for part in parts:
        end_bytes += sizes[part.key]
        letters += part.letter * (_cell(end_bytes, sizes["total_bytes"], cells) - len(letters))
    letters = letters.ljust(cells, _FREE)
    cap = _cell(sizes["limit_bytes"], sizes["total_bytes"], cells)
    bar = letters[:cap] + _CAP + letters[cap:]
    if not colour:
        return bar
    codes = {part.letter: part.colour for part in parts}
    runs = ((letter, "".join(run)) for letter, run in groupby(bar))
    return "".join(f"\x1b[{codes[letter]}m{run}{_RESET}" if letter in codes else run for letter, run in runs)


def _cell(size_bytes: int, total_bytes: int, cells: int) -> int:
    # A model far beyond the machine must not draw a bar of as many screens.
    return min(round(cells * size_bytes / total_bytes), 2 * cells)


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / _GIB:9.2f} GiB"
