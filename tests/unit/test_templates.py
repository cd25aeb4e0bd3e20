"""Templates in bounds: what runs or grows for ever is refused, what does not comes out as transformers' own."""

import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from jinja2 import TemplateError

from opta_lmx.errors import InvalidRequest
from opta_lmx.inference.worker.prompts import PromptReader
from opta_lmx.inference.worker.templates import Templates
from opta_lmx.types import ChatPrompt, JsonObject
from tests import tiny_tokenizers

MESSAGES: list[JsonObject] = [{"role": "user", "content": "U"}]
# What runs for ever is given so much time, and has to be over in ten times as much, compilation and all.
BOUND_SECONDS = 0.1
MOST_SECONDS = 1.0
MOST_BYTES = 400_000_000


def _doubling(step: str, first: str = "'a'") -> str:
    return f"{{% set n = namespace(x={first}) %}}{{% for i in range(99) %}}{step}{{% endfor %}}{{{{ n.x }}}}"


RUNS = {
    "loops in loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "loops without a body": "{% for i in range(100000) %}{% for j in range(100000) if 0 %}{% endfor %}{% endfor %}",
    "filters": "{% for i in range(100000) %}{% set x = range(100000) | map('string') | list %}{% endfor %}",
    "macros": "{% macro f(x) %}{% if x %}{{ f(x - 1) }}{{ f(x - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "comparisons": "{% set a = 'a' * 9999999 %}{% set b = 'a' * 9999999 %}"
    "{% for i in range(99999) if a == b and 0 %}{% endfor %}",
}
GROWS = {
    "output": "{% for i in range(100000) %}{% for j in range(100000) %}0123456789012345{% endfor %}{% endfor %}",
    "times": "{{ 'a' * 10**9 }}",
    "lists": "{{ [1] * 10**9 }}",
    "a power": "{{ 10 ** (10 ** 9) }}",
    "plus": _doubling("{% set n.x = n.x + n.x %}"),
    "tilde": _doubling("{% set n.x = n.x ~ n.x %}"),
    "a block": _doubling("{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}"),
    "autoescape": _doubling("{% autoescape true %}{% set n.x = n.x ~ n.x %}{% endautoescape %}"),
    "a list": _doubling("{% set n.x = n.x + n.x %}", "[1]"),
    "a list of lists": _doubling("{% set n.x = [n.x, n.x] %}"),
    "a dict of dicts": _doubling("{% set n.x = dict(a=n.x, b=n.x) %}", "1"),
    "arguments": "{% macro f(n) %}{{ f(n - 1, varargs, varargs) if n else varargs }}{% endmacro %}{{ f(99, 1, 2) }}",
    "slices": _doubling("{% for j in range(999) %}{% set n.x = n.x + [b[1:]] %}{% endfor %}", "[]").replace(
        "{%", "{% set b = 'b' * 1000000 %}{%", 1
    ),
    "copies": _doubling("{% for j in range(999) %}{% set n.x = n.x + [b.upper()] %}{% endfor %}", "[]").replace(
        "{%", "{% set b = 'b' * 1000000 %}{%", 1
    ),
    "a filtered block": "{% filter upper %}{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}{% endfilter %}",
    "a width": "{{ 'a' | center(1000000000) }}",
    "a method's width": "{{ 'a'.zfill(1000000000) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent with a star": "{{ '%*d' % (1000000000, 1) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format of a format": "{{ '{:{}}'.format(1, 1000000000) }}",
    "replace": "{% set a = 'a' * 10000 %}{{ a.replace('a', a) }}",
    "a replace filter": "{% set a = 'a' * 10000 %}{{ a | replace('a', a) }}",
    "join": "{% set a = 'a' * 100000 %}{{ a.join(a) }}",
    "a join filter": "{% set a = 'a' * 100000 %}{{ range(100000) | join(a) }}",
    "indent": "{{ ('\\n' * 100000) | indent(100000) }}",
    "indented json": "{{ [[1]] | tojson(indent=100000000) }}",
    "slice": "{{ [1] | slice(1000000000) | list }}",
    "batch": "{{ [1] | batch(1000000000, 0) | list }}",
    "round": "{{ 5 | round(-1000000000) }}",
    "tabs": "{{ ('\\t' * 100000).expandtabs(100000) }}",
    "bytes": "{{ (5).to_bytes(1000000000) }}",
    "a sum of lists": "{{ ([[1] * 1000] * 10000) | sum(start=[]) }}",
    "tags": "{{ ('<!---->' * 1000000) | striptags }}",
    "splits": "{{ ('ab,' * 10000000).split(',') | length }}",
    "a template": "x" * 1_000_001,
}
FAILS = {
    "a deep expression": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep loops": "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
    "deep branches": "{% if 1 %}" * 150 + "{% endif %}" * 150,
    "a block in itself": "{% block a %}{{ self.a() }}{% endblock %}",
    "a loop in itself": "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
}


