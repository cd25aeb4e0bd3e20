"""What one operation of a chat template would make, told before it is done.

Each check gives the size of a result, in characters or items, or 0 where the result cannot be much larger than what it
is made of; ``templates.py`` counts it. Operations that no size can be told of raise TemplateRuntimeError.
"""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from jinja2 import TemplateRuntimeError

# Numbers a template reckons with are places and counts; a number of so many bits has 3,000 digits.
_MOST_BITS = 10_000

# A width, a count or a precision.
_LARGEST_ARGUMENT = 100_000

# For what takes the square of its input's length in the worst case.
_LONGEST_FOR_PATTERNS = 20_000

# A split text is some objects where it was one.
_OBJECT = 16

_LONG_WIDTH = re.compile(r"\d{6}|\*")


def check_operation(operator: str, left: Any, right: Any) -> int:
    """For ``*``, ``**`` and ``%``."""
    if operator == "%":
        return _formatted(left) if isinstance(left, str | bytes) else 0
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() + right.bit_length() if operator == "*" else left.bit_length() * right
        if bits > _MOST_BITS:
            raise TemplateRuntimeError("a number is too large")
        return 0
    many, times = (right, left) if isinstance(left, int) else (left, right)
    if not isinstance(many, str | bytes | list | tuple) or not isinstance(times, int):
        return 0
    return len(many) * max(times, 0) * (1 if isinstance(many, str) else _OBJECT)


def check_method(name: str, owner: Any, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> int:
    """For a method of a text or a number."""
    if isinstance(owner, bytes) and name not in ("decode", "hex"):
        raise TemplateRuntimeError(f"bytes have no {name}() here")
    given = (*arguments, *named.values())
    if name in ("format", "format_map"):
        nested = re.search(r"\{[^}]*\{", owner) is not None
        return _formatted(owner) + (_numbers(given) * len(owner) if nested else 0)
    _numbers(given)
    check = _METHOD_CHECKS.get(name)
    return check(owner, *given) if check is not None else 0


def _numbers(given: tuple[Any, ...]) -> int:
    """The largest number among arguments, none of which may be very large."""
    largest = max((abs(value) for value in given if isinstance(value, int)), default=0)
    if largest > _LARGEST_ARGUMENT:
        raise TemplateRuntimeError("an argument is too large")
    return largest


def _formatted(pattern: str | bytes) -> int:
    """A width of six digits, or one that comes from a value, is refused."""
    text = pattern if isinstance(pattern, str) else pattern.decode("latin-1")
    if _LONG_WIDTH.search(text) and ("%" in text or "{" in text):
        raise TemplateRuntimeError("a width is too large")
    # Each field may be as wide as five digits say.
    return _LARGEST_ARGUMENT * (len(re.findall(r"\d{4,}", text)))


def _joined(glue: Any, items: Any = (), *rest: Any) -> int:
    size = len(items) if hasattr(items, "__len__") else _LARGEST_ARGUMENT
    longest = max(map(len, items), default=0) if isinstance(items, str) else 0
    texts = sum(len(item) for item in items if isinstance(item, str)) if isinstance(items, list | tuple) else longest
    return len(glue) * size + texts if isinstance(glue, str) else 0


def _replaced(text: Any, old: Any = "", new: Any = "", *rest: Any) -> int:
    return str(text).count(str(old)) * len(str(new))


def _translated(text: str, table: Any = None, *rest: Any) -> int:
    values = table.values() if isinstance(table, dict) else table if isinstance(table, list | tuple) else ()
    return len(text) * max((len(value) for value in values if isinstance(value, str)), default=1)


def _split(text: str, separator: Any = None, *rest: Any) -> int:
    parts = text.count(separator) if isinstance(separator, str) and separator else len(text) // 2
    return parts * _OBJECT


_METHOD_CHECKS: Mapping[str, Callable[..., int]] = MappingProxyType(
    {
        "expandtabs": lambda text, size=8, *rest: text.count("\t") * (size if isinstance(size, int) else 8),
        "join": _joined,
        "replace": _replaced,
        "rsplit": _split,
        "split": _split,
        "splitlines": lambda text, *rest: _split(text, "\n"),
        "translate": _translated,
    }
)


def _sized(value: Any = None, *arguments: Any, **named: Any) -> int:
    """A filter that is given a width or a count."""
    _numbers((*arguments, *named.values()))
    return 0


def _indented(value: Any = None, width: Any = 4, *arguments: Any, **named: Any) -> int:
    _numbers((width, *named.values()))
    step = named.get("width", width)
    return (str(value).count("\n") + 1) * (len(step) if isinstance(step, str) else int(step or 0))


def _in_json(value: Any = None, *arguments: Any, **named: Any) -> int:
    for option in (*arguments, *named.values()):
        sizes = option if isinstance(option, list | tuple) else (option,)
        if any(len(size) > 32 if isinstance(size, str) else isinstance(size, int) and size > 32 for size in sizes):
            raise TemplateRuntimeError("an argument is too large")
    return 0


def _searched(value: Any = None, *arguments: Any, **named: Any) -> int:
    """A filter that looks for patterns in a text, or breaks it into lines."""
    given = (value, *arguments, *named.values())
    _numbers(given[1:])
    if sum(len(text) for text in given if isinstance(text, str)) > _LONGEST_FOR_PATTERNS:
        raise TemplateRuntimeError("a text is too long")
    breaks = [text for text in given[1:] if isinstance(text, str)]
    return len(str(value)) * max(map(len, breaks), default=0)


def _summed(value: Any = None, *arguments: Any, **named: Any) -> int:
    # A sum of lists copies each list again and again.
    if any(isinstance(start, list | tuple) for start in (*arguments, *named.values())):
        raise TemplateRuntimeError("only numbers can be summed")
    return 0


def _list_of(value: Any = None, *arguments: Any, **named: Any) -> int:
    return len(value) if isinstance(value, str) else 0


FILTER_CHECKS: Mapping[str, Callable[..., int]] = MappingProxyType(
    {
        "batch": _sized,
        "center": _sized,
        "format": lambda value=None, *arguments, **named: _formatted(str(value)),
        "indent": _indented,
        "join": lambda value=(), d="", *rest, **named: _joined(named.get("d", d), value),
        "list": _list_of,
        "replace": _replaced,
        "round": _sized,
        "slice": _sized,
        "striptags": _searched,
        "sum": _summed,
        "tojson": _in_json,
        "truncate": _sized,
        "urlize": _searched,
        "wordwrap": _searched,
    }
)
