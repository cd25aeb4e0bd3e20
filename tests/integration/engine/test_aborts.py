"""Cancellations and failures, at every step: nothing of the request is left, and nobody else notices."""

import gc
from collections.abc import Callable
from typing import Any, TypeAlias

import mlx.core as mx
import pytest

from opta_lmx.inference.worker.kv_books import KvBooks
from opta_lmx.inference.worker.prefix_tree import PrefixTree
from opta_lmx.inference.worker.sampler_rows import Logits
from opta_lmx.inference.worker.sampling import DeviceLaunch, HostLaunch
from opta_lmx.types import FinishReason, LoadOptions
from tests.integration.engine.driver import FAMILIES, Engine, TinyModel, alone
from tests.tiny_models import Family

pytestmark = pytest.mark.mlx

Tiny: TypeAlias = Callable[[Family], TinyModel]
Launch: TypeAlias = type[HostLaunch] | type[DeviceLaunch]

_EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
_BOTH = pytest.mark.parametrize("launch", [HostLaunch, DeviceLaunch])
# The smallest chunks, so that a prompt takes several steps.
_CHUNKED = LoadOptions(prefill_chunk_tokens=16, stall_bound_seconds=1e-9)
_VICTIM, _NEIGHBOUR = 1, 2
# Rows whose next forward is queued before their tokens are known, and rows that wait for theirs.
_AHEAD: dict[str, Any] = {}
_LATE: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "seed": 3}


class Breaks:
    """A processor that cannot go on after ``tokens`` tokens."""

    def __init__(self, tokens: int) -> None:
        self.error: str | None = None
        self._left = tokens

    def prepare(self) -> None:
        """Nothing can be done ahead."""

    def apply(self, row: Logits) -> None:
        """Leaves the row alone."""

    def accept(self, token: int) -> None:
        """Counts down."""
        self._left -= 1
        if self._left == 0:
            self.error = "no way on"


def _ask_both(engine: Engine, *, n: int = 1, **sampling: Any) -> None:
    engine.ask(_VICTIM, engine.tiny.prompt(70), max_tokens=5, n=n, **sampling)
    engine.ask(_NEIGHBOUR, engine.tiny.prompt(40), max_tokens=9, **sampling)


@pytest.mark.parametrize(
    ("family", "sampling"),
    [*((family, _AHEAD) for family in FAMILIES), *((family, _LATE) for family in ("llama", "qwen3_next"))],
)
def test_a_request_may_leave_at_any_step(tiny: Tiny, family: Family, sampling: dict[str, Any]) -> None:
    """Before it starts, in any chunk of its prefill, at any token: it ends at the next step, and leaves nothing behind.

    Once it has ended by itself the cancellation changes nothing.
    """
    model = tiny(family)
    whole = Engine(model, _CHUNKED)
    _ask_both(whole, n=2, **sampling)
    steps = 0
    while whole.scheduler.has_requests():
        whole.step()
        steps += 1
    for at in range(steps):
        engine = Engine(model, _CHUNKED)
        _ask_both(engine, n=2, **sampling)
        engine.steps(at)
        open_before = [engine.answers[_VICTIM, choice].finish is None for choice in (0, 1)]
        engine.cancel(_VICTIM)
        engine.step()
        for choice in (0, 1):
            tokens, _, finish = engine.said(_VICTIM, choice)
            assert (finish is FinishReason.CANCELLED) == open_before[choice]
            assert tokens == whole.said(_VICTIM, choice)[0][: len(tokens)]
        assert str(_VICTIM) not in engine.scheduler.requests
        engine.run().assert_empty()
        expected = alone(model, model.prompt(40), max_tokens=9, **sampling)
        assert engine.said(_NEIGHBOUR) == whole.said(_NEIGHBOUR) == expected


def test_a_request_in_line_may_leave(tiny: Tiny) -> None:
    """Cancelled before its turn, a request never starts, and the line behind it moves up."""
    model = tiny("llama")
    engine = Engine(model, LoadOptions(max_running=1))
    for id in range(3):
        engine.ask(id, model.prompt(10 + id))
    engine.steps(3)
    engine.cancel(1)
    engine.run().assert_empty()
    assert set(engine.started) == {0, 2}
    assert engine.said(1) == ([], "", FinishReason.CANCELLED)
    assert engine.said(2) == alone(model, model.prompt(12))


def test_cancelling_what_is_not_there_does_nothing(tiny: Tiny) -> None:
    """An unknown id, an ended one, and the same one twice."""
    model = tiny("llama")
    engine = Engine(model)
    engine.cancel(99)
    assert engine.scheduler.has_requests()
    engine.run().assert_empty()
    engine.ask(1, model.prompt(10))
    engine.ask(2, model.prompt(11))
    engine.steps(3)
    engine.cancel(1)
    engine.cancel(1)
    engine.run()
    engine.cancel(1)
    engine.cancel(2)
    engine.run().assert_empty()
    assert engine.said(2) == alone(model, model.prompt(11))


def test_an_id_may_be_used_again(tiny: Tiny) -> None:
    """Ended or cancelled, an id is free."""
    model = tiny("llama")
    engine = Engine(model)
    for _ in range(2):
        engine.ask(1, model.prompt(10))
        engine.steps(2)
        engine.cancel(1)
        engine.run().assert_empty()
        engine.started.clear()
    engine.ask(1, model.prompt(10))
    assert engine.run().said(1) == alone(model, model.prompt(10))


