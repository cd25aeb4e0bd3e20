"""Chat templates as they are found, and the conversations that clients send them."""

from contextlib import suppress
from typing import Any

import pytest

from opta_lmx.errors import ContextTooLong, InvalidRequest
from opta_lmx.inference.worker.prompts import PromptReader
from opta_lmx.types import ChatPrompt, JsonObject, TextPrompt
from tests import tiny_tokenizers

SYSTEM = {"role": "system", "content": "S"}
USER = {"role": "user", "content": "U"}
ASSISTANT = {"role": "assistant", "content": "A"}

LIST = "{% for m in messages %}[{{ m['role'] }}:{{ m['content'] }}]{% endfor %}"
ALTERNATING = (
    "{% for m in messages %}{% if m['role'] != 'system' %}"
    "{% set place = loop.index0 - (1 if messages[0]['role'] == 'system' else 0) %}"
    "{% if (m['role'] == 'user') != (place % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% elif not loop.first %}{{ raise_exception('system comes first') }}{% endif %}{% endfor %}" + LIST
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + ALTERNATING
NO_EMPTY = "{% for m in messages %}{% if not m.content %}{{ raise_exception('empty') }}{% endif %}{% endfor %}" + LIST
CALLS = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
WALKS = CALLS + "{% for k, v in c.function.arguments | items %}{{ k }}={{ v }};{% endfor %}{% endfor %}{% endfor %}"
JOINS = CALLS + "{{ 'args ' + c.function.arguments }}{% endfor %}{% endfor %}"
NINE = CALLS + (
    "{% if c.id | length != 9 %}{{ raise_exception('ids') }}{% endif %}"
    "{{ c.id ~ c.function.arguments }}{% endfor %}{% endfor %}"
)
NAMED = (
    "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments }}{% endfor %}"
    "{% if m.role == 'tool' %}({{ m.name }}){% if not m.name %}{{ raise_exception('name') }}{% endif %}{% endif %}"
    "{% endfor %}"
)
ONE_CALL = (
    "{% for m in messages %}{% if m.tool_calls %}{% if m.tool_calls | length > 1 %}{{ raise_exception('one') }}"
    "{% endif %}[{{ m.tool_calls[0].function.name }}{{ m.tool_calls[0].function.arguments.qkey }}]"
    "{% else %}[{{ m.role }}:{{ m.content }}]{% endif %}{% endfor %}"
)
# What templates lose in silence, each as it was found in one of a known model.
NO_CALLS = (
    "{% for m in messages %}{% if m.role in ('system', 'user', 'assistant') %}[{{ m.role }}:{{ m.content }}]"
    "{% endif %}{% endfor %}"
)
CALL_AS_TEXT = (
    '[user:U][assistant:<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>]'
    "[user:<tool_response>\nR\n</tool_response>]"
)
CALLS_BESIDE_NULL = (
    "{% for m in messages %}{% if m.tool_calls and m.content is none %}({{ m.tool_calls[0].function.arguments }})"
    "{% else %}[{{ m.content }}]{% endif %}{% endfor %}"
)
FIRST_SYSTEM = (
    "{% for m in messages %}{% if m.role != 'system' or loop.first %}[{{ m.content }}]{% endif %}{% endfor %}"
)
SYSTEM_BEFORE_USER = (
    "{% for m in messages %}{% if m.role != 'system' %}"
    "[{% if loop.last and m.role == 'user' and messages[0].role == 'system' %}{{ messages[0].content }}/{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments }}{% endfor %}]{% endif %}{% endfor %}"
)
RESULT = {"role": "tool", "content": "R", "tool_call_id": "call_abcdefghijkl"}
OTHER = {"role": "tool", "content": "Q", "tool_call_id": "other"}


def reader(template: str) -> PromptReader:
    """Over a tokenizer that can spell every text."""
    tokenizer = tiny_tokenizers.byte_level()
    tokenizer.chat_template = template
    return PromptReader(tokenizer, 1000)


def calling(arguments: str) -> JsonObject:
    """An assistant's turn with one call."""
    call = {"id": "call_abcdefghijkl", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


TWO_CALLS: JsonObject = {
    **calling("{}"),
    "tool_calls": [
        *calling("{}")["tool_calls"],
        {"id": "other", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ],
}


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (LIST, [USER, USER, SYSTEM], "[user:U][user:U][system:S]"),
        (ALTERNATING, [SYSTEM, USER, ASSISTANT], "[system:S][user:U][assistant:A]"),
        (ALTERNATING, [SYSTEM, USER, USER, ASSISTANT], "[system:S][user:U\n\nU][assistant:A]"),
        (ALTERNATING, [USER, SYSTEM, USER], "[system:S][user:U\n\nU]"),
        (NO_EMPTY, [USER, {"role": "assistant", "content": ""}, USER], "[user:U\n\nU]"),
        (NO_SYSTEM, [SYSTEM, USER, USER], "[user:S\n\nU\n\nU]"),
        (WALKS, [USER, calling('{"a": 1, "b": [2]}')], "Ua=1;b=[2];"),
        (WALKS, [USER, calling("no JSON")], "Uarguments=no JSON;"),
        (JOINS, [USER, calling('{"a": 1}')], 'Uargs {"a": 1}'),
        (NINE, [USER, calling("{}")], "Udefghijkl{}"),
        (NO_CALLS, [USER, calling("{}"), RESULT], CALL_AS_TEXT),
        (ONE_CALL, [USER, TWO_CALLS, RESULT, OTHER], "[user:U][f][tool:R][g][tool:Q]"),
        (NAMED, [USER, calling("{}"), RESULT], "U{}R(f)"),
        (ALTERNATING, [ASSISTANT, USER], "[user:][assistant:A][user:U]"),
        (ALTERNATING, [SYSTEM, ASSISTANT, USER], "[user:S][assistant:A][user:U]"),
    ],
)
def test_a_conversation_is_brought_into_a_form_the_template_takes(
    template: str, messages: list[JsonObject], expected: str
) -> None:
    """What was sent is rendered as it is where that can be; else the nearest form that can."""
    assert reader(template).render(ChatPrompt(messages)) == expected


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (CALLS_BESIDE_NULL, [USER, calling("{}"), RESULT], "[U]({})[R]"),
        (CALLS_BESIDE_NULL, [USER, {**calling("{}"), "content": "T"}, RESULT], "[U][T]({})[R]"),
        (FIRST_SYSTEM, [SYSTEM, USER], "[S][U]"),
        (FIRST_SYSTEM, [USER, ASSISTANT, SYSTEM, USER], "[S][U][A][U]"),
        (SYSTEM_BEFORE_USER, [SYSTEM, USER], "[S/U]"),
        (SYSTEM_BEFORE_USER, [SYSTEM, USER, calling("{}"), RESULT], "[S\n\nU][{}][R]"),
        (SYSTEM_BEFORE_USER, [SYSTEM], "[S]"),
        (NO_CALLS, [USER, RESULT], "[user:U][user:<tool_response>\nR\n</tool_response>]"),
    ],
)
def test_nothing_is_lost_in_silence(template: str, messages: list[JsonObject], expected: str) -> None:
    """A template that would pass over a part of what was sent is given it in a form that it does not pass over."""
    assert reader(template).render(ChatPrompt(messages)) == expected


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('never mind') }}", "never mind"),
        ("{{ 1 // 0 }}", "division"),
        ("{{ messages[5].content }}", "no element 5"),
        ("{{ nothing.at.all }}", "undefined"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "Range too big"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "recursion"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% if %}", "Expected an expression"),
    ],
)
def test_a_template_that_takes_no_form_is_a_refusal(template: str, words: str) -> None:
    """The request's fault to the client, with the template's own words; never an exception of another kind."""
    with pytest.raises(InvalidRequest, match="does not accept these messages") as caught:
        reader(template).render(ChatPrompt([USER, calling("no JSON")]))
    assert words.lower() in str(caught.value).lower()
    assert caught.value.param == "messages"


def test_a_complaint_is_short() -> None:
    """A template may quote all it was given."""
    with pytest.raises(InvalidRequest) as caught:
        reader("{{ raise_exception('x' * 10000) }}").render(ChatPrompt([USER]))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["raise_exception", "messages", "self", "namespace", "x y"])
def test_any_variable_is_bearable(name: str) -> None:
    """A client's variable may stand in a function's place."""
    prompt = ChatPrompt([USER, USER], template_kwargs={name: {"a": None}})
    with suppress(InvalidRequest):
        assert reader(ALTERNATING).render(prompt) == "[user:U\n\nU]"


def test_the_answers_opening_is_part_of_the_prompt() -> None:
    """It counts, also against the context."""
    tokens: Any = reader(LIST)
    plain = tokens.read(TextPrompt("hi"), 100)
    assert tokens.read(TextPrompt("hi"), 100, (7, 8)) == [*plain, 7, 8]
    with pytest.raises(ContextTooLong):
        tokens.read(TextPrompt("hi"), len(plain) + 2, (7, 8))
