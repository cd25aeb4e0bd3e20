"""What each choice of a generation says, told apart into text, reasoning and tool calls, and counted.

The same for whole and for streamed answers; ``answer.py`` gives it OpenAI's form.
"""

from collections.abc import Iterable, Iterator
from itertools import groupby

import msgspec

from opta_lmx.api.openai.tools import ToolUse
from opta_lmx.inference.engine import Generation
from opta_lmx.inference.output.events import CallArguments, CallStarted, OutputEvent, Reasoning, Text
from opta_lmx.inference.output.parser import OutputParser
from opta_lmx.types import Delta, TokenLogprob


class AnswerOutput:
    """The choices of one generation, read by one parser each."""

    def __init__(self, generation: Generation, use: ToolUse, choices: int) -> None:
        self._generation = generation
        self._may_stop = use.single
        self._forced = use.forced
        self._choices = [ChoiceOutput(_parser_for(generation, use), single_call=use.single) for _ in range(choices)]

    @property
    def completion_tokens(self) -> int:
        """Tokens made for all choices, those of reasoning and calls included."""
        return sum(choice.completion_tokens for choice in self._choices)

    @property
    def reasoning_tokens(self) -> int:
        """Tokens that came while their choice was reasoning."""
        return sum(choice.reasoning_tokens for choice in self._choices)

    def called(self, choice: int) -> bool:
        """True once the choice has called a tool, in JSON that can be read."""
        return bool(self._choices[choice].calls())

    def whole(self, choice: int, events: Iterable[OutputEvent]) -> Iterator[OutputEvent]:
        """All the choice's events without its broken calls, whose text stands in the content as it was written.

        A forced call that is cut off has no text but what there is of its arguments.
        """
        good = self._choices[choice].calls()
        for event in events:
            if self._forced or isinstance(event, Text | Reasoning) or event.index in good:
                yield event

    def add(self, delta: Delta) -> tuple[list[OutputEvent], list[TokenLogprob]]:
        """What one delta means, and the log-probabilities in it that belong to the content.

        Once every choice has said all it may, the generation is asked for no more.
        """
        said = self._choices[delta.choice].add(delta)
        if self._may_stop and all(choice.full for choice in self._choices if not choice.ended):
            self._may_stop = False
            self._generation.stop()
        return said


class ChoiceOutput:
    """One choice. ``single_call``: what follows its first call is dropped, and it is ``full`` from there."""

    def __init__(self, parser: OutputParser | None, *, single_call: bool) -> None:
        """``parser`` None: everything is text."""
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        self.full = False
        self.ended = False
        self._parser = parser
        self._single_call = single_call
        self._in_content = True
        self._arguments: list[list[str]] = []

    def add(self, delta: Delta) -> tuple[list[OutputEvent], list[TokenLogprob]]:
        """As ``AnswerOutput.add``."""
        self.completion_tokens += delta.token_count
        self.ended = delta.finish is not None
        parser = self._parser
        if parser is None:
            return [Text(delta.text)] if delta.text else [], delta.logprobs or []
        reasoned = parser.reasoning
        if reasoned:
            self.reasoning_tokens += delta.token_count
        events = parser.feed(delta.text) if delta.text else []
        if self.ended:
            events = [*events, *parser.finish()]
        events = [event for event in events if self._may_say(event)]
        if events:
            self._in_content = isinstance(events[-1], Text)
        beside = reasoned or parser.reasoning or not self._in_content
        return events, [] if beside else delta.logprobs or []

    def calls(self) -> frozenset[int]:
        """The indices of the calls whose arguments are an object of JSON by now."""
        return frozenset(index for index, pieces in enumerate(self._arguments) if _is_object("".join(pieces)))

    def _may_say(self, event: OutputEvent) -> bool:
        if isinstance(event, CallStarted):
            self.full = self.full or (self._single_call and bool(self._arguments))
            self._arguments.append([])
        elif isinstance(event, CallArguments):
            self._arguments[event.index].append(event.text)
        return not self.full


def merged(events: Iterable[OutputEvent]) -> Iterator[OutputEvent]:
    """The same said in as few events as can be: neighbours of one kind are joined."""
    for (kind, index), run in groupby(events, key=_kind_and_call):
        if kind is CallStarted:
            yield from run
            continue
        text = "".join(event.text for event in run if not isinstance(event, CallStarted))
        if kind is CallArguments:
            yield CallArguments(index, text)
        else:
            yield Reasoning(text) if kind is Reasoning else Text(text)


def _kind_and_call(event: OutputEvent) -> tuple[type, int]:
    return type(event), event.index if isinstance(event, CallStarted | CallArguments) else -1


def _is_object(text: str) -> bool:
    try:
        return isinstance(msgspec.json.decode(text), dict)
    except (msgspec.DecodeError, RecursionError):
        return False


def _parser_for(generation: Generation, use: ToolUse) -> OutputParser | None:
    facts = generation.facts
    tool_format = facts.tool_format if use.tools and not use.forced else None
    # A call that is forced on a harmony model begins in its last channel (``worker/marks.py``).
    channels = use.forced and facts.reasoning_format == "harmony"
    reasoning_format = None if channels else facts.reasoning_format
    if tool_format is None and reasoning_format is None and not use.forced:
        return None
    return OutputParser(
        tool_format=tool_format,
        reasoning_format=reasoning_format,
        tools=[tool.shown for tool in use.tools],
        in_reasoning=generation.starts_in_reasoning,
        forced=use.forced,
    )
