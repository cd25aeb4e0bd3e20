"""The schema of one call of one of some tools."""

import json
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest

from opta_lmx.inference.worker.tool_schema import call_schema

TREE = {
    "$id": "http://example.invalid/tree",
    "$schema": "http://json-schema.org/draft-07/schema#",
    "properties": {"value": {"$ref": "#/definitions/value"}, "children": {"type": "array", "items": {"$ref": "#"}}},
    "required": ["value"],
    "definitions": {"value": {"enum": [1, {"$ref": "#"}]}},
}


def schema_of(*parameters: Any) -> dict[str, Any]:
    """The schema for tools t0, t1, ... with these parameters."""
    tools = [{"name": f"t{at}", "parameters": schema, "field": "x"} for at, schema in enumerate(parameters)]
    return call_schema(tools)


def is_valid(schema: dict[str, Any], name: str, arguments: Any) -> bool:
    """True if the call is one of those."""
    validator = jsonschema.Draft202012Validator(schema)
    return bool(validator.is_valid({"name": name, "arguments": arguments}))


def test_each_tool_has_its_own_arguments() -> None:
    """A name comes with the arguments of the tool of that name and no other, in this order of keys."""
    schema = schema_of({"properties": {"a": {"type": "integer"}}}, {"properties": {"b": {"type": "string"}}})
    assert is_valid(schema, "t0", {"a": 1})
    assert is_valid(schema, "t1", {"b": "x"})
    assert not is_valid(schema, "t1", {"a": 1})
    assert not is_valid(schema, "t2", {})
    assert all(list(call["properties"]) == ["name", "arguments"] for call in schema["anyOf"])
    assert json.dumps(schema)


def test_references_of_a_schema_to_itself_still_hold() -> None:
    """Also where the tool's schema is not the first, and where data looks like a reference."""
    schema = schema_of({}, TREE)
    assert is_valid(schema, "t1", {"value": 1, "children": [{"value": {"$ref": "#"}}]})
    assert not is_valid(schema, "t1", {"value": 1, "children": [{"value": 2}]})
    assert not is_valid(schema, "t1", {"value": 1, "children": [{}]})


def test_a_property_may_have_a_keywords_name() -> None:
    """``const`` among the properties is a name, and the schema behind it is one."""
    schema = schema_of({"properties": {"const": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"type": "integer"}}})
    assert is_valid(schema, "t0", {"const": 1})
    assert not is_valid(schema, "t0", {"const": "x"})


@pytest.mark.parametrize("schema", [{}, {"type": ["object", "null"]}, {"properties": {}}])
def test_arguments_are_always_an_object(schema: dict[str, Any]) -> None:
    """Also where the tool's schema does not say so."""
    assert not is_valid(schema_of(schema), "t0", None)
    assert is_valid(schema_of(schema), "t0", {"anything": 1})


@pytest.mark.parametrize(
    ("schema", "is_closed"),
    [
        ({"properties": {"a": {}}}, True),
        ({"properties": {"a": {}}, "required": ["a"]}, True),
        ({"properties": {"a": {}}, "required": ["b"]}, False),
        ({"properties": {"a": {}}, "additionalProperties": True}, False),
        ({"properties": {"a": {}}, "patternProperties": {"^x": {}}}, False),
        ({"properties": {"a": {}}, "anyOf": [{"required": ["b"]}]}, False),
        ({}, False),
    ],
)
def test_a_model_may_not_invent_properties_without_need(schema: dict[str, Any], is_closed: bool) -> None:
    """Properties nobody named are left out, unless the schema asks for some."""
    assert is_valid(schema_of(schema), "t0", {"a": 1, "b": 1, "x": 1}) is not is_closed


def test_nonsense_is_left_to_the_compiler() -> None:
    """What is no schema comes out as no schema, not as an exception."""
    schema = schema_of({"properties": 5, "required": 5, "$defs": [], "$ref": 5})
    assert schema["$defs"]["tool0"]["properties"] == 5
