"""A place in a text that is still arriving, and the steps every grammar here is made of.

A grammar is a generator: it yields when it needs text that has not come yet and goes on where it stopped, so it reads
the same whatever the pieces are. Nothing may be decided on the end of the text unless ``ended`` is true.
"""

import re
from collections.abc import Callable, Generator
from typing import TypeAlias, TypeVar

_T = TypeVar("_T")
Steps: TypeAlias = Generator[None, None, _T]

_SPACE = re.compile(r"[ \t\r\n]*")


class Malformed(Exception):
    """The text at the cursor is not what the grammar asks for, or it ended too early."""


class Cursor:
    """``text`` is what has arrived and is still needed, ``pos`` the next character, ``ended`` that nothing follows."""

    def __init__(self) -> None:
        self.text = ""
        self.pos = 0
        self.ended = False

    def drop(self) -> None:
        """Forget what was read. Offsets into ``text`` taken before lose their meaning."""
        self.text = self.text[self.pos :]
        self.pos = 0

    def peek(self) -> Steps[str]:
        """The next character, "" at the end."""
        while self.pos >= len(self.text):
            if self.ended:
                return ""
            yield
        return self.text[self.pos]

    def take(self, literal: str) -> Steps[bool]:
        """Read ``literal`` if it comes next; False, and nothing read, if it does not."""
        return (yield from self._take_at(lambda: self.pos, literal))

    def take_spaced(self, literal: str) -> Steps[bool]:
        """The same, with any white space before it; without the literal the white space stays unread, too."""
        return (yield from self._take_at(self._after_space, literal))

    def take_any_spaced(self, *literals: str) -> Steps[bool]:
        """Read the first of ``literals`` that comes next, with any white space before it."""
        for literal in literals:
            if (yield from self.take_spaced(literal)):
                return True
        return False

    def expect(self, literal: str) -> Steps[None]:
        """Read ``literal``; raises Malformed if something else comes next."""
        if not (yield from self.take(literal)):
            raise Malformed

    def peek_spaced(self) -> Steps[str]:
        """The next character that is not white space, "" at the end; nothing is read."""
        while (at := self._after_space()) == len(self.text):
            if self.ended:
                return ""
            yield
        return self.text[at]

    def follows_spaced(self, *literals: str) -> Steps[bool]:
        """True if, after any white space, one of ``literals`` comes next; nothing is read."""
        while True:
            rest = self.text[(at := self._after_space()) : at + max(map(len, literals))]
            if rest.startswith(literals):
                return True
            if self.ended or not any(literal.startswith(rest) for literal in literals):
                return False
            yield

    def skip_space(self) -> Steps[None]:
        """Read all white space that comes next."""
        while True:
            self.pos = self._after_space()
            if self.pos < len(self.text) or self.ended:
                return
            yield

    def run(self, pattern: re.Pattern[str]) -> Steps[str]:
        """Read as much as ``pattern``, a repeated character class, matches; perhaps nothing."""
        start = self.pos
        while True:
            found = pattern.match(self.text, self.pos)
            self.pos = found.end() if found else self.pos
            if self.pos < len(self.text) or self.ended:
                return self.text[start : self.pos]
            yield

    def until(self, end: str) -> Steps[str]:
        """Read up to and past ``end``, give what stood before it; raises Malformed if it never comes."""
        start = searched = self.pos
        while (at := self.text.find(end, searched)) < 0:
            if self.ended:
                self.pos = len(self.text)
                raise Malformed
            searched = max(start, len(self.text) - len(end) + 1)
            yield
        self.pos = at + len(end)
        return self.text[start:at]

    def _after_space(self) -> int:
        found = _SPACE.match(self.text, self.pos)
        return found.end() if found else self.pos

    def _take_at(self, where: Callable[[], int], literal: str) -> Steps[bool]:
        size = len(literal)
        while True:
            at = where()
            have = self.text[at : at + size]
            if have == literal:
                self.pos = at + size
                return True
            if self.ended or not literal.startswith(have):
                return False
            yield
