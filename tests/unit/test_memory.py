"""The arithmetic of the cap, and the one place that reads the machine."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opta_lmx.config import MemoryConfig
from opta_lmx.errors import MemoryLimit
from opta_lmx.manager.eviction import Resident
from opta_lmx.manager.memory import (
    SMALL_KV_BYTES,
    WORKER_OVERHEAD_BYTES,
    Bound,
    Ledger,
    LoadNeed,
    MemoryMonitor,
    SystemProbe,
    Verdict,
    fits,
    load_need,
    memory_limit,
    overhead_bytes,
    plan_load,
)
from opta_lmx.manager.metal import MetalFacts
from opta_lmx.types import LoadOptions, MemoryReading, ModelFiles, ModelState
from tests.fake_workers import GIB, Clock, Machine, model_files

MIB = 1024**2


def ledger(*, used: int = 0, reserved: int = 0, limit: int = 90) -> Ledger:
    return Ledger(100, used, reserved, limit, Bound.MAX_MEMORY_PERCENT)


def resident(id: str, memory_bytes: int, state: ModelState = ModelState.READY, leases: int = 0) -> Resident:
    return Resident(id, memory_bytes, 0.0, state, leases, protected=False)


def need(total_bytes: int) -> LoadNeed:
    return LoadNeed(total_bytes, 0, 0)


# -- what a load needs --------------------------------------------------------------------------------


def test_need_is_weights_kv_cache_and_overhead() -> None:
    """Each part is told, the total is their sum, and what stays promised is what fills later."""
    parts = LoadNeed(weights_bytes=1000, kv_bytes=200, overhead_bytes=30, prefix_cache_bytes=4, buffer_bytes=50)
    assert parts.total_bytes == 1284
    assert parts.footprint_bytes == 1030
    assert parts.held_bytes == 254


def test_kv_reserve_is_one_full_sequence_of_a_small_cache() -> None:
    """Layers x heads x head size x K and V x 2 bytes, for every token of the context."""
    files = model_files("a", 10, layers=2, kv_heads=4, head_dim=64, context_length=100)
    assert load_need(files, None, 0.1).kv_bytes == 2 * 4 * 64 * 2 * 2 * 100
    assert load_need(files, 50, 0.1).kv_bytes == 2 * 4 * 64 * 2 * 2 * 50


def test_kv_reserve_is_at_most_its_fraction_of_the_weights() -> None:
    """A context that would cost more than the fraction of the weights does not refuse the model."""
    files = model_files("a", 10, layers=80, kv_heads=8, head_dim=128, context_length=131072)
    assert load_need(files, None, 0.1).kv_bytes == files.weights_bytes // 10


def test_a_small_model_is_not_reserved_less_than_a_prompt_needs() -> None:
    """A tenth of 100 MB would be used up by one chat; what it gets is bounded by one full context all the same."""
    facts = {"layers": 30, "kv_heads": 3, "head_dim": 64, "weights_bytes": 100_000_000}
    assert load_need(model_files("a", 1, context_length=8192, **facts), None, 0.1).kv_bytes == SMALL_KV_BYTES
    assert load_need(model_files("a", 1, context_length=512, **facts), None, 0.1).kv_bytes == 30 * 3 * 64 * 4 * 512


@pytest.mark.parametrize("unknown", ["layers", "kv_heads", "head_dim", "context_length"])
def test_an_unknown_cache_shape_reserves_the_fraction(unknown: str) -> None:
    """Where config.json is silent the fraction of the weights stands in."""
    shape: dict[str, int | None] = {"layers": 2, "kv_heads": 4, "head_dim": 64, "context_length": 100}
    files = model_files("a", 10, **shape | {unknown: None})
    assert load_need(files, None, 0.1).kv_bytes == files.weights_bytes // 10


def test_a_file_whose_tensors_are_not_known_counts_with_its_size() -> None:
    """Where there is a size but no sum of tensors, the need is not without weights."""
    files = model_files("a", weights_bytes=0, size_bytes=98_362_432)
    assert load_need(files, None, 0.0).total_bytes == 98_362_432 + WORKER_OVERHEAD_BYTES


# -- the cap ------------------------------------------------------------------------------------------


def test_the_smaller_bound_is_in_force() -> None:
    """Percentage of the machine or Metal's working set: the answer says which."""
    assert memory_limit(MemoryReading(1000, 0, None, 0.0), 90) == (900, Bound.MAX_MEMORY_PERCENT)
    assert memory_limit(MemoryReading(1000, 0, 750, 0.0), 90) == (750, Bound.WORKING_SET)
    assert memory_limit(MemoryReading(1000, 0, 950, 0.0), 90) == (900, Bound.MAX_MEMORY_PERCENT)