def test_everybody_may_leave_at_once(tiny: Tiny) -> None:
    """When the last row goes the batch is empty, and the next request finds it working."""
    model = tiny("qwen3_next")
    engine = Engine(model)
    for id in range(4):
        engine.ask(id, model.prompt(20 + id))
    engine.steps(4)
    for id in range(4):
        engine.cancel(id)
    engine.run().assert_empty()
    engine.ask(9, model.prompt(15))
    assert engine.run().said(9) == alone(model, model.prompt(15))


def test_no_book_grows_with_the_requests_served(tiny: Tiny) -> None:
    """Neither ended nor cancelled requests leave an entry in any set or dict of the scheduler, ours or vllm-mlx's."""
    engine = Engine(tiny("llama"))
    for id in range(6):
        engine.ask(id, engine.tiny.prompt(8), max_tokens=2)
        if id % 2:
            engine.cancel(id)
        engine.run()
    books = {name: value for name, value in vars(engine.scheduler).items() if isinstance(value, set | dict)}
    assert {name: len(book) for name, book in books.items() if book} == {}


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next"])
def test_no_memory_is_left_behind(tiny: Tiny, family: Family) -> None:
    """After ends and cancellations MLX holds as much as before, round after round."""
    model = tiny(family)
    engine = Engine(model, _CHUNKED)

    def round_of_requests(first_id: int) -> int:
        for id in range(first_id, first_id + 6):
            engine.ask(id, model.prompt(200 + id % 6), max_tokens=3 + id % 6, n=1 + id % 2)
        engine.steps(18)
        engine.cancel(first_id + 5)
        engine.cancel(first_id)
        engine.run().assert_empty()
        gc.collect()
        mx.synchronize()
        return mx.get_active_memory()

    first = round_of_requests(0)
    assert round_of_requests(10) <= first + 16_384


@pytest.mark.parametrize("at", [1, 2, 4])
@_BOTH
def test_a_broken_processor_ends_its_own_request_only(tiny: Tiny, launch: Launch, at: int) -> None:
    """The request fails as a whole, with the reason: its other choice leaves too, and its neighbours go on."""
    model = tiny("llama")
    engine = Engine(model, launch=launch)
    engine.ask(_VICTIM, model.prompt(20), processors=[Breaks(at)], n=2)
    engine.ask(_NEIGHBOUR, model.prompt(30))
    engine.run().assert_empty()
    assert engine.failed == {_VICTIM: "no way on"}
    assert engine.said(_NEIGHBOUR) == alone(model, model.prompt(30))


@pytest.mark.parametrize("fail_in", [0, 1, 3, 6])
@_EVERY_FAMILY
def test_an_mlx_failure_ends_what_runs_and_nothing_else(tiny: Tiny, family: Family, fail_in: int) -> None:
    """Out of memory in prefill or decode: who runs fails once, with the reason; who waits, and who comes, is served."""
    model = tiny(family)
    engine = Engine(model, LoadOptions(max_running=2))
    for id in range(3):
        engine.ask(id, model.prompt(10 + id))
    engine.steps(1)
    assert set(engine.started) == {0, 1}
    model.model.fail_in = fail_in
    engine.run().assert_empty()
    assert engine.failed == dict.fromkeys((0, 1), "[metal::malloc] out of memory")
    engine.ask(3, model.prompt(50))
    engine.run().assert_empty()
    assert [engine.said(2), engine.said(3)] == [alone(model, model.prompt(length)) for length in (12, 50)]


def test_an_mlx_failure_gives_back_what_was_granted(tiny: Tiny) -> None:
    """When all that ran has failed, the next request starts from the first sum again, as the server counts."""
    model = tiny("llama")
    base = model.shape.bytes_for(512)
    books = KvBooks(model.shape, base)
    books.grant(4 * base)
    engine = Engine(model, books=books)
    engine.ask(0, model.prompt(10))
    engine.steps(2)
    model.model.fail_in = 0
    engine.run().assert_empty()
    assert set(engine.failed) == {0}
    assert not books.allows(4 * base)


class _FullMemory(PrefixTree):
    """A prefix cache that finds no memory for the first prompt it should keep."""

    def __init__(self) -> None:
        super().__init__(1 << 28)
        self.refusals = 1

    def store(self, tokens: list[int], caches: list[Any]) -> None:
        if self.refusals:
            self.refusals -= 1
            raise RuntimeError("[metal::malloc] out of memory")
        super().store(tokens, caches)


def test_no_memory_to_keep_a_prompt_fails_what_runs_and_no_more(tiny: Tiny) -> None:
    """Keeping a prompt is MLX work like a forward: its failure ends the running requests, the next one is served."""
    model = tiny("llama")
    engine = Engine(model, prefixes=_FullMemory())
    engine.ask(0, model.prompt(30), max_tokens=8, ignore_eos=True)
    engine.run().assert_empty()
    assert "out of memory" in engine.failed[0]
    engine.ask(1, model.prompt(30), max_tokens=8, ignore_eos=True)
    engine.run().assert_empty()
    assert engine.said(1) == alone(model, model.prompt(30), max_tokens=8, ignore_eos=True)
