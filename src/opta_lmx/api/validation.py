"""From a JSON object to a wire shape, and from pydantic's complaint to the error OpenAI would have answered.

Codes and wording follow OpenAI's own errors. Only the first fault is reported, as OpenAI does.
"""

from collections.abc import Mapping
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from opta_lmx.api.parsing import show_path
from opta_lmx.errors import InvalidRequest
from opta_lmx.types import JsonObject

Shape = TypeVar("Shape", bound=BaseModel)

# pydantic's word for a wrong type -> what was expected.
_EXPECTED: Final = {
    "string_type": "a string",
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "a boolean",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
}

# pydantic's word for a broken bound -> (the bound's name in its context, comparison, side, OpenAI's word).
_BOUNDS: Final = {
    "less_than_equal": ("le", "<=", "above", "maximum"),
    "less_than": ("lt", "<", "above", "maximum"),
    "greater_than_equal": ("ge", ">=", "below", "minimum"),
    "greater_than": ("gt", ">", "below", "minimum"),
}

# pydantic's word for a wrong size -> (the bound's name in its context, side, OpenAI's word).
_SIZES: Final = {
    "too_long": ("max_length", "above", "maximum"),
    "too_short": ("min_length", "below", "minimum"),
    "string_too_long": ("max_length", "above", "maximum"),
    "string_too_short": ("min_length", "below", "minimum"),
}

# What stands in pydantic's paths beside the names of fields: the tags of our unions (``wire.py``), and its own.
_NO_FIELDS: Final = frozenset({"<string>", "<array>", "<object>", "[key]"})

# What the client wrote, in JSON's words.
_NOUNS: Final[Mapping[type, str]] = {
    type(None): "null",
    bool: "a boolean",
    str: "a string",
    int: "an integer",
    float: "a decimal number",
    list: "an array",
    dict: "an object",
}

_SHOWN_CHARACTERS: Final = 64


def validate(shape: type[Shape], body: JsonObject) -> Shape:
    """``body`` as a ``shape``; raises InvalidRequest for the first field that does not fit."""
    try:
        return shape.model_validate(body)
    except ValidationError as error:
        raise _to_invalid_request(error.errors(include_url=False)[0]) from None


def validate_request(shape: type[Shape], body: JsonObject) -> Shape:
    """``validate`` for a request to a model: a missing one OpenAI tells in its own words, before it looks further."""
    if not body.get("model"):
        raise InvalidRequest("you must provide a model parameter")
    return validate(shape, body)


def missing(param: str) -> InvalidRequest:
    """The refusal of a request without ``param``."""
    return InvalidRequest(f"Missing required parameter: {param!r}.", param=param, code="missing_required_parameter")


def wrong_type(param: str, expected: str, value: object) -> InvalidRequest:
    """The refusal of a value of the wrong JSON type; ``expected`` reads like "a string"."""
    return InvalidRequest(
        f"Invalid type for {param!r}: expected {expected}, but got {_NOUNS[type(value)]} instead.",
        param=param,
        code="invalid_type",
    )


def wrong_value(param: str, value: str, supported: str) -> InvalidRequest:
    """The refusal of a word that is not among the ``supported`` ones, which read like "'a' and 'b'"."""
    return InvalidRequest(
        f"Invalid value: {_shorten(value)!r}. Supported values are: {supported}.", param=param, code="invalid_value"
    )


def _to_invalid_request(details: ErrorDetails) -> InvalidRequest:
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    param = show_path(tuple(part for part in details["loc"] if part not in _NO_FIELDS))
    # A field that is null is as good as absent; an item of an array is there all the same.
    is_null = value is None and kind != "extra_forbidden" and isinstance(details["loc"][-1], str)
    if kind == "missing" or is_null:
        return missing(param)
    if kind in _EXPECTED or kind == "invalid_type":
        return wrong_type(param, _EXPECTED.get(kind, details["msg"]), value)
    if kind in _BOUNDS:
        return _out_of_bounds(param, kind, value, context)
    if kind in _SIZES:
        return _wrong_size(param, kind, value, context)
    if kind == "literal_error":
        return _wrong_word(param, value, context["expected"])
    code = "invalid_value"
    if kind == "extra_forbidden":
        message, code = f"Unknown parameter: {param!r}.", "unknown_parameter"
    elif kind == "string_pattern_mismatch":
        message = f"Invalid {param!r}: string does not match pattern. Expected a string that matches the pattern "
        message += f"{context['pattern']!r}."
    else:
        message = f"Invalid {param!r}: {details['msg']}."
    return InvalidRequest(message, param=param, code=code)


def _wrong_word(param: str, value: object, expected: str) -> InvalidRequest:
    """``expected`` is pydantic's list of words: "'a', 'b' or 'c'"."""
    if isinstance(value, str):
        return wrong_value(param, value, expected.replace(" or ", " and "))
    return wrong_type(param, f"one of {expected}", value)


def _out_of_bounds(param: str, kind: str, value: object, context: Mapping[str, Any]) -> InvalidRequest:
    name, comparison, side, word = _BOUNDS[kind]
    # The bound has the type of the field, the value the type the client happened to write.
    noun, bound = ("decimal", f"{context[name]:g}") if isinstance(context[name], float) else ("integer", context[name])
    return InvalidRequest(
        f"Invalid {param!r}: {noun} {side} {word} value. "
        f"Expected a value {comparison} {bound}, but got {value} instead.",
        param=param,
        code=f"{noun}_{side}_{word[:3]}_value",
    )


def _wrong_size(param: str, kind: str, value: Any, context: Mapping[str, Any]) -> InvalidRequest:
    name, side, word = _SIZES[kind]
    noun = _NOUNS[type(value)]
    bare = noun.rpartition(" ")[2]
    if value == []:
        fault, got, code = "empty array", "an empty array", "empty_array"
    else:
        fault = f"{bare} too {'long' if side == 'above' else 'short'}"
        got = f"{noun} with length {len(value)}"
        code = f"{bare}_{side}_{word[:3]}_length"
    return InvalidRequest(
        f"Invalid {param!r}: {fault}. Expected {noun} with {word} length {context[name]}, but got {got} instead.",
        param=param,
        code=code,
    )


def _shorten(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."