def test_the_percentage_is_exact_whatever_the_size() -> None:
    """The cap is a whole number of bytes, rounded down, with no float in between."""
    total = 2**60 + 1
    assert memory_limit(MemoryReading(total, 0, None, 0.0), 90)[0] == total * 90 // 100


@given(*[st.integers(0, 2**50)] * 4)
def test_fits_is_the_inequality(used: int, reserved: int, size: int, limit: int) -> None:
    """used + reserved + need <= limit, to the byte."""
    reading = MemoryReading(2**50, used, None, 0.0)
    assert fits(reading, reserved, size, limit) == (used + reserved + size <= limit)


# -- the plan -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("residents", "evict", "expected", "victims"),
    [
        pytest.param([resident("a", 40)], True, Verdict.FITS_AFTER_EVICTION, ("a",), id="idle"),
        pytest.param([resident("a", 40)], False, Verdict.DOES_NOT_FIT, (), id="idle but not to be evicted"),
        pytest.param([resident("a", 40, leases=1)], True, Verdict.MUST_WAIT, (), id="busy"),
        pytest.param([resident("a", 40, leases=1)], False, Verdict.DOES_NOT_FIT, (), id="busy, not to be evicted"),
        pytest.param([resident("a", 40, ModelState.LOADING)], False, Verdict.MUST_WAIT, (), id="loading"),
        pytest.param([resident("a", 40, ModelState.STOPPING)], False, Verdict.FITS_AFTER_STOP, (), id="stopping"),
        pytest.param([resident("a", 10)], True, Verdict.DOES_NOT_FIT, (), id="too small"),
        pytest.param(
            [resident("a", 20, ModelState.STOPPING), resident("b", 20)], True, Verdict.FITS_AFTER_EVICTION, ("b",),
            id="stopping and idle together",
        ),
        pytest.param([], True, Verdict.DOES_NOT_FIT, (), id="other programs"),
    ],
)  # fmt: skip
def test_the_verdict_on_a_load_that_does_not_fit(
    residents: list[Resident], evict: bool, expected: Verdict, victims: tuple[str, ...]
) -> None:
    """30 bytes are needed and none is free: what is in memory decides what happens."""
    plan = plan_load("m", need(30), ledger(used=90), residents, evict=evict)
    assert (plan.verdict, plan.would_evict) == (expected, victims)


def test_what_fits_disturbs_nobody() -> None:
    """With room to the byte the verdict is to load, whoever else is idle."""
    plan = plan_load("m", need(30), ledger(used=40, reserved=20), [resident("a", 40)], evict=True)
    assert (plan.verdict, plan.would_evict, plan.headroom_bytes) == (Verdict.FITS, (), 0)


def test_more_than_the_cap_is_never_waited_for() -> None:
    """A model larger than the cap cannot fit, however much leaves."""
    residents = [resident("a", 60, ModelState.LOADING), resident("b", 60, leases=1)]
    assert plan_load("m", need(91), ledger(used=50), residents, evict=True).verdict is Verdict.DOES_NOT_FIT


