"""One call of one of some tools as one JSON Schema, whatever references the tools' own schemas hold."""

from collections.abc import Mapping, Sequence
from typing import Any

from opta_lmx.types import JsonObject

# Keywords by which a schema may name properties that are not in its ``properties``.
_OPEN = frozenset(
    {"additionalProperties", "allOf", "anyOf", "oneOf", "patternProperties", "unevaluatedProperties", "$ref"}
)

# Keywords whose values are data, where a key called "$ref" is only a key.
_DATA = frozenset({"const", "default", "enum", "examples"})

# Keywords whose values are objects of schemas by name, where a key called "const" is only a name.
_NAMED_SCHEMAS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})


def call_schema(tools: Sequence[JsonObject]) -> JsonObject:
    """The schema of ``{"name": ..., "arguments": {...}}``, keys in this order; ``tools`` as in ``Structured.spec``.

    Arguments that a tool's schema neither names nor forbids are left out: a call stays valid without them, and a model
    cannot lose itself in properties of its own.
    """
    definitions = {f"tool{at}": _parameters(tool["parameters"], f"#/$defs/tool{at}") for at, tool in enumerate(tools)}
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool["name"]}, "arguments": {"$ref": f"#/$defs/tool{at}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for at, tool in enumerate(tools)
    ]
    return {"anyOf": calls, "$defs": definitions}


def _parameters(schema: Mapping[str, Any], root: str) -> JsonObject:
    moved: JsonObject = _moved(schema, root)
    # As definitions of a larger document they have no address and no dialect of their own.
    moved = {key: value for key, value in moved.items() if key not in ("$id", "$schema")}
    return {**moved, "type": "object", **({"additionalProperties": False} if _names_all(moved) else {})}


def _names_all(schema: JsonObject) -> bool:
    """True if a schema names the properties it expects, and leaves others open only by saying nothing of them."""
    named, required = schema.get("properties"), schema.get("required", ())
    if not named or not isinstance(named, Mapping) or not isinstance(required, list | tuple):
        return False
    return not _OPEN & schema.keys() and all(isinstance(name, str) and name in named for name in required)


def _moved(schema: Any, root: str) -> Any:
    """The schema with its references to itself (``#``, ``#/$defs/x``) turned to where it stands now, ``root``."""
    if isinstance(schema, list):
        return [_moved(item, root) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved: JsonObject = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and value.startswith("#"):
            moved[key] = root + value[1:]
        elif key in _NAMED_SCHEMAS and isinstance(value, Mapping):
            moved[key] = {name: _moved(child, root) for name, child in value.items()}
        else:
            moved[key] = value if key in _DATA else _moved(value, root)
    return moved
