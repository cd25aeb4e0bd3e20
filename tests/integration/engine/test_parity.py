"""What a request says does not depend on who else is served, on how its prompt was cut, or on how tokens are chosen."""

import copy
from collections.abc import Callable
from typing import Any, TypeAlias

import mlx.core as mx
import pytest
from mlx_lm import stream_generate

from opta_lmx.inference.worker.batch import Caches
from opta_lmx.inference.worker.sampler_rows import Logits
from opta_lmx.inference.worker.sampling import DeviceLaunch, HostLaunch
from opta_lmx.inference.worker.sequence import Sequence
from opta_lmx.types import FinishReason, LoadOptions
from tests.integration.engine.driver import FAMILIES, Engine, TinyModel, alone
from tests.tiny_models import Family

pytestmark = pytest.mark.mlx

Tiny: TypeAlias = Callable[[Family], TinyModel]
Launch: TypeAlias = type[HostLaunch] | type[DeviceLaunch]

_EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
_BOTH = pytest.mark.parametrize("launch", [HostLaunch, DeviceLaunch])
# One token, shorter and longer than the sliding window of 64, longer than a growth step of a cache (256).
_LENGTHS = (5, 300, 17, 64, 1, 130, 33, 200)
# One of each kind of sampling, side by side in one batch.
_MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.7, "top_p": 0.9, "seed": 2},
    {"temperature": 1.3, "top_k": 20, "seed": 3},
    {"temperature": 1.0, "min_p": 0.05, "seed": 4},
    {"temperature": 1.0, "frequency_penalty": 1.5, "presence_penalty": 0.5, "seed": 5},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 1.0, "top_k": 300, "top_p": 0.99, "logit_bias": {7: 3.0}, "seed": 6},
]


class Idle:
    """A processor that changes nothing, but whose batch waits for the tokens before it computes on."""

    error: str | None = None

    def prepare(self) -> None:
        """Nothing can be done ahead."""

    def apply(self, row: Logits) -> None:
        """Leaves the row alone."""

    def accept(self, token: int) -> None:
        """Nothing to learn."""


def _reference(tiny: TinyModel, prompt: list[int], max_tokens: int) -> list[int]:
    """mlx-lm's own greedy tokens."""
    answers = stream_generate(tiny.model, tiny.tokenizer, prompt, max_tokens=max_tokens)
    return [response.token for response in answers]


@_EVERY_FAMILY
def test_together_is_alone_is_mlx_lm(tiny: Tiny, family: Family) -> None:
    """Eight prompts of different lengths decoded together say what each says alone, and what mlx-lm says."""
    model = tiny(family)
    prompts = [model.prompt(length) for length in _LENGTHS]
    engine = Engine(model)
    for id, prompt in enumerate(prompts):
        engine.ask(id, prompt, max_tokens=24)
    engine.run().assert_empty()
    for id, prompt in enumerate(prompts):
        assert engine.said(id) == alone(model, prompt, max_tokens=24)
        assert engine.said(id)[0] == _reference(model, prompt, 24)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mamba2"])
def test_long_answers_stay_right(tiny: Tiny, family: Family) -> None:
    """Past a cache's growth at 256 tokens, several turns of a sliding window of 64, and a hundred recurrent steps."""
    model = tiny(family)
    engine = Engine(model)
    for id, length in enumerate((3, 50)):
        engine.ask(id, model.prompt(length), max_tokens=260, ignore_eos=True)
        engine.steps(20)
    engine.ask(2, model.prompt(90), max_tokens=150, ignore_eos=True)
    engine.run()
    for id, length in enumerate((3, 50, 90)):
        tokens = engine.said(id)[0]
        reference = _reference(model, model.prompt(length), len(tokens))
        assert tokens[: len(reference)] == reference
        assert len(reference) == len(tokens) or reference[-1] in model.stop_ids


@_EVERY_FAMILY
def test_prompts_matter(tiny: Tiny, family: Family) -> None:
    """The tiny models are sensitive: another token inside a prompt gives another answer, so that "same" means much."""
    model = tiny(family)
    prompt = model.prompt(40)
    other = [*prompt[:25], prompt[25] % 500 + 4, *prompt[26:]]
    assert alone(model, prompt)[0] != alone(model, other)[0]


@_EVERY_FAMILY
def test_every_kind_of_sampling_keeps_to_itself(tiny: Tiny, family: Family) -> None:
    """Rows with their own temperature, truncation, penalties and seed say together what they say alone."""
    model = tiny(family)
    engine = Engine(model)
    for id, params in enumerate(_MIXED):
        engine.ask(id, model.prompt(10 + 7 * id), **params)
    engine.run()
    assert [engine.said(id) for id in range(len(_MIXED))] == [
        alone(model, model.prompt(10 + 7 * id), **params) for id, params in enumerate(_MIXED)
    ]