def test_a_plan_carries_all_its_arithmetic() -> None:
    """Every number of the decision is in the answer, as JSON, and in the error made from it."""
    parts = LoadNeed(weights_bytes=20, kv_bytes=6, overhead_bytes=3, prefix_cache_bytes=1)
    plan = plan_load("m", parts, ledger(used=60, reserved=5), [resident("a", 40)], evict=True)
    shown = json.loads(json.dumps(plan.as_dict()))
    assert shown == {
        "model_id": "m",
        "verdict": "fits_after_eviction",
        "arithmetic": "60 used + 5 reserved + 30 needed > 90 limit",
        "weights_bytes": 20,
        "kv_bytes": 6,
        "overhead_bytes": 3,
        "prefix_cache_bytes": 1,
        "buffer_bytes": 0,
        "need_bytes": 30,
        "total_bytes": 100,
        "used_bytes": 60,
        "reserved_bytes": 5,
        "limit_bytes": 90,
        "bound": "max_memory_percent",
        "free_bytes": 25,
        "headroom_bytes": -5,
        "would_evict": ["a"],
    }
    refusal = plan.refusal()
    assert isinstance(refusal, MemoryLimit)
    assert (refusal.need_bytes, refusal.free_bytes, refusal.plan) == (30, 25, plan.as_dict())


# -- the monitor --------------------------------------------------------------------------------------


def test_a_reading_is_shared_for_a_moment() -> None:
    """Within 0.2 s the same look serves everybody; who must decide looks again."""
    machine = Machine()
    monitor = MemoryMonitor(MemoryConfig(), machine, machine.clock)
    assert monitor.reading().used_bytes == 0
    machine.others_bytes = GIB
    machine.clock.seconds += 0.19
    assert monitor.reading().used_bytes == 0
    assert monitor.reading(0).used_bytes == GIB
    machine.others_bytes = 2 * GIB
    machine.clock.seconds += 0.2
    assert monitor.reading().used_bytes == 2 * GIB


def test_reservations_add_up_and_end() -> None:
    """An owner has one promise at a time; releasing it twice is harmless."""
    machine = Machine()
    monitor = MemoryMonitor(MemoryConfig(max_memory_percent=80), machine, machine.clock)
    monitor.reserve("a", 5)
    monitor.reserve("b", 7)
    monitor.reserve("a", 3)
    assert monitor.reserved_bytes == 10
    assert (monitor.reserved_by("a"), monitor.reserved_by("c")) == (3, 0)
    assert monitor.ledger().free_bytes == monitor.limit_bytes - 10 == 80 * GIB - 10
    monitor.release("a")
    monitor.release("a")
    assert monitor.reserved_bytes == 7


def test_a_negative_reservation_is_a_bug() -> None:
    """Nobody can promise the ledger back what it never gave."""
    monitor = MemoryMonitor(MemoryConfig(), Machine())
    with pytest.raises(ValueError, match="-1"):
        monitor.reserve("a", -1)


def test_caches_grow_as_far_as_the_cap_leaves() -> None:
    """A wish beyond what was set aside is granted as far as the cap leaves room."""
    machine = Machine(others_bytes=50 * GIB)
    monitor = MemoryMonitor(MemoryConfig(), machine, machine.clock)
    monitor.reserve("a", 10 * GIB)
    assert monitor.grow_kv("a", 10 * GIB, 25 * GIB) == 25 * GIB
    assert (monitor.grown_by("a"), monitor.grown_bytes) == (15 * GIB, 15 * GIB)
    assert monitor.grow_kv("a", 10 * GIB, 41 * GIB) == 40 * GIB
    assert monitor.grow_kv("a", 10 * GIB, 50 * GIB) == 40 * GIB
    assert monitor.ledger().free_bytes == 0


def test_growth_is_given_back() -> None:
    """An idle model keeps what its load had set aside; one that has gone keeps nothing."""
    monitor = MemoryMonitor(MemoryConfig(), Machine())
    monitor.reserve("a", 10)
    assert monitor.grow_kv("a", 10, 25) == 25
    assert monitor.grow_kv("a", 10, 12) == 12
    assert monitor.grow_kv("a", 10, None) == 10
    assert monitor.reserved_bytes == 10
    assert monitor.grow_kv("a", 10, 30) == 30
    monitor.release("a")
    assert monitor.reserved_bytes == 0


def test_need_takes_context_fraction_and_prefix_cache_from_the_settings() -> None:
    """The configuration gives the fraction, the load's options the context and the prefix cache."""
    monitor = MemoryMonitor(MemoryConfig(kv_reserve_fraction=0.5), Machine())
    files = model_files("a", 1, layers=1, kv_heads=1, head_dim=1)
    options = LoadOptions(context_length=10, prefix_cache_bytes=77)
    assert monitor.need(files, options) == load_need(files, 10, 0.5, 77)


