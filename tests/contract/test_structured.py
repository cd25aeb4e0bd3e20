"""What a chat request says about the form of its answer."""

from typing import Any

import pytest

from opta_lmx.api.openai.structured import to_structured
from opta_lmx.api.openai.wire import ChatRequest
from opta_lmx.api.validation import validate
from opta_lmx.errors import InvalidRequest
from opta_lmx.types import Structured

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def asked(**fields: Any) -> Structured | None:
    """The grammar a request with these fields asks for."""
    return to_structured(
        validate(ChatRequest, {"model": "m", "messages": [{"role": "user", "content": "x"}], **fields})
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Structured("json_object")),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": SCHEMA, "strict": True},
                }
            },
            Structured("json_schema", SCHEMA),
        ),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, Structured("json_object")),
        ({"structured_outputs": {"json": SCHEMA}}, Structured("json_schema", SCHEMA, "structured_outputs.json")),
        ({"structured_outputs": {"regex": "[ab]+"}}, Structured("regex", "[ab]+", "structured_outputs.regex")),
        (
            {"structured_outputs": {"choice": ["yes", "no"]}},
            Structured("choice", ["yes", "no"], "structured_outputs.choice"),
        ),
        (
            {"structured_outputs": {"grammar": 'start: "a"'}},
            Structured("grammar", 'start: "a"', "structured_outputs.grammar"),
        ),
        ({"guided_json": SCHEMA}, Structured("json_schema", SCHEMA, "guided_json")),
        ({"guided_regex": "[ab]+"}, Structured("regex", "[ab]+", "guided_regex")),
        ({"guided_choice": ["yes", "no"]}, Structured("choice", ["yes", "no"], "guided_choice")),
        ({"guided_grammar": 'start: "a"'}, Structured("grammar", 'start: "a"', "guided_grammar")),
    ],
)
def test_each_way_to_ask_for_a_form_is_one_grammar(fields: dict[str, Any], expected: Structured | None) -> None:
    """OpenAI's and vLLM's words arrive as the same value."""
    assert asked(**fields) == expected


def test_two_forms_at_once_are_refused() -> None:
    """An answer cannot follow two grammars; the error names both."""
    with pytest.raises(InvalidRequest, match=r"'response_format' and 'structured_outputs\.regex'"):
        asked(response_format={"type": "json_object"}, structured_outputs={"regex": "a"})
