"""vllm-mlx's own parsers, run on whole answers, as the oracle.

They are not used by the server: they do not stream, and they pull in transformers. Where we differ on purpose, the test
names the reason.
"""

import json
from typing import Any

import pytest

from tests.unit.output.corpus import ANSWERS, EMPTY, FORMATS, TOOLS, Answer, read

pytestmark = pytest.mark.mlx

_NAMES = {"gemma": "gemma4", "llama": "llama"}


def _oracle(answer: Answer) -> tuple[list[tuple[str, Any]], str]:
    from vllm_mlx.tool_parsers import ToolParserManager

    parser = ToolParserManager.get_tool_parser(_NAMES.get(answer.format, answer.format))(None)
    found = parser.extract_tool_calls(answer.output, {"tools": TOOLS})
    return [(call["name"], json.loads(call["arguments"])) for call in found.tool_calls], (found.content or "").strip()


def _differs(answer: Answer) -> str | None:
    """Why the oracle's reading of this answer is not ours."""
    return None


_COMPARED = [
    answer
    for answer in ANSWERS
    if answer.format in FORMATS and answer.format != "pythonic" and not answer.reasoning_format and not answer.forced
]


@pytest.mark.parametrize("answer", _COMPARED, ids=lambda answer: f"{answer.format}:{answer.output[:40]!r}")
def test_calls_and_content_are_the_oracles(answer: Answer) -> None:
    """The same names, equal arguments, the same content."""
    heard = read(answer)
    ours = ([(name, json.loads(arguments)) for name, arguments in heard.calls], heard.text.strip())
    assert ours == _oracle(answer)
