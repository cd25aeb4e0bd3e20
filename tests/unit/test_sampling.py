"""The choice of the next token, on the host and on the device, against the exact distribution.

Every row's generator is replaced by one that draws a chosen quantile, so that each test is a look-up in the reference's
inverse distribution function and not a matter of luck.
"""

import math
import random
from collections.abc import Sequence
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from opta_lmx.inference.worker.sampler_rows import Logits, RowSampler, RowTable
from opta_lmx.inference.worker.sampling import DeviceLaunch, HostLaunch, run_processors

pytestmark = pytest.mark.mlx

Launch: TypeAlias = type[HostLaunch] | type[DeviceLaunch]
Rows: TypeAlias = npt.NDArray[np.float32]

_BOTH = pytest.mark.parametrize("launch", [HostLaunch, DeviceLaunch])
# Middles of equal slices, and the first and the last but a few of what random.random() can return.
_QUANTILES = [0.0, *((i + 0.5) / 50 for i in range(50)), 0.999999]
# The last one: single precision rounds it to 1.
_LAST_QUANTILE = 1.0 - 2.0**-53
# What single precision may move a quantile by, over a thousand weights.
_ROUNDING = 1e-5

_RULES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 100},
    {"top_k": 100_000},
    {"top_p": 1e-9},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"min_p": 0.001},
    {"min_p": 0.3},
    {"min_p": 1.0},
    {"top_k": 50, "top_p": 0.8},
    {"top_k": 5, "top_p": 0.999, "min_p": 0.01, "temperature": 1.7},
    {"top_p": 0.9, "min_p": 0.05, "temperature": 0.6},
]


class Quantile(random.Random):
    """Draws the same quantile every time, and counts how often it was asked."""

    def __init__(self, quantile: float) -> None:
        super().__init__()
        self.quantile = quantile
        self.draws = 0

    def random(self) -> float:
        """The quantile."""
        self.draws += 1
        return self.quantile


class Shift:
    """A processor that adds a number to one token's logit."""

    error: str | None = None

    def __init__(self, token: int, amount: float) -> None:
        self._token, self._amount = token, amount

    def prepare(self) -> None:
        """Nothing can be done ahead."""

    def apply(self, row: Logits) -> None:
        """Adds the amount."""
        row[self._token] += self._amount

    def accept(self, token: int) -> None:
        """Nothing to learn."""


def _row(quantile: float = 0.5, **rule: Any) -> RowSampler:
    return RowSampler(**{"temperature": 1.0, "generator": Quantile(quantile), **rule})


def _logits(rows: int, size: int, spread: float, seed: int = 0) -> Rows:
    values: Rows = np.random.default_rng(seed).normal(0.0, spread, (rows, size)).astype(np.float32)
    return values


def _choose(launch: Launch, logits: Rows, rows: Sequence[RowSampler]) -> list[int]:
    return launch(mx.array(logits), RowTable(rows)).collect()


def _looks_up(launch: Launch, rule: RowSampler) -> bool:
    """True if the drawn number is looked up in the distribution; the others' is the seed of noise."""
    return launch is DeviceLaunch or rule.truncates


def _shares(launch: Launch, logits: Rows, rule: RowSampler) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """The reference, in double precision: tokens in the order they share out [0, 1), and each one's share.

    Temperature, then the top_k most likely, then the fewest of those that hold top_p of what is left, then those
    with at least min_p of the best one's weight. They share in the order of ids, but from the likeliest down where
    MLX's CPU chooses.
    """
    weights = np.exp((logits.astype(np.float64) - logits.max()) / rule.temperature)
    if not rule.truncates:
        return np.arange(len(weights)), weights / weights.sum()
    order = np.argsort(-weights, kind="stable")
    weights = weights[order]
    if rule.top_k:
        weights[rule.top_k :] = 0.0
    before = np.cumsum(weights) - weights
    outside = (before >= rule.top_p * weights.sum()) & (rule.top_p < 1)
    weights[outside | (weights < rule.min_p * weights[0])] = 0.0
    if launch is DeviceLaunch or not rule.is_few:
        by_id = np.argsort(order)
        order, weights = order[by_id], weights[by_id]
    return order, weights / weights.sum()


def _assert_right(launch: Launch, token: int, logits: Rows, row: RowSampler) -> None:
    quantile = row.generator.random()
    order, shares = _shares(launch, logits, row)
    at = int(np.flatnonzero(order == token)[0])
    end = shares[: at + 1].sum()
    assert shares[at] > 0
    assert end - shares[at] - _ROUNDING <= quantile < end + _ROUNDING