def test_the_system_probe_reads_this_machine() -> None:
    """Total and used are plausible, the moment is the clock's; without Metal nobody asks what the workers hold."""
    clock = Clock()
    reading = SystemProbe(footprints=lambda: 2**60, now=clock).read()
    assert 0 < reading.used_bytes < reading.total_bytes
    assert (reading.working_set_bytes, reading.at) == (None, clock.seconds)


def test_on_metal_used_is_never_less_than_the_workers_hold() -> None:
    """The GPU's buffers count whether or not the system shows them as used; the working set is the facts'."""
    metal = MetalFacts("Apple M4 Pro", 48 * GIB, 8 * GIB)
    assert SystemProbe(metal, lambda: 2**60).read().used_bytes == 2**60
    reading = SystemProbe(metal, lambda: 1).read()
    assert reading.used_bytes > 1
    assert reading.working_set_bytes == 8 * GIB


# -- the bounds of a worker -----------------------------------------------------------------------------


def test_a_worker_is_bounded_by_its_need() -> None:
    """MLX gets all of the need but the process; of that the buffers are for reuse, and the rest is wired on Metal."""
    parts = LoadNeed(weights_bytes=1000, kv_bytes=200, overhead_bytes=30, prefix_cache_bytes=4, buffer_bytes=50)
    options = parts.limit_worker(LoadOptions(max_running=3))
    assert (options.max_running, options.kv_bytes) == (3, 200)
    assert (options.memory_limit_bytes, options.cache_limit_bytes, options.wired_limit_bytes) == (1254, 50, None)
    assert parts.limit_worker(LoadOptions(), 5000).wired_limit_bytes == 1204
    assert parts.limit_worker(LoadOptions(), 700).wired_limit_bytes == 700


@given(
    parts=st.lists(st.tuples(*[st.integers(0, 2**40)] * 5), max_size=8),
    working_set=st.none() | st.integers(0, 2**42),
)
def test_workers_bounds_together_are_under_what_they_need(
    parts: list[tuple[int, ...]], working_set: int | None
) -> None:
    """Whatever fits under the cap together is bounded by MLX to less than that together."""
    needs = [LoadNeed(*part) for part in parts]
    options = [need.limit_worker(LoadOptions(), working_set) for need in needs]
    assert sum(o.memory_limit_bytes or 0 for o in options) <= sum(need.total_bytes for need in needs)
    assert all((o.cache_limit_bytes or 0) <= (o.memory_limit_bytes or 0) for o in options)
    assert all(o.wired_limit_bytes is None or o.wired_limit_bytes <= (o.memory_limit_bytes or 0) for o in options)


# -- overhead and buffers -------------------------------------------------------------------------------


def test_a_tokenizer_counts_by_its_vocabulary() -> None:
    """A text model's entry costs more than an encoder's, which has no merges."""
    text = overhead_bytes(model_files("a", vocab_size=50_000)) - overhead_bytes(model_files("a"))
    encoder = overhead_bytes(model_files("a", model_type="bert", vocab_size=50_000)) - WORKER_OVERHEAD_BYTES
    assert 30 * MIB < text < 50 * MIB
    assert 0 < encoder < 10 * MIB


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param(model_files("a", 40, echo=None), 512 * MIB, id="large"),
        pytest.param(model_files("a", 0.5, echo=None), GIB // 2 - WORKER_OVERHEAD_BYTES, id="as large as the model"),
        pytest.param(model_files("a", 0.1, echo=None), 64 * MIB, id="small"),
        pytest.param(model_files("a", 40, echo=None, model_type="bert"), 64 * MIB, id="encoder"),
        pytest.param(model_files("a", 40), 0, id="without MLX"),
    ],
)
def test_buffers_are_bounded_by_the_models_size(files: ModelFiles, expected: int) -> None:
    """As much as the weights, within 64 and 512 MB; an encoder needs little, an echo model none."""
    assert load_need(files, None, 0.0).buffer_bytes == expected
