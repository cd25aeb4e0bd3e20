"""A conversation in the forms that chat templates differ in, the client's own first.

Templates are programs of many hands: some want a call's arguments as an object, some as text; some raise where roles do
not alternate, where a system message is not the first or is there at all, or where a call's id is not of their form.
"""

import json
from collections.abc import Iterator, Sequence

from opta_lmx.types import JsonObject

# Mistral's templates refuse ids of another length.
_ID_LENGTH = 9

_PARAGRAPH = "\n\n"


def histories(messages: Sequence[JsonObject]) -> Iterator[list[JsonObject]]:
    """Each form of the conversation once, from what the client sent to what the most templates take.

    1 arguments as objects, as transformers asks for; 2 as texts; 3, 4 the same, normalised; 5, 6 and without system.
    """
    plain = normalised(messages)
    seen: list[list[JsonObject]] = []
    for history in (list(messages), plain, without_system(plain)):
        for form in (with_objects(history), history):
            if form not in seen:
                seen.append(form)
                yield form


def with_objects(messages: Sequence[JsonObject]) -> list[JsonObject]:
    """The arguments of earlier calls as objects, where their text is one."""
    return [
        {**message, "tool_calls": [_with_object(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def normalised(messages: Sequence[JsonObject]) -> list[JsonObject]:
    """One system message, at the beginning, no empty turns, and no two turns of one role in a row but tools' results.

    Every message has a role, and content that is a text or nothing.
    """
    system = _PARAGRAPH.join(_text(message) for message in messages if message["role"] == "system" and _text(message))
    history: list[JsonObject] = [{"role": "system", "content": system}] if system else []
    for message in messages:
        role = message["role"]
        if role == "system" or not (_text(message) or message.get("tool_calls") or role == "tool"):
            continue
        if history and history[-1]["role"] == role != "tool":
            history[-1] = _merged(history[-1], message)
        else:
            history.append(message)
    return [_with_short_ids(message) for message in history]


def without_system(messages: Sequence[JsonObject]) -> list[JsonObject]:
    """A normalised conversation whose system message opens the first message of the user."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return list(messages)
    system, user, *rest = messages
    return [{**user, "content": system["content"] + _PARAGRAPH + _text(user)}, *rest]


def _text(message: JsonObject) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""


def _with_object(call: JsonObject) -> JsonObject:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        # A call without arguments is written "" by some clients.
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _merged(first: JsonObject, second: JsonObject) -> JsonObject:
    content = _PARAGRAPH.join(filter(None, (_text(first), _text(second))))
    calls = [*first.get("tool_calls", ()), *second.get("tool_calls", ())]
    return {**first, **second, "content": content, **({"tool_calls": calls} if calls else {})}


def _with_short_ids(message: JsonObject) -> JsonObject:
    shortened = dict(message)
    if isinstance(message.get("tool_call_id"), str):
        shortened["tool_call_id"] = _short_id(message["tool_call_id"])
    if message.get("tool_calls"):
        shortened["tool_calls"] = [
            {**call, "id": _short_id(call["id"])} if isinstance(call.get("id"), str) else call
            for call in message["tool_calls"]
        ]
    return shortened


def _short_id(id: str) -> str:
    """The last nine letters and digits: the end of an id tells calls apart better than its beginning."""
    return "".join(char for char in id if char.isascii() and char.isalnum())[-_ID_LENGTH:].rjust(_ID_LENGTH, "0")
