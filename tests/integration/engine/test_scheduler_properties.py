"""Random traffic: whatever arrives, leaves or lacks memory, every request gets its own answer and nothing is left."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opta_lmx.inference.worker.kv_books import KvBooks
from opta_lmx.inference.worker.sampling import DeviceLaunch, HostLaunch
from opta_lmx.types import FinishReason, LoadOptions
from tests.integration.engine.driver import Engine, TinyModel, alone
from tests.tiny_models import Family

pytestmark = pytest.mark.mlx

Tiny: TypeAlias = Callable[[Family], TinyModel]
Launch: TypeAlias = type[HostLaunch] | type[DeviceLaunch]

_BOTH = pytest.mark.parametrize("launch", [HostLaunch, DeviceLaunch])
# One family of each kind of cache: plain, sliding window, recurrent beside plain.
_FAMILIES: tuple[Family, ...] = ("llama", "gemma3_text", "qwen3_next")
# The longest needs room for more than 256 tokens once it has said a few, which is when a joint cache grows.
_LENGTHS = (1, 30, 90, 189)
_PARAMS: list[dict[str, Any]] = [
    {"max_tokens": 3},
    {"max_tokens": 7, "temperature": 1.0, "seed": 3},
    {"max_tokens": 5, "temperature": 0.8, "top_p": 0.9, "frequency_penalty": 0.5, "seed": 9},
]
# A few examples of many requests each: a step costs a millisecond and more.
_FEW = settings(max_examples=12)


@dataclass(frozen=True, slots=True)
class Visit:
    """A request, the steps taken before it arrives, and the steps after which it is cancelled."""

    pause: int
    length: int
    seed: int
    params: int
    n: int
    patience: int | None

    def prompt(self, tiny: TinyModel) -> list[int]:
        """Prompts of one seed begin alike."""
        return tiny.prompt(_LENGTHS[-1], self.seed)[: _LENGTHS[self.length]]

    def expected(self, tiny: TinyModel, choice: int) -> tuple[list[int], str, FinishReason | None]:
        """What a choice says alone."""
        params = dict(_PARAMS[self.params])
        if "seed" in params:
            params["seed"] += choice
        return alone(tiny, self.prompt(tiny), **params)


_VISITS = st.lists(
    st.builds(
        Visit,
        pause=st.integers(0, 3),
        length=st.integers(0, len(_LENGTHS) - 1),
        seed=st.integers(0, 1),
        params=st.integers(0, len(_PARAMS) - 1),
        n=st.sampled_from([1, 1, 1, 3]),
        patience=st.none() | st.integers(0, 10),
    ),
    min_size=1,
    max_size=7,
)


class Traffic:
    """Plays visits to an engine. A server that was asked for KV memory answers a few steps later, up to its limit."""

    def __init__(self, engine: Engine, visits: list[Visit], *, limit_bytes: int = 0) -> None:
        self.engine = engine
        self.visits = visits
        self._limit_bytes = limit_bytes
        self._leaving: dict[int, int] = {}
        self._answer_in: int | None = None

    def play(self) -> None:
        """Everybody arrives, and everything ends."""
        for id, visit in enumerate(self.visits):
            for _ in range(visit.pause):
                self._step()
            params = _PARAMS[visit.params]
            prompt = visit.prompt(self.engine.tiny)
            self.engine.ask(id, prompt, boundaries=[20, len(prompt) - 1], n=visit.n, **params)
            if visit.patience is not None:
                self._leaving[id] = visit.patience
        for _ in range(3000):
            if not self._step():
                return
        pytest.fail("the traffic never ended")

    def _step(self) -> bool:
        for id, left in list(self._leaving.items()):
            self._leaving[id] = left - 1
            if left == 0:
                del self._leaving[id]
                self.engine.cancel(id)
        self._serve()
        if self.engine.scheduler.has_requests():
            self.engine.step()
        unanswered = bool(self.engine.wanted) or self._answer_in is not None
        return unanswered or bool(self._leaving) or self.engine.scheduler.has_requests()

    def _serve(self) -> None:
        if self.engine.wanted and self._answer_in is None:
            self._answer_in = 2
        elif self._answer_in is not None:
            self._answer_in -= 1
            if self._answer_in == 0:
                self._answer_in = None
                wanted = self.engine.wanted[-1]
                self.engine.wanted.clear()
                self.engine.scheduler.grant_kv(min(wanted, self._limit_bytes))

    def check(self) -> None:
        """Nothing is left, and everybody was answered as if alone, or cancelled, or refused for want of memory."""
        self.engine.assert_empty()
        assert self.engine.failed == {}
        for id, visit in enumerate(self.visits):
            for choice in range(visit.n):
                tokens, text, finish = self.engine.said(id, choice)
                whole = visit.expected(self.engine.tiny, choice)
                if id in self.engine.refused:
                    assert (tokens, finish) == ([], None)
                elif finish is FinishReason.CANCELLED:
                    assert visit.patience is not None
                    assert tokens == whole[0][: len(tokens)]
                else:
                    assert (tokens, text, finish) == whole


_SMALL_CHUNKS = LoadOptions(max_running=4, prefill_chunk_tokens=16, stall_bound_seconds=1e-9)


@pytest.mark.parametrize("family", _FAMILIES)
@_FEW
@given(visits=_VISITS, budget_tokens=st.sampled_from([None, 120, 100_000]))
def test_everybody_is_answered_as_if_alone(
    tiny: Tiny, family: Family, visits: list[Visit], budget_tokens: int | None
) -> None:
    """Arrivals, cancellations, choices and a prefix cache of any size: each request's tokens are its own."""
    model = tiny(family)
    budget = None if budget_tokens is None else model.shape.bytes_for(budget_tokens)
    prefixes = None if budget is None else model.new_prefix_cache(budget)
    traffic = Traffic(Engine(model, _SMALL_CHUNKS, prefixes=prefixes), visits)
    traffic.play()
    traffic.check()
    assert traffic.engine.refused == {}


