"""A conversation in the forms that chat templates differ in, the client's own first.

Templates are programs of many hands: some want a call's arguments as an object, some as text; some raise where roles do
not alternate, where a system message is not the first or is there at all, where a turn has two calls or any, or where a
call's id is not of their form. What they lose without raising is told by their ``Traits``.
"""

import json
from collections.abc import Iterator, Sequence

from opta_lmx.inference.worker.template_traits import Traits
from opta_lmx.types import JsonObject

# Mistral's templates refuse ids of another length.
_ID_LENGTH = 9

_PARAGRAPH = "\n\n"


def histories(messages: Sequence[JsonObject], traits: Traits | None = None) -> Iterator[list[JsonObject]]:
    """Each form of the conversation once, from what the client sent to what the most templates take.

    1 as sent, 2 normalised, 3 without a system role, 4 one call a turn, 5 begun by the user, 6 calls told as text. Each
    has its arguments as objects, as transformers asks for, then as texts, then as objects at any price. ``traits``
    leave out the forms of which the template would lose a part.
    """
    seen: list[list[JsonObject]] = []
    for history in _bases(with_names(messages), traits or Traits()):
        for form in (with_objects(history), history, with_objects(history, at_any_price=True)):
            if form not in seen:
                seen.append(form)
                yield form


def _bases(messages: list[JsonObject], traits: Traits) -> Iterator[list[JsonObject]]:
    told = _keeping_calls(messages, traits)
    plain = normalised(told)
    bare = without_system(plain)
    roles = [message["role"] for message in messages]
    if "system" not in roles or _keeps_system(roles, traits):
        if traits.late_system or "system" not in roles[1:]:
            yield told
        yield plain
    yield bare
    for history in (plain, bare):
        yield with_single_calls(history)
    yield begun_by_user(bare)
    texts = normalised(with_calls_as_text(messages))
    yield texts
    yield begun_by_user(without_system(texts))


def _keeping_calls(messages: list[JsonObject], traits: Traits) -> list[JsonObject]:
    known = {call.get("id") for message in messages for call in message.get("tool_calls") or ()}
    results = [message.get("tool_call_id") for message in messages if message["role"] == "tool"]
    if not traits.lone_result and not known.issuperset(results):
        return with_calls_as_text(messages)
    if traits.calls:
        return messages
    return with_null_content(messages) if traits.calls_beside_null else with_calls_as_text(messages)


def _keeps_system(roles: list[str], traits: Traits) -> bool:
    if set(roles) == {"system"}:
        return traits.lone_system
    return traits.system and (traits.system_at_results or not traits.calls or roles[-1] != "tool")


def with_names(messages: Sequence[JsonObject]) -> list[JsonObject]:
    """Each result of a tool with the name of the tool, which OpenAI leaves to the call and many templates print."""
    names: dict[object, object] = {}
    named: list[JsonObject] = []
    for message in messages:
        for call in message.get("tool_calls") or ():
            if isinstance(call.get("function"), dict):
                names[call.get("id")] = call["function"].get("name")
        name = names.get(message.get("tool_call_id")) if message["role"] == "tool" else None
        named.append({**message, "name": name} if name and "name" not in message else message)
    return named


def with_objects(messages: Sequence[JsonObject], *, at_any_price: bool = False) -> list[JsonObject]:
    """The arguments of earlier calls as objects, where their text is one; else ``at_any_price`` the text within one."""
    return [
        {**message, "tool_calls": [_with_object(call, at_any_price) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def with_null_content(messages: Sequence[JsonObject]) -> list[JsonObject]:
    """Calls in turns of their own, with null for content, as OpenAI writes them."""
    history: list[JsonObject] = []
    for message in messages:
        if message.get("tool_calls") and _text(message):
            history.append({"role": message["role"], "content": message["content"]})
        history.append({**message, "content": None} if message.get("tool_calls") else message)
    return history


def with_single_calls(messages: Sequence[JsonObject]) -> list[JsonObject]:
    """A turn with several calls as one turn for each, followed by its own result."""
    history: list[JsonObject] = []
    results = {message.get("tool_call_id"): message for message in messages if message["role"] == "tool"}
    moved: set[object] = set()
    for message in messages:
        calls = message.get("tool_calls") or ()
        if len(calls) < 2:
            if message["role"] != "tool" or message.get("tool_call_id") not in moved:
                history.append(message)
            continue
        for at, call in enumerate(calls):
            said = message if at == 0 else {"role": message["role"], "content": ""}
            history.append({**said, "tool_calls": [call]})
            if call.get("id") in results:
                moved.add(call["id"])
                history.append(results[call["id"]])
    return history


def with_calls_as_text(messages: Sequence[JsonObject]) -> list[JsonObject]:
    """Calls as words of the assistant and results as words of the user, for templates that know neither."""
    return [_as_text(message) for message in messages]


def begun_by_user(messages: Sequence[JsonObject]) -> list[JsonObject]:
    """An assistant that speaks first is given an empty turn to answer."""
    opens = bool(messages) and messages[0]["role"] == "assistant"
    return [*([{"role": "user", "content": ""}] if opens else []), *messages]


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
    """A normalised conversation whose system message opens the first message of the user, or is one."""
    if not messages or messages[0]["role"] != "system":
        return list(messages)
    system, *rest = messages
    if not rest or rest[0]["role"] != "user":
        return [{**system, "role": "user"}, *rest]
    return [{**rest[0], "content": system["content"] + _PARAGRAPH + _text(rest[0])}, *rest[1:]]


def _text(message: JsonObject) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""


def _with_object(call: JsonObject, at_any_price: bool) -> JsonObject:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    text = function["arguments"]
    try:
        # A call without arguments is written "" by some clients.
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        if not at_any_price:
            return call
        arguments = {"arguments": text}
    return {**call, "function": {**function, "arguments": arguments}}


def _as_text(message: JsonObject) -> JsonObject:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{_text(message)}\n</tool_response>"}
    calls = [call["function"] for call in message.get("tool_calls") or () if isinstance(call.get("function"), dict)]
    if not calls:
        return message
    written = [f"<tool_call>\n{_call_text(function)}\n</tool_call>" for function in calls]
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": "\n".join(filter(None, (_text(message), *written)))}


def _call_text(function: JsonObject) -> str:
    arguments = function.get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f'{{"name": {json.dumps(function.get("name"))}, "arguments": {text or "{}"}}}'


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
