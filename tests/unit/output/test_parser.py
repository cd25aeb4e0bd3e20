"""The parser of answers: what it reads, that cuts do not matter, that nothing is lost."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opta_lmx.inference.output.events import CallArguments, CallStarted, OutputEvent, Reasoning, Text
from opta_lmx.inference.output.parser import OutputParser
from tests.unit.output.corpus import ANSWERS, EMPTY, FORMATS, FULL, PARIS, Answer, Said, read, said, written


def _whole_calls(heard: Said) -> list[tuple[str, object]]:
    return [(name, json.loads(arguments)) for name, arguments in heard.calls]


def _name(answer: Answer) -> str:
    return f"{answer.format or answer.reasoning_format}:{answer.output[:40]!r}"


@pytest.mark.parametrize("answer", ANSWERS, ids=_name)
def test_it_says_what_the_model_meant(answer: Answer) -> None:
    """Calls, text and reasoning of every answer of the corpus are told apart."""
    heard = read(answer)
    assert _whole_calls(heard) == list(answer.calls)
    assert heard.text.strip() == answer.text.strip() if answer.calls else heard.text == answer.text
    assert heard.reasoning == answer.reasoning


@pytest.mark.parametrize("answer", ANSWERS, ids=_name)
def test_cuts_do_not_matter(answer: Answer) -> None:
    """Every cut in two, and one piece a character, gives the events of the whole."""
    expected = read(answer)
    output = answer.output
    assert read(answer, output) == expected
    for at in range(1, len(output)):
        assert read(answer, [output[:at], output[at:]]) == expected, at


@given(st.sampled_from(ANSWERS), st.data())
def test_any_cuts_of_any_beginning_give_the_same(answer: Answer, data: st.DataObject) -> None:
    """A truncated answer in random pieces reads as the truncated answer in one."""
    end = data.draw(st.integers(0, len(answer.output)))
    cuts = sorted(data.draw(st.sets(st.integers(0, end), max_size=8)) | {0, end})
    pieces = [answer.output[a:b] for a, b in pairwise(cuts)]
    assert read(answer, pieces) == read(answer, [answer.output[:end]])


_SCRAPS = """
<tool_call> </tool_call> <function=f> </function> <parameter=a> </parameter> <arg_key> <think> </think> [ARGS]
{"name":"f", "arguments":{ } { [ ] , : " \\ \\u12 null f 1 - f(a= ( ' [TOOL_CALLS] <|python_tag|> <|tool_call>call:f{a:
<|"|> <|start|>assistant <|channel|>final <|message|> <|end|> <|call|> <|channel|>commentary&to=functions.f & @
"""
_PIECES = st.sampled_from([scrap.replace("&", " ").replace("@", "\n") for scrap in _SCRAPS.split()])


@given(st.sampled_from(FORMATS), st.lists(_PIECES, max_size=14))
def test_any_rubbish_reads_the_same_in_any_pieces(name: str, pieces: list[str]) -> None:
    """Markers and scraps in any order raise nothing and read as the whole does."""
    reasoning = "harmony" if name == "harmony" else "think"
    output = "".join(pieces)
    answer = Answer(name, output, reasoning_format=reasoning)
    expected = read(answer)
    assert read(answer, pieces) == expected
    assert read(answer, output) == expected


@given(st.sampled_from([name for name in FORMATS if name != "harmony"]), st.lists(_PIECES, max_size=14))
def test_text_without_a_call_comes_out_as_written(name: str, pieces: list[str]) -> None:
    """Where no call is whole, the text is the output, to the character."""
    output = "".join(pieces)
    heard = read(Answer(name, output))
    if not any(arguments.endswith("}") and _is_json(arguments) for _, arguments in heard.calls):
        assert heard.text == output


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


@pytest.mark.parametrize("name", FORMATS)
def test_a_truncated_call_comes_out_as_text(name: str) -> None:
    """Cut anywhere before its arguments end, a call is text as written and leaves no arguments that are JSON."""
    output = written(name, [FULL])
    end = output.rindex("1.5") + 3
    for cut in range(1, end):
        heard = read(Answer(name, output[:cut]))
        assert heard.text == output[:cut], cut
        assert not any(_is_json(arguments) for _, arguments in heard.calls)


@pytest.mark.parametrize("name", FORMATS)
def test_what_follows_a_broken_call_is_still_read(name: str) -> None:
    """A call broken in its middle does not hide the whole one after it."""
    output = written(name, [FULL])
    broken = output[: output.rindex("1.5")] + "!! "
    if name in (
        "qwen3_xml",
        "glm47",
        "minicpm",
        "minimax",
        "pythonic",
        "seed",
    ):  # inside a value nothing but its end can be told
        broken = output[: output.index("search") + 6] + " !! "
    heard = read(Answer(name, broken + written(name, [PARIS])))
    assert heard.text.rstrip() == broken.rstrip()
    assert heard.calls[-1] == ("get_weather", json.dumps(PARIS[1]))


def _fed(parser: OutputParser, *pieces: str) -> list[OutputEvent]:
    return [event for piece in pieces for event in parser.feed(piece)]


def test_json_arguments_stream() -> None:
    """Each piece of a JSON call's arguments is passed on as it comes; only the last brace waits for the call's end."""
    parser = OutputParser(tool_format="hermes")
    assert _fed(parser, "<tool_call>", '{"name": "run", ', '"arguments": ') == []
    assert parser.feed('{"code": "pri') == [CallStarted(0, "run"), CallArguments(0, '{"code": "pri')]
    assert parser.feed("nt(1)") == [CallArguments(0, "nt(1)")]
    assert parser.feed('"}') == [CallArguments(0, '"')]
    assert parser.feed("}") == [CallArguments(0, "}")]
    assert _fed(parser, "</tool", "_call>") + parser.finish() == []


@pytest.mark.parametrize("name", ["hermes", "llama", "mistral", "deepseek_v3", "kimi", "harmony", "granite"])
def test_every_json_format_streams(name: str) -> None:
    """Half of the arguments has come out when half of a long string has been written."""
    output = written(name, [("run", {"code": "x" * 100})])
    half = output.index("x" * 50) + 50
    heard = said(_fed(Answer(name, "").parser(), *output[:half]))
    assert heard.calls == [("run", '{"code": "' + "x" * 50)]


def test_plain_text_is_not_held_back() -> None:
    """A word with no marker in sight passes in the call that brings it."""
    parser = OutputParser(tool_format="hermes", reasoning_format="think")
    assert parser.feed("Hello") == [Text("Hello")]
    assert parser.feed(" world") == [Text(" world")]
    assert parser.feed(" a <") == [Text(" a")]
    assert parser.feed("b") == [Text(" <b")]


def test_reasoning_is_told_while_it_lasts() -> None:
    """``reasoning`` says to which side the next text belongs."""
    parser = OutputParser(reasoning_format="think")
    assert not parser.reasoning
    assert parser.feed("<think>") == []
    assert parser.reasoning
    assert parser.feed("\nHm") == [Reasoning("Hm")]
    assert parser.feed(".\n") == [Reasoning(".")]
    assert parser.feed("</think>") == []
    assert not parser.reasoning
    assert parser.feed("\n\nHi") == [Text("Hi")]
    assert parser.finish() == []


def test_the_prompt_may_have_opened_the_reasoning() -> None:
    """With ``in_reasoning`` the first text is reasoning already."""
    parser = OutputParser(reasoning_format="think", in_reasoning=True)
    assert parser.reasoning
    assert parser.feed("Hm") == [Reasoning("Hm")]


def test_called_is_told_by_whole_calls_only() -> None:
    """A call that breaks off does not count, whatever has come out of it."""
    parser = OutputParser(tool_format="hermes")
    parser.feed('<tool_call>{"name": "f", "arguments": {"a": 1}, !')
    assert not parser.called
    parser.feed('<tool_call>{"name": "f", "arguments": {"a": 1}}')
    assert parser.called


def test_text_between_calls_keeps_its_white_space() -> None:
    """Words before and after a call do not grow together."""
    heard = read(Answer("hermes", f"One {written('hermes', [EMPTY])} two\n{written('hermes', [EMPTY])}\n"))
    assert heard.text == "One  two"
    assert [kind for kind, _, _ in heard.order] == ["text", "call", "arguments", "text", "call", "arguments"]


_SCHEMA = {
    "i": {"type": "integer"},
    "n": {"type": "number"},
    "b": {"type": "boolean"},
    "o": {"type": "object"},
    "a": {"type": "array"},
    "s": {"type": "string"},
    "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    "many": {"type": ["integer", "null"]},
    "pick": {"enum": ["1", "2"]},
}


@pytest.mark.parametrize(
    ("key", "written_value", "value"),
    [
        ("i", "7", 7),
        ("i", "seven", "seven"),
        ("n", "7", 7),
        ("n", "1.5", 1.5),
        ("n", "NaN", "NaN"),
        ("b", "true", True),
        ("b", "False", False),
        ("o", '{"x": [1]}', {"x": [1]}),
        ("o", "{'x': True}", {"x": True}),
        ("a", "[1, 2]", [1, 2]),
        ("s", "7", "7"),
        ("s", "null", "null"),
        ("s", '{"x": 1}', '{"x": 1}'),
        ("maybe", "null", None),
        ("maybe", "7", "7"),
        ("many", "null", None),
        ("many", "3", 3),
        ("pick", "1", "1"),
        ("unknown", "7", 7),
        ("unknown", "word", "word"),
    ],
)
def test_bare_values_are_typed_by_the_schema(key: str, written_value: str, value: object) -> None:
    """A value written as bare text has the type its schema names, or stays the text."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": _SCHEMA}}}
    parser = OutputParser(tool_format="qwen3_xml", tools=[tool])
    output = f"<tool_call><function=f><parameter={key}>{written_value}</parameter></function></tool_call>"
    [(name, arguments)] = said(parser.feed(output) + parser.finish()).calls
    assert name == "f"
    assert json.loads(arguments) == {key: value}
    assert type(json.loads(arguments)[key]) is type(value)


