"""The messages a harmony answer is made of: who speaks in which channel, and to whom."""

import re
from dataclasses import dataclass

from opta_lmx.inference.output.cursor import Cursor, Malformed, Steps

OPENERS = ("<|start|>", "<|channel|>")
CLOSERS = ("<|end|>", "<|call|>", "<|return|>")

_WORDS = re.compile(r"[^<\n]*")
_CHANNEL = re.compile(r"<\|channel\|>\s*(analysis|commentary|final)\b")
_RECIPIENT = re.compile(r"\bto=functions\.([\w.\-]+)")
# The longest header a model writes is under 100 characters; past this it is prose about markers.
_LONGEST_HEADER = 400


@dataclass(frozen=True, slots=True)
class Header:
    """What a message is: ``channel`` names it, ``tool`` is set when it is a call."""

    channel: str
    tool: str | None


def read_header(cursor: Cursor) -> Steps[Header]:
    """Read up to and past ``<|message|>``, from an opener on or from the words after one that stands in the prompt.

    Raises Malformed if that is no header of a message.
    """
    start = cursor.pos
    yield from cursor.run(_WORDS)
    while not (yield from cursor.take("<|message|>")):
        for part in (*OPENERS, "<|constrain|>"):
            if (yield from cursor.take(part)):
                break
        else:
            raise Malformed
        yield from cursor.run(_WORDS)
        if cursor.pos - start > _LONGEST_HEADER:
            raise Malformed
    written = cursor.text[start : cursor.pos]
    channel, tool = _CHANNEL.search(written), _RECIPIENT.search(written)
    if channel is None:
        raise Malformed
    return Header(channel[1], tool[1] if tool else None)