@_BOTH
@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 130, 1000])
@pytest.mark.parametrize("spread", [0.02, 1.0, 6.0], ids=["flat", "soft", "sharp"])
def test_every_quantile_gives_the_token_the_exact_distribution_has_there(
    launch: Launch, size: int, spread: float
) -> None:
    """For each rule, vocabulary size and shape of distribution: the inverse distribution function, token by token."""
    [logits] = _logits(1, size, spread)
    for rule in _RULES:
        rows = [_row(quantile, **rule) for quantile in _QUANTILES]
        if _looks_up(launch, rows[0]):
            for token, row in zip(_choose(launch, np.tile(logits, (len(rows), 1)), rows), rows, strict=True):
                _assert_right(launch, token, logits, row)


@_BOTH
@pytest.mark.parametrize("spread", [2.0, 5.0], ids=["soft", "sharp"])
def test_large_vocabularies_are_sampled_by_the_same_rule(launch: Launch, spread: float) -> None:
    """Where only the likeliest are looked at first, and more of them where those do not suffice."""
    [logits] = _logits(1, 40_003, spread)
    logits[7::11] = -np.inf
    for rule in _RULES:
        rows = [_row(quantile, **rule) for quantile in (0.0, 0.31, 0.77, 0.995)]
        if not _looks_up(launch, rows[0]):
            continue
        tokens = _choose(launch, np.tile(logits, (len(rows), 1)), rows)
        for token, row in zip(tokens, rows, strict=True):
            quantile = row.generator.random()
            order, shares = _shares(launch, logits, row)
            at = int(np.flatnonzero(order == token)[0])
            end = shares[: at + 1].sum()
            assert shares[at] > 0
            assert end - shares[at] - 10 * _ROUNDING <= quantile < end + 10 * _ROUNDING


@_BOTH
@pytest.mark.parametrize("rule", [{"top_k": 40}, {"top_k": 40, "min_p": 0.001}, {"top_p": 0.9999}])
def test_rows_with_little_left_stand_beside_rows_with_all(launch: Launch, rule: dict[str, Any]) -> None:
    """Three tokens that a grammar left of forty thousand, and a row of equals, and one like any other."""
    masked, usual = _logits(2, 40_003, 3.0)
    masked[[i for i in range(len(masked)) if i not in (5, 20_000, 40_002)]] = -np.inf
    equal = np.zeros_like(usual)
    for quantile in (0.0, 0.5, 0.999):
        tokens = _choose(launch, np.stack([masked, equal, usual]), [_row(quantile, **rule) for _ in range(3)])
        assert tokens[0] in (5, 20_000, 40_002)
        assert tokens[1] == int(quantile * 40) or "top_k" not in rule
        assert tokens[2] == _choose(launch, usual[None], [_row(quantile, **rule)])[0]


@_BOTH
@pytest.mark.parametrize("rule", [{}, {"top_k": 100}, {"top_k": 7}, {"top_p": 0.95}])
def test_the_last_quantile_gives_the_last_share(launch: Launch, rule: dict[str, Any]) -> None:
    """The largest number a generator can draw still falls inside the distribution, however it is rounded."""
    [logits] = _logits(1, 100, 1.0)
    row = _row(_LAST_QUANTILE, **rule)
    [token] = _choose(launch, logits[None], [row])
    if _looks_up(launch, row):
        _assert_right(launch, token, logits, row)
    assert 0 <= token < 100


@_BOTH
def test_frequencies_follow_the_distribution(launch: Launch) -> None:
    """Chi-square over 4,000 draws of seeded generators stays under the 0.1 % point of 9 degrees of freedom."""
    [logits] = _logits(1, 10, 1.0)
    rows = [RowSampler(temperature=0.8, generator=random.Random(seed)) for seed in range(4000)]
    counts = np.bincount(_choose(launch, np.tile(logits, (len(rows), 1)), rows), minlength=10)
    expected = _shares(launch, logits, rows[0])[1] * len(rows)
    assert ((counts - expected) ** 2 / expected).sum() < 27.88