@pytest.mark.parametrize("name", ["hermes", "gemma", "pythonic"])
def test_deep_nesting_is_refused_in_bounded_time(name: str) -> None:
    """Ten thousand brackets are no call and no crash."""
    begin = {"hermes": '<tool_call>{"name":"f","arguments":{"a":', "gemma": "<|tool_call>call:f{a:"}
    output = begin.get(name, "<|tool_call_start|>[f(a=") + "[" * 10_000
    assert read(Answer(name, output)).text == output


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("hermes", '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"arguments": "{\\"a\\": 1e999}", "name": "f"}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": []}</tool_call>'),
        ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"arguments": {"a": ' + "9" * 5_000 + '}, "name": "f"}</tool_call>'),
        ("gemma", "<|tool_call>call:f{a:1e999}<tool_call|>"),
        ("gemma", '<|tool_call>call:f{a:"\\udc00"}<tool_call|>'),
        ("kimi", "<|tool_call_begin|>functions.<|tool_call_argument_begin|>{}<|tool_call_end|>"),
        ("pythonic", "<|tool_call_start|>[f(1)]<|tool_call_end|>"),
        ("pythonic", "<|tool_call_start|>[f(a=g())]<|tool_call_end|>"),
        ("pythonic", "<|tool_call_start|>[f(**{})]<|tool_call_end|>"),
        ("pythonic", "<|tool_call_start|>[f(a=" + "-" * 20_000 + "1)]<|tool_call_end|>"),
        ("pythonic", "<|tool_call_start|>[f(a=1" + "+1" * 20_000 + ")]<|tool_call_end|>"),
    ],
)
def test_a_call_that_cannot_be_sent_is_text(name: str, output: str) -> None:
    """Names and arguments no client could read leave the text as it was."""
    heard = read(Answer(name, output))
    assert heard.text == output
    assert heard.calls == []


def test_values_beyond_json_stay_text() -> None:
    """Infinity and half characters in bare values come out as what was written."""
    output = "<tool_call><function=f><parameter=a>1e999</parameter></function></tool_call>"
    assert read(Answer("qwen3_xml", output)).calls == [("f", '{"a": "1e999"}')]


def test_an_unknown_format_is_an_error() -> None:
    """A name that is in no table is refused at once."""
    with pytest.raises(KeyError):
        OutputParser(tool_format="klingon")
