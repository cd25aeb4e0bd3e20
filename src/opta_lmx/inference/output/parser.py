"""The one parser of answers: text in pieces of any size becomes text, reasoning and tool calls.

The result does not depend on where the pieces are cut. No text is lost: what looks like a call and is none comes out as
Text, as written; white space around calls and newlines around reasoning are the only exceptions.
"""

import re
from collections.abc import Sequence

from opta_lmx.inference.output import channels
from opta_lmx.inference.output.call_writer import CallWriter
from opta_lmx.inference.output.calls import CallReader
from opta_lmx.inference.output.cursor import Cursor, Malformed, Steps
from opta_lmx.inference.output.events import OutputEvent, Reasoning, Text
from opta_lmx.inference.output.formats import REASONING_FORMATS, TOOL_FORMATS, ReasoningFormat, ToolFormat
from opta_lmx.inference.output.markers import marker_pattern, risky_pattern
from opta_lmx.types import JsonObject

_NO_CALLS = ToolFormat(())


class OutputParser:
    """Reads one answer. Raises KeyError at once for a format neither table knows.

    ``tools`` are OpenAI tool objects; their schemas type arguments that are written as bare text. ``in_reasoning``: the
    prompt has opened the reasoning. ``forced``: the answer is one JSON object with a name and arguments, made under a
    grammar, whatever the model's own format.

    A call whose arguments have begun to stream and then break off cannot be taken back: its arguments stay without
    their last brace, so they are no JSON, and Text with the whole call as written follows. Who puts together a whole
    answer drops calls whose arguments are no JSON. A forced call that is cut off is never Text: it has the arguments it
    came to, and is not told of if it ends before them.
    """

    def __init__(
        self,
        *,
        tool_format: str | None = None,
        reasoning_format: str | None = None,
        tools: Sequence[JsonObject] = (),
        in_reasoning: bool = False,
        forced: bool = False,
    ) -> None:
        self._calls_table = TOOL_FORMATS[tool_format] if tool_format is not None else _NO_CALLS
        self._marks = REASONING_FORMATS[reasoning_format] if reasoning_format is not None else ReasoningFormat()
        self._cursor = Cursor()
        self._writer = CallWriter(self._cursor)
        self._reader = CallReader(self._cursor, self._writer, tools)
        self._drops_space = tool_format is not None or forced
        self._reasoning = in_reasoning
        self._forced = forced
        self._newlines = ""  # the end of the reasoning so far, dropped if nothing follows
        self._space = ""  # the end of the text so far
        self._lead = False
        self._said = False
        self._thought = False
        self._plain: type[Text] | type[Reasoning] | None = None
        self._risky = risky_pattern((), spaces="")
        harmony = "harmony" in (tool_format, reasoning_format)
        self._steps = self._messages() if harmony and not forced else self._answer()
        next(self._steps, None)

    @property
    def reasoning(self) -> bool:
        """True while the text that comes next belongs to the reasoning."""
        return self._reasoning

    @property
    def called(self) -> bool:
        """True once a whole call has been read."""
        return self._writer.any_whole

    def feed(self, text: str) -> list[OutputEvent]:
        """What ``text``, the next piece of the answer, makes certain."""
        plain = self._plain
        if plain is not None and text and self._risky.search(text) is None:
            return [plain(text)]
        self._cursor.text += text
        return self._advance()

    def finish(self) -> list[OutputEvent]:
        """What was held back, once the answer has ended. Nothing may be fed after it."""
        self._cursor.ended = True
        return self._advance()

    def _advance(self) -> list[OutputEvent]:
        self._plain = None
        next(self._steps, None)
        self._writer.flush()
        events = self._writer.events
        self._writer.events = []
        return events

    # -- answers with marks around reasoning and calls ---------------------------------------------

    def _answer(self) -> Steps[None]:
        start, end = self._marks.start, self._marks.end
        if end and (self._reasoning or (yield from self._cursor.follows_spaced(start))):
            yield from self._think(start, end)
        self._reasoning = False
        if self._forced:
            yield from self._forced_call()
        elif self._calls_table.bare:
            following = yield from self._cursor.peek_spaced()
            if following and following in "{[":
                yield from self._attempt(self._reader.group(self._calls_table))
        found, risky = self._patterns(self._calls_table.starts)
        while (yield from self._prose(found, risky)):
            yield from self._attempt(self._reader.group(self._calls_table))
        self._end_of_text()

    def _forced_call(self) -> Steps[None]:
        """The call that the answer is. Where the answer ends inside it, what there is of it is a call all the same."""
        self._writer.mark = self._cursor.pos
        try:
            yield from self._reader.envelope()
        except Malformed:
            if self._cursor.ended:
                self._cursor.pos = len(self._cursor.text)
                self._writer.cut_off()
            else:
                self._say(self._writer.abandon())

    def _think(self, start: str, end: str) -> Steps[None]:
        """Reasoning up to its closing mark or the end of the answer."""
        self._reasoning = True
        yield from self._cursor.take_spaced(start)
        self._lead = True
        found, risky = self._patterns((end,))
        if (yield from self._prose(found, risky)):
            yield from self._cursor.expect(end)
        self._leave_reasoning()
        self._lead = True

    # -- answers in channels (harmony) -------------------------------------------------------------

    def _messages(self) -> Steps[None]:
        openers, both = channels.OPENERS, channels.OPENERS + channels.CLOSERS
        in_message = self._reasoning
        self._lead = in_message
        if not in_message and (yield from self._cursor.follows_spaced("to=functions.")):
            in_message = yield from self._message(False)
        while True:
            found, risky = self._patterns(both if in_message else openers)
            if not (yield from self._prose(found, risky)):
                break
            if (yield from self._cursor.take_any_spaced(*channels.CLOSERS)):
                self._leave_reasoning()
                in_message = False
            else:
                in_message = yield from self._message(in_message)
        self._leave_reasoning()
        self._end_of_text()

    def _message(self, in_message: bool) -> Steps[bool]:
        """A header and, if it is a call's, its arguments; True if the text that follows is the message's."""
        self._writer.mark = self._cursor.pos
        try:
            header = yield from channels.read_header(self._cursor)
            if header.tool is not None and self._calls_table.channels:
                self._leave_reasoning()
                in_message = False
                yield from self._reader.arguments(header.tool)
                yield from self._end_of_call()
                return in_message
        except Malformed:
            self._say(self._writer.abandon())
            return in_message
        self._leave_reasoning()
        self._reasoning = header.channel == "analysis"
        if self._reasoning and self._thought:
            self._writer.events.append(Reasoning("\n"))
        self._lead = self._reasoning
        return True

    def _end_of_call(self) -> Steps[None]:
        """What may follow a call's arguments; raises Malformed at anything else."""
        cursor = self._cursor
        closed = (yield from cursor.take_any_spaced(*channels.CLOSERS)) or not (yield from cursor.peek_spaced())
        if not closed and not (yield from cursor.follows_spaced(*channels.OPENERS)):
            raise Malformed
        self._writer.close()

    def _leave_reasoning(self) -> None:
        self._newlines = ""
        self._reasoning = self._lead = False

    # -- text ---------------------------------------------------------------------------------------

    def _attempt(self, steps: Steps[None]) -> Steps[None]:
        """Calls from the cursor on; what turns out to be none is said as it was written."""
        self._writer.mark = self._cursor.pos
        try:
            yield from steps
        except Malformed:
            self._say(self._writer.abandon())

    def _prose(self, found: re.Pattern[str], risky: re.Pattern[str]) -> Steps[bool]:
        """Say all text up to the next marker and stop before it; False if the answer ends first."""
        cursor = self._cursor
        while True:
            marker = found.search(cursor.text, cursor.pos)
            whole = marker is not None and marker[1] is not None
            end = marker.start() if marker and (whole or not cursor.ended) else len(cursor.text)
            self._say(cursor.text[cursor.pos : end])
            cursor.pos = end
            if whole or cursor.ended:
                return whole
            cursor.drop()
            self._note_plain(risky)
            yield

    def _say(self, piece: str) -> None:
        """Say ``piece`` in the present channel, less what the trimming rules drop or hold back.

        Newlines around reasoning go. White space beside calls goes at the ends of the answer and stays between words.
        """
        if self._lead:
            piece = piece.lstrip("\n")
            self._lead = not piece
        if self._reasoning:
            piece = self._newlines + piece
            body = piece.rstrip("\n")
            self._newlines = piece[len(body) :]
            if body:
                self._thought = True
                self._writer.events.append(Reasoning(body))
            return
        piece = self._space + piece
        body = piece.rstrip() if self._drops_space else piece
        self._space = piece[len(body) :]
        if self._writer.any_whole and not self._said:
            body = body.lstrip()
        if body:
            self._said = True
            self._writer.events.append(Text(body))

    def _end_of_text(self) -> None:
        """The white space held back is the answer's own if no call stands beside it."""
        if self._space and not self._writer.any_whole:
            self._writer.events.append(Text(self._space))

    def _patterns(self, literals: Sequence[str]) -> tuple[re.Pattern[str], re.Pattern[str]]:
        spaces = r"\n" if self._reasoning else r"\s" if self._drops_space else ""
        return marker_pattern(literals), risky_pattern(literals, spaces=spaces)

    def _note_plain(self, risky: re.Pattern[str]) -> None:
        """Remember whether a piece without anything risky in it may pass as it is."""
        if self._cursor.text or self._lead:
            return
        if self._reasoning:
            self._plain = Reasoning if self._thought and not self._newlines else None
        elif not self._drops_space or (self._said and not self._space):
            self._plain = Text
        self._risky = risky
