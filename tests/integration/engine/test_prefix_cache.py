"""The prefix cache saves work and changes nothing: with it every text is the text without it, in every family."""

import random
from collections.abc import Callable
from typing import TypeAlias

import pytest

from opta_lmx.types import FinishReason, LoadOptions
from tests.integration.engine.driver import FAMILIES, Engine, TinyModel, alone
from tests.tiny_models import Family

pytestmark = pytest.mark.mlx

Tiny: TypeAlias = Callable[[Family], TinyModel]

_EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
_SYSTEM, _QUESTION, _OPENING = 150, 40, 3  # tokens of a system prompt, of a question, and of the answer's opening
_ANSWER = 12


class Chat:
    """An engine with a prefix cache, asked one prompt after another."""

    def __init__(self, tiny: TinyModel) -> None:
        self.tiny = tiny
        self.engine = Engine(tiny, prefixes=tiny.new_prefix_cache())
        self._next_id = 0

    def ask(self, prompt: list[int], *boundaries: int) -> tuple[int, str]:
        """Hit and cause, once the answer was seen to be the one without a cache and only the rest was computed."""
        id, self._next_id = self._next_id, self._next_id + 1
        self.tiny.model.shapes.clear()
        self.engine.ask(id, prompt, boundaries=boundaries, max_tokens=_ANSWER)
        self.engine.run()
        report = self.engine.started[id]
        needed = len(prompt) - 1 - report.hit_tokens + len(self.answer())
        # That the length is reached is known ahead; the forward after a stop token is queued before it is seen.
        in_vain = 1 if self.engine.said(id)[2] is FinishReason.STOP else 0
        assert self.tiny.model.computed == needed + in_vain
        assert report.miss_at == report.hit_tokens
        assert self.engine.said(id) == alone(self.tiny, prompt, max_tokens=_ANSWER)
        return report.hit_tokens, report.cause

    def answer(self) -> list[int]:
        """The tokens of the last answer."""
        return self.engine.said(self._next_id - 1)[0]


@_EVERY_FAMILY
def test_a_conversation_reuses_what_was_said(tiny: Tiny, family: Family) -> None:
    """Regenerated, continued and asked anew: the hit is exact to the token, and the text is the one without a cache.

    Plain caches are reused up to where prompts part, others up to the last place both prompts name.
    """
    model = tiny(family)
    plain = model.shape.plain
    chat = Chat(model)
    system, opening = model.prompt(_SYSTEM), model.prompt(_OPENING)
    turn = system + model.prompt(_QUESTION, seed=1) + opening
    history = _SYSTEM + _QUESTION
    assert chat.ask(turn, _SYSTEM, history) == (0, "first_seen")
    said = chat.answer()
    assert chat.ask(turn, _SYSTEM, history) == ((len(turn) - 1, "none") if plain else (history, "diverged"))

    # The next turn begins with this one and its answer, of which the last token was not fed.
    second = turn + said + model.prompt(_QUESTION, seed=2) + opening
    hit, _ = chat.ask(second, _SYSTEM, len(second) - _OPENING)
    assert hit == len(turn) + len(said) - 1

    # A template that writes the opening otherwise once it is history parts from the first turn before the answer.
    third = turn[:history] + model.prompt(30, seed=3) + opening
    assert chat.ask(third, _SYSTEM, len(third) - _OPENING)[0] == history

    other = system + model.prompt(_QUESTION, seed=4) + opening
    assert chat.ask(other, _SYSTEM, history) == (_SYSTEM, "diverged")


@_EVERY_FAMILY
def test_a_prompt_that_parts_midway_reuses_what_it_can(tiny: Tiny, family: Family) -> None:
    """Parting inside a known prompt: plain caches serve up to there, others nothing that they cannot cut."""
    model = tiny(family)
    chat = Chat(model)
    known = model.prompt(_SYSTEM)
    chat.ask(known, 100)
    parted = known[:120] + model.prompt(60, seed=5)
    assert chat.ask(parted, 110)[0] == (120 if model.shape.plain else 100)
    shorter = known[:70]
    assert chat.ask(shorter, 60)[0] == (69 if model.shape.plain else 0)


