"""What a chat template passes over in silence, found by rendering conversations of a few words once.

A template that raises tells what it does not take; one that writes less than it was given does not. Each trait here was
found in templates of known models: Mistral's drop the system message while a tool's result comes last, DeepSeek's drop
calls beside a content that is not null, MiniMax's and gpt-oss's a system message that is not the first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from opta_lmx.types import JsonObject

# Gives the text of a conversation, or None where the template raises.
Render: TypeAlias = Callable[[list[JsonObject]], str | None]

_CALL = {"id": "qcall0001", "type": "function", "function": {"name": "qname", "arguments": {"qkey": "qvalue"}}}
_SYSTEM = {"role": "system", "content": "qsystem"}
_USER = {"role": "user", "content": "quser"}
_ANSWER = {"role": "assistant", "content": "qanswer"}
_CALLING = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_RESULT = {"role": "tool", "name": "qname", "content": "qresult", "tool_call_id": "qcall0001"}


@dataclass(frozen=True, slots=True)
class Traits:
    """True where a template does not lose what it is given; what makes it raise counts as not lost.

    ``lone_system``: a system message and nothing else. ``late_system``: one after the first. ``system_at_results``: the
    first one while a result comes last. ``calls``: calls and their results where the content beside a call is an empty
    text; ``calls_beside_null``: where it is null. ``lone_result``: a result without its call.
    """

    system: bool = True
    lone_system: bool = True
    late_system: bool = True
    system_at_results: bool = True
    calls: bool = True
    calls_beside_null: bool = True
    lone_result: bool = True


def traits_of(render: Render) -> Traits:
    """Try it out, with seven conversations."""

    def keeps(messages: Sequence[JsonObject], *words: str) -> bool:
        text = render(list(messages))
        return text is None or all(word in text for word in words)

    with_null: list[JsonObject] = [_USER, {**_CALLING, "content": None}, _RESULT]
    return Traits(
        system=keeps([_SYSTEM, _USER], "qsystem"),
        lone_system=keeps([_SYSTEM], "qsystem"),
        late_system=keeps([_USER, _ANSWER, _SYSTEM, _USER], "qsystem"),
        system_at_results=keeps([_SYSTEM, _USER, _CALLING, _RESULT], "qsystem"),
        calls=keeps([_USER, _CALLING, _RESULT], "qvalue", "qresult"),
        calls_beside_null=keeps(with_null, "qvalue", "qresult"),
        lone_result=keeps([_USER, _RESULT], "qresult"),
    )
