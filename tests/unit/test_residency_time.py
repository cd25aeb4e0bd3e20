"""Idle times, pins and holds."""

import pytest

from opta_lmx.config import WorkersConfig
from opta_lmx.config_models import ModelsConfig, PerModel
from opta_lmx.errors import Conflict, InvalidRequest
from opta_lmx.types import ModelState
from tests.fake_workers import House, model_files

A, B = model_files("a", 40), model_files("b", 40)


async def test_an_idle_model_expires() -> None:
    """The idle time counts from the last release; a busy model never expires."""
    async with House(ModelsConfig(ttl_seconds=100)) as house:
        serving = await house.serve(A)
        await house.advance(500)
        serving.end()
        await house.advance(99)
        assert house.shown("a").state is ModelState.READY
        await house.advance(1)
        assert house.residency.snapshot() == ()


@pytest.mark.parametrize(
    ("config", "asked", "expected"),
    [
        pytest.param(ModelsConfig(ttl_seconds=100), None, 100.0, id="default"),
        pytest.param(ModelsConfig(per_model={"a": PerModel(ttl_seconds=7)}), None, 7.0, id="of the model"),
        pytest.param(ModelsConfig(per_model={"a": PerModel(ttl_seconds=7)}), 5.0, 5.0, id="of the request"),
        pytest.param(ModelsConfig(ttl_seconds=None), None, None, id="never"),
    ],
)
async def test_idle_time_is_that_of_the_request_then_the_model_then_the_default(
    config: ModelsConfig, asked: float | None, expected: float | None
) -> None:
    """The most particular setting wins, and null means never."""
    async with House(config) as house:
        (await house.serve(A, ttl_seconds=asked)).end()
        assert house.shown("a").ttl_seconds == expected
        await house.advance(expected or 1e9)
        assert (house.residency.snapshot() == ()) == (expected is not None)


async def test_only_the_load_sets_the_idle_time() -> None:
    """Of those who wait for a load the first decides; a later request for a loaded model changes nothing."""
    async with House() as house:
        callers = [house.start(house.serve(A, ttl_seconds=ttl)) for ttl in (50, 60)]
        for caller in callers:
            (await caller).end()
        (await house.serve(A, ttl_seconds=70)).end()
        assert house.shown("a").ttl_seconds == 50


async def test_protected_models_do_not_expire() -> None:
    """A pinned model outlives its idle time, pinned by a call or by configuration."""
    config = ModelsConfig(ttl_seconds=10, per_model={"b": PerModel(pinned=True)})
    async with House(config) as house:
        await house.residency.load(A)
        await house.residency.load(B)
        house.residency.pin("a")
        await house.advance(1000)
        assert [model.id for model in house.residency.snapshot()] == ["a", "b"]


async def test_a_hold_ends_by_itself_and_counts_as_use() -> None:
    """A bot's lease protects until its time is up; the idle time begins there."""
    async with House(ModelsConfig(ttl_seconds=10)) as house:
        await house.residency.load(A)
        lease_id = house.residency.hold("a", "bot", 60)
        await house.advance(59)
        assert house.shown("a").holds == 1
        await house.advance(1)
        assert house.shown("a").holds == 0
        assert house.residency.drop(lease_id) is False
        await house.advance(9)
        assert house.shown("a").state is ModelState.READY
        await house.advance(1)
        assert house.residency.snapshot() == ()


async def test_a_hold_can_be_dropped() -> None:
    """Dropping a hold ends it, once."""
    async with House() as house:
        await house.residency.load(A)
        lease_id = house.residency.hold("a", "bot", 60)
        assert house.residency.drop(lease_id) is True
        assert house.residency.drop(lease_id) is False
        assert house.shown("a").holds == 0


async def test_a_hold_needs_a_time() -> None:
    """Zero, negative and no-number seconds are refused by name."""
    async with House() as house:
        await house.residency.load(A)
        for seconds in (0.0, -1.0, float("nan")):
            with pytest.raises(InvalidRequest) as caught:
                house.residency.hold("a", "bot", seconds)
            assert caught.value.param == "seconds"


async def test_only_what_stays_can_be_protected() -> None:
    """A model that is absent, or being unloaded, can be neither pinned nor held; unpinning it is harmless."""
    async with House() as house:
        house.residency.unpin("a")
        with pytest.raises(Conflict):
            house.residency.pin("a")
        serving = await house.serve(A)
        unload = house.start(house.residency.unload("a"))
        await house.settle()
        with pytest.raises(Conflict):
            house.residency.hold("a", "bot", 60)
        serving.end()
        await unload
        with pytest.raises(Conflict):
            house.residency.pin("a")


async def test_a_reload_reaches_what_is_loaded_unless_a_caller_has_said_otherwise() -> None:
    """Idle times and pins of the settings follow them; what a request asked for, and a pin by hand, stay."""
    async with House(ModelsConfig(ttl_seconds=100)) as house:
        (await house.serve(A)).end()
        (await house.serve(B, ttl_seconds=50)).end()
        house.residency.pin("b")
        settings = ModelsConfig(ttl_seconds=70, per_model={"a": PerModel(pinned=True)})
        house.residency.reconfigure(settings, auto_evict=True, workers=WorkersConfig())
        assert [(house.shown(id).ttl_seconds, house.shown(id).pinned) for id in "ab"] == [(70, True), (50, True)]
        house.residency.reconfigure(ModelsConfig(ttl_seconds=70), auto_evict=True, workers=WorkersConfig())
        assert [house.shown(id).pinned for id in "ab"] == [False, True]
        await house.advance(70)
        assert [model.id for model in house.residency.snapshot()] == ["b"]
        house.residency.unpin("b")