@_EVERY_FAMILY
def test_cold_requests_share_one_prefill(tiny: Tiny, family: Family) -> None:
    """Eight requests arrive at once with one long system prompt: it is computed once, and nobody says anything else."""
    model = tiny(family)
    engine = Engine(model, LoadOptions(prefill_chunk_tokens=64), prefixes=model.new_prefix_cache())
    system = model.prompt(_SYSTEM, seed=6)
    prompts = [system + model.prompt(10 + 3 * id, seed=7) for id in range(8)]
    model.model.shapes.clear()
    for id, prompt in enumerate(prompts):
        engine.ask(id, prompt, boundaries=[_SYSTEM, len(prompt) - 3], max_tokens=6)
    engine.run().assert_empty()
    assert [engine.started[id].hit_tokens for id in range(8)] == [0] + [_SYSTEM] * 7
    prefilled = model.model.computed - engine.generated
    # Plain models' own parts share forwards, padded to at most twice the shortest; a row that ends before the others
    # is in one more forward than it needs.
    own = sum(len(prompt) - _SYSTEM - 1 for prompt in prompts)
    assert _SYSTEM + own <= prefilled <= _SYSTEM + len(prompts) + (2 * own if model.shape.plain else own)
    assert [engine.said(id) for id in range(8)] == [alone(model, prompt, max_tokens=6) for prompt in prompts]


@_EVERY_FAMILY
def test_followers_go_on_when_their_leader_leaves(tiny: Tiny, family: Family) -> None:
    """Cancelled in the middle of the prefill others wait for, a request takes nobody with it."""
    model = tiny(family)
    engine = Engine(model, LoadOptions(prefill_chunk_tokens=32), prefixes=model.new_prefix_cache())
    system = model.prompt(_SYSTEM, seed=8)
    prompts = [system + model.prompt(10 + id, seed=9) for id in range(3)]
    for id, prompt in enumerate(prompts):
        engine.ask(id, prompt, boundaries=[_SYSTEM], max_tokens=4)
    engine.steps(2)
    engine.cancel(0)
    engine.run().assert_empty()
    assert [engine.said(id) for id in (1, 2)] == [alone(model, prompts[id], max_tokens=4) for id in (1, 2)]
    assert engine.started[2].hit_tokens == _SYSTEM


@_EVERY_FAMILY
def test_choices_of_a_cached_prompt_say_what_they_say(tiny: Tiny, family: Family) -> None:
    """Several choices on a prefix from the cache decode on their own copies of it."""
    model = tiny(family)
    chat = Chat(model)
    prompt = model.prompt(80, seed=10)
    chat.ask(prompt, 70)
    chat.engine.ask(100, prompt, boundaries=[70], n=3, temperature=1.0, seed=5)
    chat.engine.run()
    assert [chat.engine.said(100, choice) for choice in range(3)] == [
        alone(model, prompt, temperature=1.0, seed=5 + choice) for choice in range(3)
    ]
    assert chat.ask(prompt, 70)[0] == (79 if model.shape.plain else 70)


@_EVERY_FAMILY
def test_a_small_budget_is_kept_and_never_wrong(tiny: Tiny, family: Family) -> None:
    """Under constant eviction, with overlapping prompts at once, every text is right and no byte is over."""
    model = tiny(family)
    rng = random.Random(0)
    budget = model.shape.bytes_for(150) if model.shape.plain else 3 * model.shape.bytes_for(256)
    engine = Engine(model, LoadOptions(prefill_chunk_tokens=64), prefixes=model.new_prefix_cache(budget))
    bases = [model.prompt(100, seed=seed) for seed in (11, 12, 13)]
    asked: dict[int, list[int]] = {}
    for id in range(24):
        cut = rng.randrange(20, 100)
        asked[id] = rng.choice(bases)[:cut] + model.prompt(rng.randrange(2, 6), seed=rng.randrange(14, 17))
        engine.ask(id, asked[id], boundaries=[20, cut], max_tokens=3)
        engine.steps(rng.randrange(4))
    engine.run().assert_empty()
    assert any(report.hit_tokens for report in engine.started.values())
    assert "evicted" in {report.cause for report in engine.started.values()}
    for id, prompt in asked.items():
        assert engine.said(id) == alone(model, prompt, max_tokens=3)


def test_without_a_cache_every_request_says_so(tiny: Tiny) -> None:
    """With the cache off a report claims nothing."""
    model = tiny("llama")
    engine = Engine(model)
    engine.ask(0, model.prompt(20))
    report = engine.run().started[0]
    assert (report.hit_tokens, report.miss_at, report.cause) == (0, 0, "off")


def test_a_reload_is_told_as_the_cause(tiny: Tiny) -> None:
    """The first miss after a reload is the reload's; once something is kept again, misses have their own causes."""
    model = tiny("llama")
    engine = Engine(model, LoadOptions(reloaded=True), prefixes=model.new_prefix_cache())
    for id, seed in enumerate((1, 2)):
        engine.ask(id, model.prompt(40, seed=seed), max_tokens=2)
        engine.run()
    assert [engine.started[id].cause for id in (0, 1)] == ["model_reloaded", "first_seen"]