@_BOTH
@pytest.mark.parametrize("rule", [{}, {"top_k": 200}])
def test_the_unlikely_come_as_often_as_they_should(launch: Launch, rule: dict[str, Any]) -> None:
    """Two thousand draws from 5,000 tokens, of which the likeliest has a third, by tenths of the distribution.

    The noise of many unlikely tokens is where a random number of too few digits would show.
    """
    [logits] = _logits(1, 5000, 2.0)
    logits[17] = np.log(np.exp(logits.astype(np.float64)).sum() / 2)
    rows = [_row(**rule) for _ in range(2000)]
    for seed, row in enumerate(rows):
        row.generator = random.Random(seed)
    order, shares = _shares(launch, logits, rows[0])
    place = np.empty(len(order), dtype=np.intp)
    place[order] = np.arange(len(order))
    tokens = [
        token
        for at in range(0, len(rows), 100)
        for token in _choose(launch, np.tile(logits, (100, 1)), rows[at : at + 100])
    ]
    middle = np.cumsum(shares) - shares / 2
    tenth = np.minimum(middle * 10, 9).astype(np.intp)
    expected = np.bincount(tenth, weights=shares, minlength=10) * len(rows)
    counts = np.bincount(tenth[place[tokens]], minlength=10)
    likely = expected > 0
    assert counts[~likely].sum() == 0
    assert ((counts - expected)[likely] ** 2 / expected[likely]).sum() < 27.88


@_BOTH
def test_greedy_is_the_first_of_the_largest(launch: Launch) -> None:
    """Temperature 0 takes the most likely token, of equals the one with the lowest id, and draws nothing."""
    logits = _logits(3, 200, 1.0)
    logits[1, [150, 7, 80]] = 9.0
    rows = [_row(temperature=0.0) for _ in range(3)]
    assert _choose(launch, logits, rows) == [int(logits[0].argmax()), 7, int(logits[2].argmax())]
    assert [_draws(row) for row in rows] == [0, 0, 0]


@_BOTH
@pytest.mark.parametrize("temperature", [1e-4, 1e-20, 1e-40])
def test_a_temperature_near_zero_is_as_good_as_greedy(launch: Launch, temperature: float) -> None:
    """However small the temperature, the most likely token is taken and nothing overflows."""
    logits = _logits(1, 100, 3.0)
    logits[0, 4] = -math.inf
    assert _choose(launch, logits, [_row(0.999, temperature=temperature)]) == [int(logits[0].argmax())]