@pytest.mark.parametrize("family", _FAMILIES)
@_FEW
@given(visits=_VISITS)
def test_looking_ahead_answers_everybody_as_if_alone(tiny: Tiny, family: Family, visits: list[Visit]) -> None:
    """The same with tokens chosen on the device, for requests that sample alike (greedy)."""
    greedy = [Visit(visit.pause, visit.length, visit.seed, 0, visit.n, visit.patience) for visit in visits]
    traffic = Traffic(Engine(tiny(family), _SMALL_CHUNKS, launch=DeviceLaunch), greedy)
    traffic.play()
    traffic.check()


@pytest.mark.parametrize("family", _FAMILIES)
@_FEW
@given(visits=_VISITS, start=st.integers(0, 3), limit=st.integers(0, 6))
def test_want_of_memory_delays_and_refuses_but_changes_nothing(
    tiny: Tiny, family: Family, visits: list[Visit], start: int, limit: int
) -> None:
    """With a KV budget, and a server that grants late and little, requests wait, pause or are refused: never wrong."""
    model = tiny(family)
    one = model.shape.bytes_for(256)
    books = KvBooks(model.shape, start * one)
    traffic = Traffic(Engine(model, _SMALL_CHUNKS, books=books), visits, limit_bytes=max(start, limit) * one)
    traffic.play()
    traffic.check()


@_BOTH
@pytest.mark.parametrize("family", _FAMILIES)
@pytest.mark.parametrize("leaves", [False, True], ids=["resumed", "cancelled"])
def test_a_paused_sequence_goes_on_where_it_was(tiny: Tiny, family: Family, leaves: bool, launch: Launch) -> None:
    """Out of granted memory, the newest sequence is paused and its cache is dropped; resumed, it says what it would.

    Cancelled while it is paused, it leaves nothing behind.
    """
    model = tiny(family)
    books = KvBooks(model.shape, 0)
    books.grant(books.need(2, 256))
    engine = Engine(model, books=books, launch=launch)
    # Let in with 64 tokens of room, they use up the 256 that are granted after 67.
    params: dict[str, Any] = {"max_tokens": 80, "temperature": 1.0, "seed": 5, "ignore_eos": True}
    for id in range(2):
        engine.ask(id, model.prompt(189, seed=id), logprobs=0, **params)
    while len(engine.started) < 2 or not engine.scheduler.depths()[1]:
        engine.step()
        if engine.wanted:
            engine.wanted.clear()
            engine.scheduler.grant_kv(books.need(2, 256))
    if leaves:
        engine.cancel(1)
    else:
        engine.scheduler.grant_kv(books.need(2, 512))
    engine.run().assert_empty()
    expected = [alone(model, model.prompt(189, seed=id), launch, **params) for id in range(2)]
    assert engine.said(0) == expected[0]
    if leaves:
        assert engine.said(1)[2] is FinishReason.CANCELLED
    else:
        assert engine.said(1) == expected[1]
        assert len(engine.answers[1, 0].logprobs) == len(expected[1][0])


