"""Calls as events: whole, or while their arguments are still being written."""

from opta_lmx.inference.output.cursor import Cursor, Malformed
from opta_lmx.inference.output.events import CallArguments, CallStarted, OutputEvent


class CallWriter:
    """Turns what the grammars read into CallStarted and CallArguments.

    The last brace of arguments that stream waits for ``close``, so a call's arguments are one JSON object exactly when
    the call was whole. ``mark`` is where the text begins that no whole call accounts for.
    """

    def __init__(self, cursor: Cursor) -> None:
        self._cursor = cursor
        self.events: list[OutputEvent] = []
        self.count = 0
        self.any_whole = False
        self.mark = 0
        self._streamed: int | None = None
        self._sealed = False

    def write(self, name: str, arguments: str) -> None:
        """A whole call; raises Malformed for text that cannot be sent."""
        _check(name + arguments)
        self.events += (CallStarted(self.count, name), CallArguments(self.count, arguments))
        self.count += 1
        self._whole()

    def open(self, name: str) -> None:
        """A call whose arguments begin at the cursor; raises Malformed for a name that cannot be sent."""
        _check(name)
        self.events.append(CallStarted(self.count, name))
        self.count += 1
        self._streamed = self._cursor.pos

    def flush(self) -> None:
        """Pass on what has been read of open arguments."""
        self._pass_on(self._cursor.pos)

    def seal(self) -> None:
        """The cursor stands behind the last brace of the arguments."""
        self._pass_on(self._cursor.pos - 1)
        self._streamed = None
        self._sealed = True

    def close(self) -> None:
        """The call whose arguments were sealed is whole."""
        self.events.append(CallArguments(self.count - 1, "}"))
        self._sealed = False
        self._whole()

    def cut_off(self) -> None:
        """The answer ended at the cursor, inside a call that is one whatever is missing of it."""
        self.flush()
        self._streamed = None
        if self._sealed:
            self.close()

    def abandon(self) -> str:
        """Give up the call at the cursor: the text since ``mark``, as written."""
        self.flush()
        self._streamed = None
        self._sealed = False
        return self._cursor.text[self.mark : self._cursor.pos]

    def _whole(self) -> None:
        self.any_whole = True
        self.mark = self._cursor.pos

    def _pass_on(self, end: int) -> None:
        if self._streamed is not None and end > self._streamed:
            self.events.append(CallArguments(self.count - 1, self._cursor.text[self._streamed : end]))
            self._streamed = end


def _check(text: str) -> None:
    # Half of a surrogate pair can be written as an escape, but is no character.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Malformed from error
