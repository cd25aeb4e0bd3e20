"""JSON read while it arrives: each step moves the cursor over text that can only be JSON, and no further."""

import json
import math
import re
from typing import Any

from opta_lmx.inference.output.cursor import Cursor, Malformed, Steps

# Deep enough for any tool's arguments, and far below where the readers on the other side give up.
MAX_DEPTH = 128

_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_ESCAPE_BEGUN = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?")
_NUMBER_CHARACTERS = re.compile(r"[-+.0-9eE]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
# Python refuses to read integers past 4,300 digits, and so would many a client.
_LONGEST_NUMBER = 1_000
_WORDS = {"t": "true", "f": "false", "n": "null"}


def decoded(text: str) -> Any:
    """The value of a whole JSON text; raises Malformed for anything that could not be written as JSON again."""
    try:
        return json.loads(text, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise Malformed from error


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def scan_value(cursor: Cursor) -> Steps[None]:
    """Read one value of any kind; raises Malformed where the text stops being JSON, or nests past MAX_DEPTH."""
    closers: list[str] = []
    while True:
        yield from cursor.skip_space()
        opener = yield from cursor.peek()
        if opener and opener in "{[":
            if len(closers) == MAX_DEPTH:
                raise Malformed
            cursor.pos += 1
            closers.append("}" if opener == "{" else "]")
            if not (yield from cursor.take_spaced(closers[-1])):
                yield from _scan_key_if(closers[-1] == "}", cursor)
                continue
            closers.pop()
        else:
            yield from _scan_scalar(cursor, opener)
        while closers and not (yield from cursor.take_spaced(",")):
            yield from cursor.skip_space()
            yield from cursor.expect(closers.pop())
        if not closers:
            return
        yield from _scan_key_if(closers[-1] == "}", cursor)


def scan_string(cursor: Cursor) -> Steps[None]:
    """Read one string with its quotes."""
    yield from cursor.expect('"')
    while True:
        yield from cursor.run(_PLAIN)
        following = yield from cursor.peek()
        if following == '"':
            cursor.pos += 1
            return
        if following != "\\":
            raise Malformed
        while (escape := _ESCAPE.match(cursor.text, cursor.pos)) is None:
            if cursor.ended or not _ESCAPE_BEGUN.fullmatch(cursor.text, cursor.pos):
                raise Malformed
            yield
        cursor.pos = escape.end()


def read_string(cursor: Cursor) -> Steps[str]:
    """Read one string and give what it says."""
    yield from cursor.skip_space()
    start = cursor.pos
    yield from scan_string(cursor)
    return str(decoded(cursor.text[start : cursor.pos]))


def _scan_key_if(in_object: bool, cursor: Cursor) -> Steps[None]:
    if in_object:
        yield from cursor.skip_space()
        yield from scan_string(cursor)
        yield from cursor.skip_space()
        yield from cursor.expect(":")


def _scan_scalar(cursor: Cursor, first: str) -> Steps[None]:
    if first == '"':
        yield from scan_string(cursor)
    elif first in _WORDS:
        yield from cursor.expect(_WORDS[first])
    else:
        yield from scan_number(cursor)


def scan_number(cursor: Cursor) -> Steps[None]:
    """Read one number, once what follows it shows where it ends."""
    while True:
        found = _NUMBER_CHARACTERS.match(cursor.text, cursor.pos)
        end = found.end() if found else cursor.pos
        if end < len(cursor.text) or cursor.ended:
            break
        yield
    if end - cursor.pos > _LONGEST_NUMBER or not _NUMBER.fullmatch(cursor.text, cursor.pos, end):
        raise Malformed
    cursor.pos = end