def spelling(template: str | dict[str, str]) -> Any:
    """A tokenizer that can spell every text and has a beginning."""
    tokenizer: Any = tiny_tokenizers.byte_level()
    tokenizer.chat_template = template
    tokenizer.bos_token = "<s>"
    return tokenizer


def reader(template: str | dict[str, str]) -> PromptReader:
    """Over such a tokenizer."""
    return PromptReader(spelling(template), 1000, Templates(BOUND_SECONDS))


@pytest.mark.parametrize("template", [*RUNS.values(), *GROWS.values(), *FAILS.values()], ids=[*RUNS, *GROWS, *FAILS])
def test_a_template_that_never_ends_is_refused(template: str) -> None:
    """In bounded time and memory, as the request's own fault, whatever it tries."""
    most, started = _peak_bytes(), time.thread_time()
    with pytest.raises(InvalidRequest, match="does not accept these messages"):
        reader(template).render(ChatPrompt(MESSAGES))
    assert time.thread_time() - started < MOST_SECONDS
    assert _peak_bytes() - most < MOST_BYTES


def _peak_bytes() -> int:
    """The most memory this process has had at any time."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def test_after_a_refusal_other_messages_are_taken() -> None:
    """Nothing of a rendering that was given up weighs on the next."""
    tokens = reader("{% for m in messages %}{{ m.content * (10 ** 9 if m.content == 'B' else 1) }}{% endfor %}")
    with pytest.raises(InvalidRequest, match="made more than"):
        tokens.render(ChatPrompt([{"role": "user", "content": "B"}]))
    assert tokens.render(ChatPrompt(MESSAGES)) == "U"


def _call(arguments: Any) -> JsonObject:
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "type": "function", "function": function}]}


TOOLS = [{"type": "function", "function": {"name": "f", "description": "é <&>", "parameters": {"type": "object"}}}]
RESULT = {"role": "tool", "content": "R", "tool_call_id": "c"}
CONVERSATIONS: list[list[JsonObject]] = [
    MESSAGES,
    [{"role": "system", "content": "S é\n"}, *MESSAGES, {"role": "assistant", "content": "A", "reasoning": "T"}],
    [*MESSAGES, _call({"a": [1, None, True, "x"]}), RESULT],
    [*MESSAGES, _call("{}"), RESULT, {"role": "assistant", "content": "A", "thinking": "T", "reasoning_content": None}],
]
# One trait of templates of known models each.
ORDINARY = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m.content | trim }}{% endfor %}{{ eos_token }}",
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% endfor %}",
    "{{ tools | tojson }}{{ tools | tojson(indent=2) }}{{ tools | tojson(ensure_ascii=true) }}",
    "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ loop.index }}/{{ loop.length }}"
    "{% if m.tool_calls %}{% break %}{% endif %}{% endfor %}",
    "{% for m in messages[::-1] %}{% for c in m.tool_calls or [] %}{% for k, v in c.function.arguments | items %}"
    "{{ k }}={{ v if v is string else v | tojson }};{% endfor %}{% endfor %}{% endfor %}",
    "{% macro say(m, end='\n') %}{{ m.role }}{{ caller() if caller }}{{ end }}{% endmacro %}"
    "{% for m in messages if m.role != 'tool' %}{% call say(m) %}{{ m.content }}{% endcall %}{% endfor %}",
    "{% set ns = namespace(text='', seen=[]) %}{% for m in messages %}{% set ns.text = ns.text ~ m.role ~ loop.index %}"
    "{% set ns.seen = ns.seen + [m.role] %}{% endfor %}{{ ns.text }}{{ ns.seen | join(', ') }}"
    "{{ ns.seen | unique | list }}",
    "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.name is defined }}{% endfor %}",
    "{{ '%s-%05.1f' % ('a', 1.25) }}{{ '{:>8}|{x}'.format('a', x=1) }}{{ 'a,b'.split(',')[-1] }}"
    "{{ 7 // 2 ** 2 * 3 % 5 }}",
    "{{ messages | map(attribute='role') | join('|') | upper }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list }}",
    "{{ strftime_now('%Y')[:2] }}{{ dict(a=1) | tojson }}{{ {'b': [1, {'c': none}]} }}{{ (1, 2) }}{{ [] }}",
    "{% set x %}{{ messages[0].content }}{% endset %}{{ x * 3 }}{% filter replace('U', 'V') %}{{ x }}{% endfilter %}",
    "{{ add_generation_prompt }}{{ enable_thinking | default('unset') }}{{ documents is none }}{{ tools is none }}",
    "{{ raise_exception('no') if tools else 'yes' }}",
    "{{ messages[0].content.nothing.at }}",
    "{% if messages[0].role == 'system' %}{{ undefined_function() }}{% endif %}",
    "{% autoescape true %}{{ '<' ~ messages[0].content ~ '>' }}{% endautoescape %}",
)


def outcome(render: Callable[[], str]) -> str | tuple[str, str]:
    """The text, or what was raised."""
    try:
        return render()
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        return type(error).__name__, str(error)


@pytest.mark.parametrize("template", ORDINARY)
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["one", "reasoning", "objects", "texts"])
@pytest.mark.parametrize(("tools", "variables"), [(None, {}), (TOOLS, {"enable_thinking": False, "eos_token": "</s>"})])
def test_an_ordinary_template_says_what_it_says_in_transformers(
    template: str, messages: list[JsonObject], tools: list[JsonObject] | None, variables: JsonObject
) -> None:
    """The same text, or the same complaint."""
    tokens, tokenizer = reader(template), spelling(template)
    theirs = partial(tokenizer.apply_chat_template, messages, tools=tools, tokenize=False, add_generation_prompt=True)
    expected = outcome(partial(theirs, **variables))
    assert outcome(lambda: tokens.apply(messages, ChatPrompt(messages, tools, variables))) == expected


def test_tools_choose_their_template() -> None:
    """Where a model has one for them."""
    tokens = reader({"default": "plain {{ messages[0].content }}", "tool_use": "tools {{ messages[0].content }}"})
    assert tokens.render(ChatPrompt(MESSAGES)) == "plain U"
    assert tokens.render(ChatPrompt(MESSAGES, TOOLS)) == "tools U"


def test_a_long_history_costs_little_more_than_in_transformers() -> None:
    """A hundred messages take at most twice as long as in transformers' own sandbox (0.9 times were measured)."""
    template = ORDINARY[0] + ORDINARY[1] + ORDINARY[6]
    tokens, tokenizer = reader(template), spelling(template)
    messages = [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "A" * 500}] * 50

    def best(render: Any) -> float:
        seconds = []
        for _ in range(7):
            started = time.thread_time()
            render()
            seconds.append(time.thread_time() - started)
        return min(seconds)

    ours = best(lambda: tokens.apply(messages, ChatPrompt(messages)))
    theirs = best(lambda: tokenizer.apply_chat_template(messages, tokenize=False))
    assert ours < 2 * theirs
