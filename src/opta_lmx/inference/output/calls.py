"""The grammars of tool calls: from the marker that begins them to the last call that follows it."""

import json
import re
from collections.abc import Sequence
from typing import Any

from opta_lmx.inference.output.arguments import Parameters, python_arguments
from opta_lmx.inference.output.call_writer import CallWriter
from opta_lmx.inference.output.cursor import Cursor, Malformed, Steps
from opta_lmx.inference.output.formats import Body, CallForm, ToolFormat
from opta_lmx.inference.output.json_text import MAX_DEPTH, decoded, read_string, scan_number, scan_string, scan_value
from opta_lmx.types import JsonObject

_NAME = re.compile(r"[\w.\-:/]*")
_KEY = re.compile(r"[\w.\-]*")
_PYTHON_PLAIN = re.compile(r"""[^()\[\]{}"'\\]*""")
_ORDINAL = re.compile(r":\d+$")
_WORDS = {"true": True, "false": False, "null": None}


class CallReader:
    """Reads calls at the cursor. Every method raises Malformed where the text is no call; calls whole by then stay."""

    def __init__(self, cursor: Cursor, writer: CallWriter, tools: Sequence[JsonObject]) -> None:
        self._cursor = cursor
        self._writer = writer
        self._parameters = Parameters(tools)

    def group(self, table: ToolFormat) -> Steps[None]:
        """A marker and all calls that belong to it; without a marker, a bare JSON call."""
        cursor = self._cursor
        begin, end = table.section
        in_section = bool(begin) and (yield from cursor.take(begin))
        form = yield from self._next_form(table, first=True)
        if form is None:
            raise Malformed
        marked = in_section or bool(form.open)
        while form is not None:
            yield from self._call(form, marked)
            separated = bool(table.separator) and (yield from cursor.take_spaced(table.separator))
            form = yield from self._next_form(table, first=False)
            if separated and form is None:
                raise Malformed
        # A call without its opening mark may still have the closing one: the prompt, or the model's habit, left it out.
        if end and marked and (yield from cursor.take_spaced(end)):
            self._writer.mark = cursor.pos

    def envelope(self) -> Steps[None]:
        """One JSON object with a name and arguments."""
        yield from self._cursor.skip_space()
        yield from self._object(marked=False)

    def arguments(self, name: str) -> Steps[None]:
        """A JSON object, passed on as it comes; ``CallWriter.close`` is left to the caller."""
        yield from self._cursor.skip_space()
        if (yield from self._cursor.peek()) != "{":
            raise Malformed
        self._writer.open(name)
        yield from scan_value(self._cursor)
        self._writer.seal()

    def _next_form(self, table: ToolFormat, *, first: bool) -> Steps[CallForm | None]:
        """The form of the call that comes next; its opening marker is read."""
        for form in table.forms:
            if form.open:
                if (yield from self._cursor.take_spaced(form.open)):
                    return form
                continue
            following = yield from self._cursor.peek_spaced()
            if form.body is Body.JSON and following and following in ("{[" if first else "{"):
                return form
            if form.body is Body.NAMED_JSON and first and _NAME.fullmatch(following) and following:
                return form
        return None

    def _call(self, form: CallForm, marked: bool) -> Steps[None]:
        yield from self._cursor.skip_space()
        match form.body:
            case Body.JSON if (yield from self._cursor.take("[")):
                yield from self._list(marked)
            case Body.JSON:
                yield from self._object(marked)
            case Body.NAMED_JSON:
                yield from self._named(form)
            case Body.PARAMETERS:
                yield from self._pairs(form)
            case Body.BRACES:
                yield from self._braces(form)

    def _list(self, marked: bool) -> Steps[None]:
        """``[{...}, {...}]`` or ``[name(key=value), ...]``; the opening bracket is read."""
        cursor = self._cursor
        while True:
            yield from cursor.skip_space()
            if (yield from cursor.peek()) == "{":
                yield from self._object(marked)
            else:
                yield from self._python_call()
            if not (yield from cursor.take_spaced(",")):
                break
        yield from cursor.skip_space()
        yield from cursor.expect("]")
        self._writer.mark = cursor.pos

    def _object(self, marked: bool) -> Steps[None]:
        """``{"name": ..., "arguments": {...}}``. Arguments that come after the name stream.

        Without a marker before it an object with a name but no arguments is no call: it is what JSON looks like.
        """
        cursor, writer = self._cursor, self._writer
        name: str | None = None
        arguments: str | None = None
        streams = False
        yield from cursor.expect("{")
        while True:
            key = yield from read_string(cursor)
            yield from cursor.skip_space()
            yield from cursor.expect(":")
            yield from cursor.skip_space()
            if key in ("name", "tool_name") and name is None:
                name = yield from read_string(cursor)
            elif key in ("arguments", "parameters") and arguments is None and not streams:
                if name and (yield from cursor.peek()) == "{":
                    yield from self.arguments(name)
                    streams = True
                else:
                    arguments = yield from self._held_arguments()
            else:
                yield from scan_value(cursor)
            if not (yield from cursor.take_spaced(",")):
                break
        yield from cursor.skip_space()
        yield from cursor.expect("}")
        if streams:
            writer.close()
        elif name and (marked or arguments is not None):
            writer.write(name, arguments or "{}")
        else:
            raise Malformed

    def _held_arguments(self) -> Steps[str]:
        """Arguments written before the name, or as the text of an object, or as null."""
        start = self._cursor.pos
        yield from scan_value(self._cursor)
        written = self._cursor.text[start : self._cursor.pos]
        value = decoded(written)
        if isinstance(value, str):
            written = value or "{}"
            value = decoded(written)
        if value is None:
            return "{}"
        if not isinstance(value, dict):
            raise Malformed
        return written

    def _named(self, form: CallForm) -> Steps[None]:
        cursor = self._cursor
        name = yield from self._name(form)
        while (yield from cursor.take_any_spaced(*form.between)):
            yield from cursor.skip_space()
            word = yield from cursor.run(_NAME)
            name = word if word and form.last_word_names else name
        name = _ORDINAL.sub("", name.removeprefix("functions."))
        if not name:
            raise Malformed
        yield from self.arguments(name)
        self._writer.close()
        yield from cursor.take_any_spaced(*form.after)
        if form.close:
            yield from cursor.take_spaced(form.close)
        self._writer.mark = cursor.pos

    def _pairs(self, form: CallForm) -> Steps[None]:
        cursor = self._cursor
        name = yield from self._name(form)
        values: dict[str, Any] = {}
        while (yield from cursor.take_spaced(form.key_open)):
            key = (yield from cursor.until(form.key_close)).strip()
            if form.value_open:
                yield from cursor.skip_space()
                yield from cursor.expect(form.value_open)
            value = yield from self._pair_value(form)
            values[key] = self._parameters.typed(name, key, value)
        yield from cursor.skip_space()
        yield from cursor.expect(form.close)
        self._writer.write(name, json.dumps(values, ensure_ascii=False))

    def _pair_value(self, form: CallForm) -> Steps[str]:
        """Bare text up to the closing marker that a key or the end of the call follows, less the newlines around."""
        pieces = [(yield from self._cursor.until(form.value_close))]
        while not (yield from self._cursor.follows_spaced(form.key_open, form.close)):
            pieces.append((yield from self._cursor.until(form.value_close)))
        return form.value_close.join(pieces).removeprefix("\n").removesuffix("\n")

    def _python_call(self) -> Steps[None]:
        """``name(key=value, ...)`` with literals for values."""
        cursor = self._cursor
        name = yield from cursor.run(_KEY)
        yield from cursor.expect("(")
        start = cursor.pos
        closers = [")"]
        while closers:
            yield from cursor.run(_PYTHON_PLAIN)
            char = yield from cursor.peek()
            if not char:
                raise Malformed
            cursor.pos += 1
            quoted = closers[-1] in "\"'"
            if char == "\\":
                cursor.pos += bool((yield from cursor.peek()))
            elif char == closers[-1]:
                closers.pop()
            elif not quoted:
                if char in ")]}":
                    raise Malformed
                closers.append({"(": ")", "[": "]", "{": "}"}.get(char, char))
        if not name:
            raise Malformed
        self._writer.write(name, python_arguments(cursor.text[start : cursor.pos - 1]))

    def _braces(self, form: CallForm) -> Steps[None]:
        name = yield from self._name(form)
        if (yield from self._cursor.peek()) != "{":
            raise Malformed
        values = yield from self._brace_value(form.quote, 0)
        self._writer.write(name, json.dumps(values, ensure_ascii=False))

    def _brace_value(self, quote: str, depth: int) -> Steps[Any]:
        """One value: ``{key:value,...}``, ``[value,...]``, a quoted string, a number, or a word."""
        cursor = self._cursor
        if depth > MAX_DEPTH:
            raise Malformed
        if (yield from cursor.take_spaced(quote)):
            return (yield from cursor.until(quote))
        yield from cursor.skip_space()
        if (yield from cursor.take("{")):
            return (yield from self._brace_members(quote, depth))
        if (yield from cursor.take("[")):
            items: list[Any] = []
            while not (yield from cursor.take_spaced("]")):
                items.append((yield from self._brace_value(quote, depth + 1)))
                if not (yield from cursor.take_spaced(",")) and not (yield from cursor.follows_spaced("]")):
                    raise Malformed
            return items
        start = cursor.pos
        following = yield from cursor.peek()
        if following == '"':
            yield from scan_string(cursor)
        elif following and following in "-0123456789":
            yield from scan_number(cursor)
        else:
            word = yield from cursor.run(_KEY)
            if not word:
                raise Malformed
            return _WORDS.get(word, word)
        return decoded(cursor.text[start : cursor.pos])

    def _brace_members(self, quote: str, depth: int) -> Steps[dict[str, Any]]:
        cursor = self._cursor
        members: dict[str, Any] = {}
        while not (yield from cursor.take_spaced("}")):
            if (yield from cursor.take_spaced(quote)):
                key = yield from cursor.until(quote)
            else:
                yield from cursor.skip_space()
                key = yield from cursor.run(_KEY)
            yield from cursor.skip_space()
            yield from cursor.expect(":")
            members[key] = yield from self._brace_value(quote, depth + 1)
            if not (yield from cursor.take_spaced(",")) and not (yield from cursor.follows_spaced("}")):
                raise Malformed
        return members

    def _name(self, form: CallForm) -> Steps[str]:
        yield from self._cursor.skip_space()
        name = yield from self._cursor.run(_NAME)
        if not name:
            raise Malformed
        yield from self._cursor.expect(form.name_close)
        return name
