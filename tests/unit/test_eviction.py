"""Victims: enough, idle, oldest first, and none too many."""

from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opta_lmx.manager.eviction import Resident, choose_victims, coming_bytes, waitable_bytes
from opta_lmx.types import ModelState

RESIDENTS = st.lists(
    st.builds(
        Resident,
        id=st.uuids().map(str),
        memory_bytes=st.integers(0, 20),
        last_used=st.integers(0, 5).map(float),
        state=st.sampled_from([ModelState.READY, ModelState.READY, ModelState.LOADING, ModelState.STOPPING]),
        leases=st.sampled_from([0, 0, 1]),
        protected=st.sampled_from([False, False, True]),
    ),
    max_size=7,
)


def idle_model(id: str, memory_bytes: int, last_used: float) -> Resident:
    return Resident(id, memory_bytes, last_used, ModelState.READY, leases=0, protected=False)


def test_nobody_goes_when_it_fits() -> None:
    """Exactly fitting is fitting."""
    assert choose_victims(10, 10, [idle_model("a", 5, 0)]) == ()


def test_the_oldest_goes_first() -> None:
    """The order of the residents does not matter, their last use does."""
    residents = [idle_model("new", 10, 9), idle_model("old", 10, 1), idle_model("middle", 10, 5)]
    assert choose_victims(10, 0, residents) == ("old",)
    assert choose_victims(15, 0, residents) == ("old", "middle")


def test_no_victim_is_superfluous() -> None:
    """A small old model stays if the large one that has to go makes room enough alone."""
    assert choose_victims(30, 0, [idle_model("small", 5, 1), idle_model("large", 40, 2)]) == ("large",)


def test_models_of_one_age_go_by_id() -> None:
    """A tie is decided the same way every time."""
    assert choose_victims(5, 0, [idle_model("b", 5, 1), idle_model("a", 5, 1)]) == ("a",)


@pytest.mark.parametrize(
    "busy",
    [
        replace(idle_model("a", 50, 1), leases=1),
        replace(idle_model("a", 50, 1), protected=True),
        replace(idle_model("a", 50, 1), state=ModelState.LOADING),
        replace(idle_model("a", 50, 1), state=ModelState.STOPPING),
    ],
    ids=["leased", "protected", "loading", "stopping"],
)
def test_only_the_idle_go(busy: Resident) -> None:
    """Leased, protected, loading and stopping models are no victims, whatever they hold."""
    assert choose_victims(10, 0, [busy]) is None
    assert choose_victims(10, 0, [busy, idle_model("b", 10, 9)]) == ("b",)


@given(need=st.integers(0, 60), free=st.integers(-20, 40), residents=RESIDENTS)
def test_victims_are_enough_and_no_fewer_would_do(need: int, free: int, residents: list[Resident]) -> None:
    """All are idle, their memory makes room, none of them can be spared, and None means that no choice would do."""
    idle = {resident.id: resident.memory_bytes for resident in residents if resident.idle}
    victims = choose_victims(need, free, residents)
    if victims is None:
        assert free + sum(idle.values()) < need
        return
    assert len(set(victims)) == len(victims)
    assert free + sum(idle[victim] for victim in victims) >= need
    for fewer in combinations(victims, len(victims) - 1) if victims else ():
        assert free + sum(idle[victim] for victim in fewer) < need


@given(residents=RESIDENTS, evict=st.booleans())
def test_waiting_frees_at_least_what_is_idle_or_coming(residents: list[Resident], evict: bool) -> None:
    """The bound on what waiting can free is never below what stops and evictions would give at once."""
    at_once = coming_bytes(residents) + (sum(r.memory_bytes for r in residents if r.idle) if evict else 0)
    assert waitable_bytes(residents, evict=evict) >= at_once


def test_waiting_counts_on_what_requests_have_grown_by() -> None:
    """A protected model stays, but its caches empty when its requests end: promise and footprint."""
    held = replace(idle_model("a", 50, 1), protected=True, leases=1, grown_bytes=7)
    assert waitable_bytes([held], evict=False) == 14


def test_waiting_does_not_count_on_the_protected() -> None:
    """What is pinned or held will not leave; when it is loading, it at least stops counting twice."""
    held = replace(idle_model("a", 50, 1), protected=True)
    assert waitable_bytes([held], evict=True) == 0
    assert waitable_bytes([replace(held, state=ModelState.LOADING)], evict=True) == 50
