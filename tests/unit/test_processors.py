"""Logits processors against their formulas, worked out by hand."""

import math

import numpy as np
import pytest

from opta_lmx.inference.worker.processors import LogitBias, MinTokens, Penalties, processors_for
from opta_lmx.inference.worker.sampler_rows import Logits, LogitsProcessor
from opta_lmx.types import SamplingParams

pytestmark = pytest.mark.mlx

_ROW = [2.0, -1.0, 0.5, 0.0]


def _after(processor: LogitsProcessor, *answer: int) -> list[float]:
    """The row once the processor has learnt the tokens of an answer and been applied."""
    row: Logits = np.array(_ROW, dtype=np.float32)
    for token in answer:
        processor.accept(token)
    processor.prepare()
    processor.apply(row)
    values: list[float] = row.tolist()
    return values


def test_a_bias_is_added_to_its_tokens_only() -> None:
    """logit + bias for each named token."""
    assert _after(LogitBias({0: -100.0, 3: 1.5})) == [-98.0, -1.0, 0.5, 1.5]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ((), _ROW),
        # one token once: logit - 0.5 * 1 - 0.25
        ((2,), [2.0, -1.0, -0.25, 0.0]),
        # token 0 twice: 2 - 0.5 * 2 - 0.25; token 1 once: -1 - 0.75
        ((0, 1, 0), [0.75, -1.75, 0.5, 0.0]),
    ],
)
def test_frequency_and_presence_count_the_answer(answer: tuple[int, ...], expected: list[float]) -> None:
    """logit - count * frequency - (count > 0) * presence, over the answer's tokens and not the prompt's."""
    params = SamplingParams(frequency_penalty=0.5, presence_penalty=0.25)
    assert _after(Penalties(params, prompt=[3, 3, 3]), *answer) == expected


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ([0], (), [1.0, -1.0, 0.5, 0.0]),
        ([1, 1, 1], (), [2.0, -2.0, 0.5, 0.0]),
        # prompt and answer count alike, once however often they occur
        ([0], (1, 2, 2), [1.0, -2.0, 0.25, 0.0]),
        ([], (3,), _ROW),
    ],
)
def test_repetition_scales_what_was_seen(prompt: list[int], answer: tuple[int, ...], expected: list[float]) -> None:
    """Positive logits are divided by the penalty, negative ones multiplied, in prompt and answer alike."""
    assert _after(Penalties(SamplingParams(repetition_penalty=2.0), prompt), *answer) == expected


def test_repetition_scales_before_the_others_shift() -> None:
    """(logit / repetition) - frequency - presence: what is scaled is the model's own score."""
    params = SamplingParams(repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25)
    assert _after(Penalties(params, []), 0, 1) == [0.25, -2.75, 0.5, 0.0]


def test_negative_penalties_encourage() -> None:
    """Below zero the penalties raise what was said, as OpenAI allows."""
    params = SamplingParams(frequency_penalty=-1.0, presence_penalty=-0.5)
    assert _after(Penalties(params, []), 3, 3) == [2.0, -1.0, 0.5, 2.5]


def test_a_masked_token_stays_masked() -> None:
    """No penalty turns minus infinity into a number or into NaN."""
    penalties = Penalties(SamplingParams(repetition_penalty=2.0, frequency_penalty=-2.0), [1])
    penalties.accept(1)
    row: Logits = np.array([0.0, -math.inf], dtype=np.float32)
    penalties.apply(row)
    assert row[1] == -math.inf


def test_the_end_is_forbidden_until_enough_tokens_were_made() -> None:
    """With 2 tokens owed, the first and the second may not be a stop token; the third may."""
    processor = MinTokens(2, stop_ids=[0, 2])
    for _ in range(2):
        assert _after(processor) == [-math.inf, -1.0, -math.inf, 0.0]
        processor.accept(3)
    assert _after(processor) == _ROW


def test_no_stop_tokens_forbid_nothing() -> None:
    """A request that ignores the end of sequence may still name a minimum."""
    assert _after(MinTokens(5, stop_ids=[])) == _ROW


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(temperature=0.7, top_p=0.9, top_k=40, min_p=0.1, seed=1, logprobs=5), []),
        (SamplingParams(logit_bias={1: 1.0}), [LogitBias]),
        (SamplingParams(frequency_penalty=0.1), [Penalties]),
        (SamplingParams(presence_penalty=-0.1), [Penalties]),
        (SamplingParams(repetition_penalty=0.9), [Penalties]),
        (SamplingParams(min_tokens=1), [MinTokens]),
        (
            SamplingParams(min_tokens=1, presence_penalty=1.0, logit_bias={0: 100.0}),
            [LogitBias, Penalties, MinTokens],
        ),
    ],
)
def test_a_row_carries_only_what_was_asked_for(params: SamplingParams, expected: list[type]) -> None:
    """Plain sampling has no processors; others come in the order bias, penalties, mask."""
    assert [type(processor) for processor in processors_for(params, [1], [0])] == expected


def test_a_bias_cannot_lift_a_forbidden_end() -> None:
    """The mask of the minimum is the last word over any bias towards the end of sequence."""
    row: Logits = np.array(_ROW, dtype=np.float32)
    for processor in processors_for(SamplingParams(logit_bias={2: 100.0}, min_tokens=1), [], stop_ids=[2]):
        processor.apply(row)
    assert row[2] == -math.inf
