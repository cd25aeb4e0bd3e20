"""What the text of an answer turns into: plain text, reasoning, and tool calls as they are written.

One vocabulary for every model family and every dialect. A call is announced once, by its name; its arguments follow as
pieces of JSON text that together are one JSON object.
"""

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the answer itself."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStarted:
    """The model calls the tool ``name``; ``index`` counts the calls of one answer from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of the JSON text of call ``index``'s arguments."""

    index: int
    text: str


OutputEvent: TypeAlias = Text | Reasoning | CallStarted | CallArguments