@_EVERY_FAMILY
def test_arrivals_disturb_nobody(tiny: Tiny, family: Family) -> None:
    """Requests that join while others decode, and leave while others go on, say what they say alone."""
    model = tiny(family)
    engine = Engine(model, LoadOptions(max_running=5))
    asked = [(model.prompt(length, seed=1), 4 + 5 * (id % 4)) for id, length in enumerate(_LENGTHS)]
    for id, (prompt, limit) in enumerate(asked):
        engine.ask(id, prompt, max_tokens=limit)
        engine.steps(1 + id % 3 * 2)
    engine.run().assert_empty()
    for id, (prompt, limit) in enumerate(asked):
        assert engine.said(id) == alone(model, prompt, max_tokens=limit)


@_EVERY_FAMILY
def test_chunks_change_nothing(tiny: Tiny, family: Family) -> None:
    """A prompt processed in the smallest chunks, beside others, is the prompt processed as a whole."""
    model = tiny(family)
    engine = Engine(model, LoadOptions(prefill_chunk_tokens=16, stall_bound_seconds=1e-9))
    model.model.shapes.clear()
    for id, length in enumerate((250, 131, 17)):
        engine.ask(id, model.prompt(length))
    engine.run()
    assert max(length for _, length in model.model.shapes) == 16
    for id, length in enumerate((250, 131, 17)):
        assert engine.said(id)[0] == _reference(model, model.prompt(length), 16)


@_EVERY_FAMILY
def test_choices_share_one_prefill(tiny: Tiny, family: Family) -> None:
    """Four choices cost one prefill; choice i is what seed + i says alone, and greedy choices are all the same."""
    model = tiny(family)
    prompt = model.prompt(90)
    engine = Engine(model)
    model.model.shapes.clear()
    engine.ask(0, prompt, n=4, temperature=1.0, seed=11)
    engine.ask(1, prompt[:50], n=3)
    engine.run().assert_empty()
    # Each of the seven may be computed once more in vain: the next forward is queued before a token is looked at.
    assert 0 <= model.model.computed - (89 + 49 + engine.generated) <= 7
    assert [engine.said(0, choice) for choice in range(4)] == [
        alone(model, prompt, temperature=1.0, seed=11 + choice) for choice in range(4)
    ]
    assert [engine.said(1, choice) for choice in range(3)] == [alone(model, prompt[:50])] * 3


@_BOTH
@_EVERY_FAMILY
def test_logprobs_are_those_of_a_whole_forward(tiny: Tiny, family: Family, launch: Launch) -> None:
    """In a batch where not all ask, each token's log-probability is the log-softmax of one forward over everything.

    Largest difference seen over all families: 4e-6 (float32, logits up to 14).
    """
    model = tiny(family)
    engine = Engine(model, launch=launch)
    for id, length in enumerate((30, 100)):
        engine.ask(id, model.prompt(length), logprobs=3)
    engine.ask(2, model.prompt(50))
    engine.run()
    for id, length in enumerate((30, 100)):
        prompt, answer = model.prompt(length), engine.answers[id, 0]
        logits = model.model(mx.array([prompt + answer.tokens[:-1]]), cache=None)[0, len(prompt) - 1 :]
        exact = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        for at, (token, entry) in enumerate(zip(answer.tokens, answer.logprobs, strict=True)):
            best = mx.sort(exact[at])[-3:][::-1].tolist()
            assert entry.logprob == pytest.approx(exact[at, token].item(), abs=2e-5)
            assert [other.logprob for other in entry.top] == pytest.approx(best, abs=2e-5)
            assert (entry.raw, entry.top[0].raw) == (model.table.raw(token),) * 2
    assert engine.answers[2, 0].logprobs == []


def test_a_stop_string_across_tokens_ends_the_text_before_it(tiny: Tiny) -> None:
    """Cut anywhere out of a greedy text, a stop string ends that text where it begins; neighbours go on."""
    model = tiny("llama")
    prompt = model.prompt(30)
    tokens, text, _ = alone(model, prompt, max_tokens=40, ignore_eos=True)
    engine = Engine(model)
    stops = [text[at : at + 5] for at in range(3, 20)]
    for id, stop in enumerate(stops):
        engine.ask(id, prompt, max_tokens=40, ignore_eos=True, stop=(stop,))
    engine.run()
    for id, stop in enumerate(stops):
        assert engine.said(id)[1:] == (text[: text.index(stop)], FinishReason.STOP)
        assert engine.said(id)[0] == tokens[: len(engine.said(id)[0])]


