"""vllm-mlx's own parsers, run on whole answers, as the oracle.

They are not used by the server: they do not stream, and they pull in transformers. Where we differ on purpose, the
table below says why; the test holds that it says no more than is true.
"""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.output.corpus import ANSWERS, EMPTY, FORMATS, OURS_ALONE, THINK, TOOLS, Answer, Call, read, written

pytestmark = pytest.mark.mlx

_Rule = tuple[str, frozenset[str], Callable[[Answer], bool]]

_DIFFERENCES: tuple[_Rule, ...] = (
    (
        "the oracle drops text after the calls, or takes the calls for text with it",
        frozenset({"qwen3_xml", "mistral", "deepseek_v3", "glm47", "kimi", "harmony", "gemma", "granite"}),
        lambda answer: answer.text == "Done.",
    ),
    (
        "the oracle drops text before the calls, or takes the calls for text with it",
        frozenset({"glm47", "harmony", "granite"}),
        lambda answer: answer.text == "Let me look.",
    ),
    (
        "the oracle ends a call at a closing marker inside a value",
        frozenset({"qwen3_xml", "glm47", "kimi", "harmony", "gemma", "minimax"}),
        lambda answer: any(name == "run" for name, _ in answer.calls),
    ),
    (
        "the oracle loses markers, and what follows them, in prose",
        frozenset({"qwen3_xml", "harmony"}),
        lambda answer: answer.text.startswith("The marker"),
    ),
    ("the oracle drops calls without arguments", frozenset({"minimax"}), lambda answer: EMPTY in answer.calls),
    ("the oracle reads one section only", frozenset({"gemma"}), lambda answer: len(answer.calls) > 1),
    ("the oracle does not know this way of writing", frozenset(FORMATS), lambda answer: answer in OURS_ALONE),
)

# Formats that vllm-mlx has no parser for; what it calls nemotron is another one.
_UNKNOWN = frozenset({"command", "minicpm", "nemotron", "pythonic", "seed", "tool_calls"})
_KNOWN = tuple(name for name in FORMATS if name not in _UNKNOWN)

_COMPARED = [
    answer for answer in ANSWERS if answer.format in _KNOWN and not answer.reasoning_format and not answer.forced
]


def _name(answer: Answer) -> str:
    return f"{answer.format}:{answer.output[:40]!r}"


def _oracle(answer: Answer) -> tuple[list[tuple[str, Any]], str] | None:
    """Calls and content; None where the oracle's arguments are no JSON."""
    from vllm_mlx.tool_parsers import ToolParserManager

    parser = ToolParserManager.get_tool_parser("gemma4" if answer.format == "gemma" else answer.format)(None)
    found = parser.extract_tool_calls(answer.output, {"tools": TOOLS})
    try:
        calls = [(call["name"], json.loads(call["arguments"])) for call in found.tool_calls]
    except ValueError:
        return None
    return calls, (found.content or "").strip()


@pytest.mark.parametrize("answer", _COMPARED, ids=_name)
def test_calls_and_content_are_the_oracles(answer: Answer) -> None:
    """The same names, equal arguments, the same content; where the table has a reason, the oracle is the one to err."""
    heard = read(answer)
    ours = ([(name, json.loads(arguments)) for name, arguments in heard.calls], heard.text.strip())
    reasons = [reason for reason, formats, applies in _DIFFERENCES if answer.format in formats and applies(answer)]
    assert (ours == _oracle(answer)) is not bool(reasons), reasons
    assert ours == (list(answer.calls), answer.text.strip())


# The oracle reads one section only (see above).
_ONE_CALL = frozenset({"gemma"})

# Letters: of a text that reads as a number, vllm-mlx's minimax makes one, whatever the schema says.
_WORDS = st.text(st.characters(categories=["L"]), max_size=8).filter(
    lambda word: word.lower() not in ("nan", "infinity", "inf", "true", "false", "null", "none")
)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-999, 999) | _WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_WORDS.filter(bool), inner, max_size=3),
    max_leaves=6,
)
_CALLS = st.lists(
    st.one_of(
        st.tuples(st.just("get_weather"), st.fixed_dictionaries({"city": _WORDS.filter(bool)})),
        st.tuples(
            st.just("search"),
            st.fixed_dictionaries(
                {"query": _WORDS.filter(bool), "limit": st.integers(-999, 999), "exact": st.booleans()},
                optional={
                    "filter": st.dictionaries(st.sampled_from(["a", "b_c", "d"]), _VALUES, min_size=1, max_size=3)
                },
            ),
        ),
    ),
    min_size=1,
    max_size=3,
)


@given(st.sampled_from(_KNOWN), _CALLS)
def test_generated_calls_are_the_oracles(name: str, calls: list[Call]) -> None:
    """Any calls with arguments, in every format both know: the same ones, and no text besides."""
    calls = calls[:1] if name in _ONE_CALL else calls
    answer = Answer(name, written(name, calls), calls)
    heard = read(answer)
    ours = ([(call, json.loads(arguments)) for call, arguments in heard.calls], heard.text.strip())
    assert ours == (calls, "")
    assert _oracle(answer) == ours


_REASONING_PARSERS = {"think": "deepseek_r1", "mistral": "mistral", "gemma": "gemma4", "harmony": "harmony"}


_THOUGHT = [answer for answer in THINK if not answer.calls and answer.reasoning_format in _REASONING_PARSERS]


@pytest.mark.parametrize("answer", _THOUGHT, ids=_name)
def test_reasoning_is_the_oracles(answer: Answer) -> None:
    """The same reasoning and the same content; the oracle drops what a commentary message says to the user."""
    from vllm_mlx.reasoning import get_parser

    parser = get_parser(_REASONING_PARSERS[answer.reasoning_format or ""])(None)
    reasoning, content = parser.extract_reasoning(answer.output)
    heard = read(answer)
    assert heard.reasoning == (reasoning or "").strip()
    if "<|channel|>commentary" not in answer.output:
        assert heard.text == (content or "").strip()