def test_nobody_is_paused_before_the_server_could_answer(tiny: Tiny) -> None:
    """Memory is asked for well before it is used up: answered with more a few steps later, nobody has stopped."""
    model = tiny("llama")
    books = KvBooks(model.shape, 0)
    books.grant(books.need(2, 256))
    engine = Engine(model, books=books)
    for id in range(2):
        engine.ask(id, model.prompt(180, seed=id), max_tokens=40, ignore_eos=True)
    while not engine.wanted:
        engine.step()
    for _ in range(5):
        engine.step()
        assert engine.scheduler.depths() == (2, 0)
    engine.scheduler.grant_kv(engine.wanted[-1])
    engine.run().assert_empty()
    for id in range(2):
        assert engine.said(id) == alone(model, model.prompt(180, seed=id), max_tokens=40, ignore_eos=True)


def test_requests_start_in_order_of_arrival(tiny: Tiny) -> None:
    """Without a prefix to wait for, nobody is overtaken at the door."""
    model = tiny("llama")
    engine = Engine(model, LoadOptions(max_running=3))
    for id in range(8):
        engine.ask(id, model.prompt(5 + 20 * (id % 3)), n=1 + id % 2, max_tokens=3)
    engine.run()
    assert list(engine.started) == list(range(8))


def test_more_choices_than_places_run_alone(tiny: Tiny) -> None:
    """A request with more choices than the batch may hold is served when nobody else is."""
    model = tiny("llama")
    engine = Engine(model, LoadOptions(max_running=2))
    engine.ask(0, model.prompt(5), max_tokens=4)
    engine.ask(1, model.prompt(6), n=5, max_tokens=4)
    engine.ask(2, model.prompt(7), max_tokens=4)
    engine.run().assert_empty()
    assert [engine.said(1, choice) for choice in range(5)] == [alone(model, model.prompt(6), max_tokens=4)] * 5


def test_decoding_goes_on_while_a_long_prompt_arrives(tiny: Tiny) -> None:
    """Every step of a long prefill also makes a token for each running sequence."""
    model = tiny("llama")
    engine = Engine(model, _SMALL_CHUNKS)
    engine.ask(0, model.prompt(5), max_tokens=40, ignore_eos=True)
    engine.steps(2)
    engine.ask(1, model.prompt(300), max_tokens=2)
    for _ in range(15):
        before = len(engine.answers[0, 0].tokens)
        engine.step()
        assert len(engine.answers[0, 0].tokens) == before + 1
    assert engine.answers[1, 0].tokens == []


def test_a_short_request_passes_two_long_prefills(tiny: Tiny) -> None:
    """Behind two long prompts a short one has its first token within three steps: at most two chunks and a forward."""
    model = tiny("llama")
    engine = Engine(model, LoadOptions(prefill_chunk_tokens=64))
    for id in range(2):
        engine.ask(id, model.prompt(2000, seed=id), max_tokens=1)
    engine.steps(3)
    engine.ask(2, model.prompt(20), max_tokens=5)
    engine.steps(3)
    assert engine.answers[2, 0].tokens


def test_whoever_needs_memory_asks_before_the_next_chunk(tiny: Tiny) -> None:
    """The step that asks computes nothing, so that the answer can let them in; the one after it waits no longer."""
    model = tiny("llama")
    for answered in (True, False):
        one = KvBooks(model.shape, None).need(1, 512)
        books = KvBooks(model.shape, one)
        engine = Engine(model, LoadOptions(prefill_chunk_tokens=64), books=books)
        engine.ask(1, model.prompt(400), max_tokens=4, ignore_eos=True)
        engine.step()
        engine.ask(2, model.prompt(20), max_tokens=4, ignore_eos=True)
        model.model.shapes.clear()
        assert engine.step().asks_first
        assert (model.model.computed, len(engine.wanted)) == (0, 1)
        if answered:
            engine.scheduler.grant_kv(engine.wanted[0])
        result = engine.step()
        assert not result.asks_first
        assert model.model.computed > 0
        assert [started.id for started in result.started] == ([2] if answered else [])
        engine.scheduler.grant_kv(2 * one)
        engine.run().assert_empty()
        assert engine.said(2) == alone(model, model.prompt(20), max_tokens=4, ignore_eos=True)
