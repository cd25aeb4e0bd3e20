"""The bar that shows whether a model fits."""

from typing import Any

import pytest

from opta_lmx.cli.memory_bar import memory_bar

GIB = 2**30


def plan(verdict: str = "fits", *, total: float = 100, weights: float = 20, used: float = 30) -> dict[str, Any]:
    """A machine with a cap of 90 %, 10 GiB reserved; a model with 1 GiB of worker, 4 of KV and 5 of prefix cache."""
    need, limit = weights + 10, total * 0.9
    sizes = {"total": total, "limit": limit, "used": used, "reserved": 10, "free": limit - used - 10, "need": need}
    sizes |= {"weights": weights, "overhead": 1, "kv": 4, "prefix_cache": 5, "buffer": 0}
    found: dict[str, Any] = {f"{name}_bytes": int(size * GIB) for name, size in sizes.items()}
    return found | {"model_id": "m", "verdict": verdict, "would_evict": ["x", "y"]}


def test_every_part_has_its_share_and_its_name() -> None:
    """One cell a GiB here: the cap stands behind the 90th, and what would be left is told."""
    headline, bar, *legend = memory_bar(plan(), 100, colour=False)
    assert headline == "m fits"
    assert bar == f"[{'#' * 30}{'=' * 10}{'W' * 20}o{'K' * 4}{'P' * 5}{'.' * 20}|{'.' * 10}]"
    assert legend == [
        "  #  used now         30.00 GiB",
        "  =  reserved         10.00 GiB",
        "  W  weights          20.00 GiB",
        "  o  worker            1.00 GiB",
        "  K  KV cache          4.00 GiB",
        "  P  prefix cache      5.00 GiB",
        "  b  buffers           0.00 GiB",
        "  .  free             20.00 GiB",
        "  |  cap              90.00 GiB  90 % of 100.00 GiB",
    ]


def test_roundings_do_not_add_up() -> None:
    """A bar of any width is as long as the machine's memory, however its parts are cut."""
    for cells in range(10, 60):
        assert len(list(memory_bar(plan(), cells, colour=False))[1]) == cells + 3


def test_what_does_not_fit_passes_the_cap() -> None:
    """The cap stays in its place inside the part that passes it, the bar grows, but not without end."""
    lines = list(memory_bar(plan("does_not_fit", weights=80), 100, colour=False))
    assert lines[0] == "m does not fit"
    assert lines[1] == f"[{'#' * 30}{'=' * 10}{'W' * 50}|{'W' * 30}o{'K' * 4}{'P' * 5}]"
    assert lines[-2] == "  .  missing          40.00 GiB"
    assert len(list(memory_bar(plan("does_not_fit", weights=9000), 100, colour=False))[1]) == 203


def test_a_model_in_memory_is_not_counted_twice() -> None:
    """What it uses is part of what is used and reserved already."""
    lines = list(memory_bar(plan("resident"), 100, colour=False))
    assert lines[:2] == ["m is in memory", f"[{'#' * 30}{'=' * 10}{'.' * 50}|{'.' * 10}]"]
    assert "  .  free             50.00 GiB" in lines


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        ("fits_after_stop", "m fits once what is being stopped has gone"),
        ("fits_after_eviction", "m fits after the eviction of x, y"),
        ("must_wait", "m must wait for models that are busy or loading"),
        ("new_word", "m new_word"),
    ],
)
def test_the_verdict_is_told_in_words(verdict: str, words: str) -> None:
    """One of a newer server as it stands."""
    assert next(memory_bar(plan(verdict), 10, colour=False)) == words


def test_colour_changes_no_letter() -> None:
    """Without the terminal's codes both bars are the same."""
    plain, coloured = (list(memory_bar(plan(), 40, colour=colour))[1] for colour in (False, True))
    assert plain != coloured
    for code in ("90", "33", "34", "36", "35", "32", "0"):
        coloured = coloured.replace(f"\x1b[{code}m", "")
    assert plain == coloured
