"""What one token costs: the parser runs for every token of every stream."""

import time
from itertools import cycle, islice

import pytest

from opta_lmx.inference.output.parser import OutputParser

_TOKENS = 2_000


def _microseconds(begin: str, tokens: list[str]) -> float:
    """The mean cost of one token after ``begin``, the best of five runs: the others tell of the machine."""
    pieces = list(islice(cycle(tokens), _TOKENS))
    best = float("inf")
    for _ in range(5):
        parser = OutputParser(tool_format="hermes", reasoning_format="think")
        parser.feed(begin)
        started = time.perf_counter()
        for piece in pieces:
            parser.feed(piece)
        best = min(best, time.perf_counter() - started)
    return best / _TOKENS * 1e6


@pytest.mark.parametrize("begin", ["Hello", "<think>Hm"])
def test_a_plain_token_costs_less_than_three_microseconds(begin: str) -> None:
    """Text and reasoning without a marker in sight pass almost untouched."""
    assert _microseconds(begin, [" the", " cat", " sat", "."]) < 3


@pytest.mark.parametrize(
    ("begin", "tokens"),
    [
        ("Hello", [" a <", "\n\n", " b <t"]),
        ('<tool_call>{"name": "f", "arguments": {"a": "', [" the", "\\n", " cat"]),
        ('<tool_call>{"name": "f", "arguments": {"a": [', ["1", ", ", "{}", ","]),
        ("<tool_call><function=f><parameter=a>", [" the", "\n", " <"]),
    ],
)
def test_any_token_costs_less_than_twenty_microseconds(begin: str, tokens: list[str]) -> None:
    """Markers that may begin, and calls of two thousand tokens, stay cheap."""
    assert _microseconds(begin, tokens) < 20
