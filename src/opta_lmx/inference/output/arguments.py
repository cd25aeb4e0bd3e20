"""Arguments that are not written as JSON: bare text typed by a tool's schema, Python literals, Gemma's braces."""

import ast
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from opta_lmx.inference.output.cursor import Malformed
from opta_lmx.inference.output.json_text import decoded
from opta_lmx.types import JsonObject

_PYTHON_FAILURES = (ValueError, SyntaxError, TypeError, RecursionError, MemoryError)


class Parameters:
    """The schemas of every tool's parameters, by tool and name.

    A tool's whole schema may be ``msgspec.Raw``, JSON that is read when the tool is first called.
    """

    def __init__(self, tools: Sequence[JsonObject]) -> None:
        self._schemas: dict[str, object] = {}
        for tool in tools:
            function = tool.get("function")
            if isinstance(function, Mapping) and isinstance(function.get("name"), str):
                self._schemas[function["name"]] = function.get("parameters")

    def typed(self, tool: str, name: str, value: str) -> Any:
        """``value`` as the type the schema gives it, the text itself where it cannot be that.

        A parameter no schema describes is what its text says in JSON, else a string.
        """
        kinds = frozenset(_kinds(self._properties(tool).get(name)))
        if "string" in kinds:
            return None if value == "null" and "null" in kinds else value
        try:
            found = decoded(value)
        except Malformed:
            found = _python_value(value, kinds)
        return found if not kinds or _kind(found) in kinds or _fits_number(found, kinds) else value

    def _properties(self, tool: str) -> Mapping[str, Any]:
        schema = self._schemas.get(tool)
        if isinstance(schema, msgspec.Raw):
            schema = self._schemas[tool] = msgspec.json.decode(schema)
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        return properties if isinstance(properties, Mapping) else {}


def python_arguments(text: str) -> str:
    """The keyword arguments of a Python call as JSON; raises Malformed for anything but literals."""
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name):
            raise Malformed
        values = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        if None in values:
            raise Malformed
        return json.dumps(values, ensure_ascii=False, allow_nan=False)
    except _PYTHON_FAILURES as error:
        raise Malformed from error


def _python_value(value: str, kinds: frozenset[str]) -> Any:
    """What models write for JSON when they think in Python: True, None, single quotes."""
    if not kinds:
        return value
    try:
        found = ast.literal_eval({"true": "True", "false": "False"}.get(value.strip().lower(), value.strip()))
        json.dumps(found, allow_nan=False)
    except _PYTHON_FAILURES:
        return value
    return found


def _kinds(schema: object) -> Iterable[str]:
    """Every type a schema allows by name, through its alternatives."""
    if not isinstance(schema, Mapping):
        return
    named = schema.get("type")
    yield from (named,) if isinstance(named, str) else named if isinstance(named, list) else ()
    for word in ("anyOf", "oneOf", "allOf"):
        choices = schema.get(word)
        for choice in choices if isinstance(choices, list) else ():
            yield from _kinds(choice)
    choices = schema.get("enum")
    if named is None and isinstance(choices, list):
        yield from map(_kind, choices)


def _kind(value: object) -> str:
    names = ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array"), (dict, "object"))
    return next((name for kind, name in names if isinstance(value, kind)), "null")


def _fits_number(value: object, kinds: frozenset[str]) -> bool:
    return "number" in kinds and _kind(value) == "integer"
