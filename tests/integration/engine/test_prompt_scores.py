"""The scores of a prompt's own tokens are those of one forward over all of it, whatever else the engine does."""

from collections.abc import Callable
from typing import TypeAlias

import mlx.core as mx
import pytest

from opta_lmx.types import FinishReason, LoadOptions, TokenLogprob
from tests.integration.engine.driver import FAMILIES, Engine, TinyModel, alone
from tests.tiny_models import Family

pytestmark = pytest.mark.mlx

Tiny: TypeAlias = Callable[[Family], TinyModel]


def check(tiny: TinyModel, tokens: list[int], scores: list[TokenLogprob], top: int) -> None:
    """Every token in its place, with the score and the likeliest alternatives of one forward over the whole prompt."""
    first, *others = scores
    assert [entry.raw for entry in scores] == [tiny.table.raw(token) for token in tokens]
    assert (first.logprob, first.top) == (0.0, [])
    logits = tiny.model(mx.array([tokens]), cache=None)[0]
    exact = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    for row, token, entry in zip(exact, tokens[1:], others, strict=False):
        best = mx.sort(row)[::-1][:top].tolist()
        assert entry.logprob == pytest.approx(row[token].item(), abs=2e-5)
        assert [other.logprob for other in entry.top] == pytest.approx(best, abs=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [7, 64, 512])
def test_scores_are_those_of_a_whole_forward(tiny: Tiny, family: Family, chunk: int) -> None:
    """In any chunks, beside a request that decodes, and the answer after them is the one it would be without."""
    model = tiny(family)
    prompt = model.prompt(150)
    engine = Engine(model, LoadOptions(prefill_chunk_tokens=chunk))
    engine.ask(1, model.prompt(9), max_tokens=30, ignore_eos=True)
    engine.steps(3)
    engine.ask(2, prompt, prompt_logprobs=3, logprobs=0, max_tokens=4, ignore_eos=True)
    engine.run().assert_empty()
    answer = engine.answers[2, 0]
    check(model, prompt, answer.logprobs[: len(prompt)], 3)
    assert len(answer.logprobs) == len(prompt) + 4
    assert engine.said(2) == alone(model, prompt, max_tokens=4, ignore_eos=True)
    assert engine.said(1) == alone(model, model.prompt(9), max_tokens=30, ignore_eos=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_known_prefix_is_scored_all_the_same(tiny: Tiny, family: Family) -> None:
    """Scored prompts take nothing from the prefix cache and say so, and leave it what they computed."""
    model = tiny(family)
    prompt = model.prompt(120)
    engine = Engine(model, prefixes=model.new_prefix_cache())
    for id in (1, 2):
        engine.ask(id, prompt, boundaries=(60,), prompt_logprobs=0, max_tokens=0)
    engine.run()
    for id in (1, 2):
        check(model, prompt, engine.answers[id, 0].logprobs, 0)
        assert (engine.started[id].hit_tokens, engine.started[id].cause) == (0, "scored")
    engine.ask(3, prompt, boundaries=(60,), max_tokens=4, ignore_eos=True)
    engine.run().assert_empty()
    assert engine.started[3].hit_tokens >= 60
    assert engine.said(3) == alone(model, prompt, max_tokens=4, ignore_eos=True)


def test_a_prompt_alone_makes_no_token(tiny: Tiny) -> None:
    """With ``max_tokens`` 0 every choice ends with the prompt, of one token too, and no forward of a batch is run."""
    model = tiny("llama")
    for length in (1, 2, 40):
        prompt = model.prompt(length)
        engine = Engine(model)
        model.model.shapes.clear()
        engine.ask(1, prompt, max_tokens=0, prompt_logprobs=1, n=3)
        engine.run().assert_empty()
        assert model.model.computed == length - 1
        for choice in range(3):
            answer = engine.answers[1, choice]
            assert (answer.tokens, answer.text, answer.counted) == ([], "", 0)
            assert answer.finish is FinishReason.LENGTH
            check(model, prompt, answer.logprobs, 1)


def test_a_cancelled_scoring_leaves_nothing(tiny: Tiny) -> None:
    """At any step of its prefill, and others do not notice."""
    model = tiny("llama")
    for steps in range(1, 6):
        engine = Engine(model, LoadOptions(prefill_chunk_tokens=32))
        engine.ask(1, model.prompt(9), max_tokens=12, ignore_eos=True)
        engine.ask(2, model.prompt(150), prompt_logprobs=2, max_tokens=3)
        engine.steps(steps)
        engine.cancel(2)
        engine.run().assert_empty()
        assert engine.answers[2, 0].finish is FinishReason.CANCELLED
        assert engine.said(1) == alone(model, model.prompt(9), max_tokens=12, ignore_eos=True)


def test_the_prompts_text_can_come_first(tiny: Tiny) -> None:
    """Of every choice, and stop strings look at the answer alone."""
    model = tiny("llama")
    prompt = model.prompt(20)
    text = model.table.literal(prompt)
    engine = Engine(model)
    engine.ask(1, prompt, echo_tokens=True, max_tokens=5, ignore_eos=True, n=2, stop=(text[:4],))
    engine.run()
    _, said, _ = alone(model, prompt, max_tokens=5, ignore_eos=True, stop=(text[:4],))
    assert [engine.answers[1, choice].text for choice in range(2)] == [text + said] * 2