@_BOTH
def test_each_row_of_a_mixed_batch_gets_what_it_gets_alone(launch: Launch) -> None:
    """Greedy, sampled and truncated rows side by side: a row's token depends on its logits and its draw alone."""
    rules = [{"temperature": 0.0}, *_RULES]
    logits = _logits(len(rules), 500, 0.5)
    rows = [_row(0.1 + 0.8 * i / len(rules), **rule) for i, rule in enumerate(rules)]
    alone = [_choose(launch, logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    assert _choose(launch, logits, rows) == alone


@_BOTH
def test_a_truncated_neighbour_does_not_move_a_plain_row(launch: Launch) -> None:
    """A row without top-k, top-p or min-p shares out its quantiles by id, whoever sits beside it."""
    logits = _logits(2, 100, 1.0)
    plain = _row(0.3)
    assert _choose(launch, logits, [plain, _row(0.3, top_k=5)])[0] == _choose(launch, logits[:1], [plain])[0]


@_BOTH
def test_equally_likely_tokens_are_ranked_by_id(launch: Launch) -> None:
    """Of 500 equal tokens top_k 40 keeps the first 40, whatever a neighbour's top_k is: seeds stay reproducible.

    Models that compute in 16 bits make many equal logits.
    """
    logits = np.zeros((len(_QUANTILES) + 1, 500), dtype=np.float32)
    rows = [_row(quantile, top_k=40) for quantile in _QUANTILES]
    expected = [int(quantile * 40) for quantile in _QUANTILES]
    assert _choose(launch, logits[1:], rows) == expected
    assert _choose(launch, logits, [*rows, _row(top_k=200)])[:-1] == expected


@_BOTH
def test_one_draw_a_token(launch: Launch) -> None:
    """A sampled row takes exactly one number from its generator for a token, so that a seed means one sequence."""
    rows = [_row(), _row(top_p=0.5), _row(top_p=0.999999), _row(temperature=0.0)]
    logits = _logits(4, 300, 0.01)
    for _ in range(3):
        _choose(launch, logits, rows)
    assert [_draws(row) for row in rows] == [3, 3, 3, 0]


@_BOTH
@pytest.mark.parametrize("rule", [{}, {"top_p": 0.9}, {"top_k": 3, "temperature": 5.0}])
def test_a_masked_token_is_never_drawn(launch: Launch, rule: dict[str, Any]) -> None:
    """Minus infinity means impossible at every quantile, the two ends included."""
    [logits] = _logits(1, 150, 1.0)
    masked = np.full_like(logits, -math.inf)
    masked[[3, 70]] = logits[[3, 70]]
    rows = [_row(quantile, **rule) for quantile in (*_QUANTILES, _LAST_QUANTILE)]
    assert set(_choose(launch, np.tile(masked, (len(rows), 1)), rows)) == {3, 70}


@_BOTH
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_logits_are_sampled_in_single_precision(launch: Launch, dtype: mx.Dtype) -> None:
    """What a 16-bit model computes is widened first: choices and reported logits are those of the widened values."""
    lazy = mx.array(_logits(2, 300, 0.3)).astype(dtype)
    wide: Rows = np.array(lazy.astype(mx.float32))
    rows = [_row(0.77, top_p=0.9), _row(0.2, top_k=100)]
    launched = launch(lazy, RowTable(rows))
    for token, logits, row in zip(launched.collect(), wide, rows, strict=True):
        _assert_right(launch, token, logits, row)
    assert np.array_equal(launched.logits(), wide)


@_BOTH
def test_rows_that_leave_take_nothing_with_them(launch: Launch) -> None:
    """After ``keep`` the rows that stay get the tokens they would have got, and no others are reported."""
    logits = _logits(4, 100, 1.0)
    rows = [_row(0.1 + 0.2 * i, top_k=i * 10) for i in range(4)]
    whole = launch(mx.array(logits), RowTable(rows)).collect()
    launched = launch(mx.array(logits), RowTable(rows))
    launched.keep([1, 3], RowTable([rows[1], rows[3]]))
    assert launched.collect() == [whole[1], whole[3]]
    assert np.array_equal(launched.logits(), logits[[1, 3]])


def test_where_nobody_is_late_the_tokens_are_known_before_anybody_waited() -> None:
    """They can feed the next forward, and are the ones that ``collect`` gives; a row that numpy chooses for is late."""
    logits, rows = _logits(4, 100, 1.0), [_row(0.2), _row(0.7, top_k=9), _row(temperature=0.0), _row(top_p=0.9)]
    for launch, known in ((DeviceLaunch, 4), (HostLaunch, 3)):
        launched = launch(mx.array(logits[:known]), RowTable(rows[:known]))
        assert launched.tokens is not None
        assert launched.tokens.tolist() == launched.collect()
    assert HostLaunch(mx.array(logits), RowTable(rows)).tokens is None
    rows[0].processors = [Shift(0, 0.0)]
    assert DeviceLaunch(mx.array(logits), RowTable(rows)).tokens is None


@_BOTH
def test_company_with_processors_moves_nobody(launch: Launch) -> None:
    """Rows of every rule choose beside one with a processor, which they must wait for, what they choose alone."""
    logits = _logits(len(_RULES) + 1, 300, 1.0)
    rows = [_row(0.1 + 0.8 * i / len(_RULES), **rule) for i, rule in enumerate(_RULES)]
    alone = [_choose(launch, logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    assert _choose(launch, logits, [*rows, _row(processors=[Shift(0, 1.0)])])[:-1] == alone


def test_processors_touch_their_own_row_only() -> None:
    """The logits a row is sampled from, and reports, are its own processors' work and nobody else's."""
    logits = _logits(3, 50, 1.0)
    rows = [_row(temperature=0.0), _row(temperature=0.0, processors=[Shift(5, 50.0), Shift(6, 99.0)]), _row()]
    launched = HostLaunch(mx.array(logits), RowTable(rows))
    tokens = launched.collect()
    assert tokens[:2] == [int(logits[0].argmax()), 6]
    expected = logits.copy()
    expected[1, [5, 6]] += [50.0, 99.0]
    assert np.array_equal(launched.logits(), expected)


def test_processors_run_in_order() -> None:
    """Each sees what the ones before it left."""

    class Double(Shift):
        """Doubles its token's logit."""

        def apply(self, row: Logits) -> None:
            """Doubles it."""
            row[0] *= 2

    logits: Logits = np.array([[1.0, 0.0]], dtype=np.float32)
    run_processors(logits, RowTable([_row(processors=[Shift(0, 1.0), Double(0, 0.0), Shift(0, 1.0)])]))
    assert logits.tolist() == [[5.0, 0.0]]


def _draws(row: RowSampler) -> int:
    assert isinstance(row.generator, Quantile)
    return row.generator.draws