@_BOTH
def test_the_end_of_sequence_is_obeyed_put_off_or_ignored(tiny: Tiny, launch: Launch) -> None:
    """A model that wants to end at once: it does, after min_tokens, never, or at a token of the request's own."""
    model = tiny("llama")
    [end] = model.stop_ids
    ends_at_once: dict[str, Any] = {"logit_bias": {end: 1000.0}, "max_tokens": 9}
    engine = Engine(model, launch=launch)
    engine.ask(0, model.prompt(10), **ends_at_once)
    engine.ask(1, model.prompt(10), **ends_at_once, min_tokens=4)
    engine.ask(2, model.prompt(10), **ends_at_once, ignore_eos=True)
    engine.ask(3, model.prompt(10), max_tokens=9, logit_bias={9: 1000.0}, stop_token_ids=(9,))
    engine.run()
    lengths = [(len(engine.said(id)[0]), engine.said(id)[2]) for id in range(4)]
    stop, length = FinishReason.STOP, FinishReason.LENGTH
    assert lengths == [(1, stop), (5, stop), (9, length), (1, stop)]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next"])
def test_looking_ahead_changes_no_greedy_text(tiny: Tiny, family: Family) -> None:
    """With the next forward queued before the tokens are known: same texts under arrivals, ends and cancellations."""
    model = tiny(family)
    engines = [Engine(model), Engine(model)]
    for engine, processors in zip(engines, ([], [Idle()]), strict=True):
        for id, length in enumerate(_LENGTHS):
            engine.ask(id, model.prompt(length), processors=processors, max_tokens=3 + id * 3, n=1 + id % 2)
            engine.steps(2)
            if id == 5:
                engine.cancel(3)
        engine.run().assert_empty()
    for id in range(len(_LENGTHS)):
        if id != 3:
            assert engines[0].said(id) == engines[1].said(id)
            assert engines[0].said(id) == alone(model, model.prompt(_LENGTHS[id]), max_tokens=3 + id * 3)


@_BOTH
def test_seeds_hold_with_either_way_of_sampling(tiny: Tiny, launch: Launch) -> None:
    """Mixed rows, some with processors that stop the look-ahead while they are there: together as alone."""
    model = tiny("llama")

    def run(ids: list[int]) -> Engine:
        engine = Engine(model, launch=launch)
        for id in ids:
            engine.ask(id, model.prompt(20 + id), max_tokens=6 + 2 * id, **_MIXED[id])
            engine.steps(1)
        return engine.run()

    together = run(list(range(len(_MIXED))))
    assert [together.said(id) for id in range(len(_MIXED))] == [run([id]).said(id) for id in range(len(_MIXED))]


@_BOTH
def test_nothing_is_computed_for_a_row_that_is_known_to_end(tiny: Tiny, launch: Launch) -> None:
    """Of answers that end at their last allowed token, while others join and go on, every token is computed once."""
    model = tiny("llama")
    engine = Engine(model, LoadOptions(prefill_chunk_tokens=512), launch=launch)
    for id, tokens in ((0, 3), (1, 7)):
        engine.ask(id, model.prompt(5), max_tokens=tokens, ignore_eos=True)
    engine.steps(2)
    engine.ask(2, model.prompt(5, seed=1), max_tokens=5, ignore_eos=True)
    model.model.shapes.clear()
    engine.run()
    decoded = sum(rows for rows, length in model.model.shapes if length == 1)
    # Three forwards of the first two are built in two steps.
    assert decoded == (3 + 7 - 3 * 2) + 5


@_BOTH
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next"])
def test_an_ended_row_leaves_a_cache_of_exactly_what_was_fed(tiny: Tiny, family: Family, launch: Launch) -> None:
    """Whoever goes on from the cache of a row that ended computes what a model that read those tokens computes."""
    model = tiny(family)
    ended: dict[int, tuple[list[int], Any]] = {}

    def keep(sequence: Sequence, fed: int, caches: Caches) -> None:
        ended[sequence.request.id] = (sequence.request.token_ids + sequence.tokens[:fed], copy.deepcopy(caches))

    engine = Engine(model, launch=launch, on_end=keep)
    for id, length in enumerate((70, 20, 9)):
        engine.ask(id, model.prompt(length), max_tokens=4 + 3 * id)
        engine.steps(id)
    engine.run()
    for id, (tokens, caches) in ended.items():
        assert len(tokens) - len(model.prompt((70, 20, 9)[id])) in (
            len(engine.said(id)[0]),
            len(engine.said(id)[0]) - 1,
        )
        went_on = model.model(mx.array([[7]]), cache=caches)[0, -1]
        afresh = model.model(mx.array([[*tokens, 7]]), cache=None)[0, -1]
        assert mx.allclose(went_on, afresh, atol=1e-3)
    assert set(ended) == {0, 1, 2}
