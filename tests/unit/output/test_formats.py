"""The tables of formats: which one a chat template asks for, and what its markers are."""

from typing import get_args

import pytest

from opta_lmx.config_models import ReasoningFormat as ReasoningFormatName
from opta_lmx.config_models import ToolFormat as ToolFormatName
from opta_lmx.inference.output.formats import (
    HARMONY_MARKERS,
    REASONING_FORMATS,
    TOOL_FORMATS,
    detect_reasoning_format,
    detect_tool_format,
    markers,
)
from tests.unit.output.corpus import FORMATS, deepseek

_JSON_CALL = '<tool_call>\\n{"name": "\' + tool_call.name + \'"'


@pytest.mark.parametrize(
    ("template", "tools", "reasoning"),
    [
        ("{{ message.content }}", None, None),
        (f"{{{{ '{_JSON_CALL}' }}}}", "hermes", None),
        (f"{{{{ '{_JSON_CALL}' }}}} content.split('</think>')", "hermes", "think"),
        ("'<tool_call>\\n<function=' + tool_call.name", "qwen3_xml", None),
        ("<|start_header_id|> <|python_tag|> tools", "llama", None),
        ('<|start_header_id|> tools {"name": function name, "parameters": dictionary}', "llama", None),
        ("<|start_header_id|> {{ message.content }}", None, None),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS]", "mistral", None),
        ("[TOOL_CALLS] [THINK] [ARGS]", "mistral", "mistral"),
        (deepseek("tool▁calls▁begin") + " </think>", "deepseek_v3", "think"),
        ("<tool_call> <arg_key> <arg_value> <think></think>", "glm47", "think"),
        ("<|tool_calls_section_begin|> <|tool_call_begin|>", "kimi", None),
        ("<|start|>assistant<|channel|>analysis<|message|>", "harmony", "harmony"),
        ("<|tool_call>call: <tool_call|> <|channel>thought <channel|>", "gemma", "gemma"),
        ("<minimax:tool_call> <tool_call> <think>", "minimax", "think"),
        ("<|tool_call|> available_tools", "granite", None),
        ("<|tool_list_start|> <|tool_call_start|>", "pythonic", None),
        ("<seed:think>", None, "seed"),
        ("<seed:think> <seed:tool_call>\n<function=", "seed", "seed"),
        ("<|START_THINKING|> <|START_ACTION|>[ ]<|END_ACTION|>", "command", "command"),
        ("<TOOLCALL>[ ]</TOOLCALL> <think>", "nemotron", "think"),
        ("within <tool_call></tool_call> tags: <tool_calls>[", "tool_calls", None),
        ('<function name=" <param name=" <think>', "minicpm", "think"),
        ("<|im_system|>tool_declare<|im_middle|>", "kimi", None),
        ("<|tool|> <|tool_call|>{ }<|/tool_call|>", "granite", None),
        ('<|header_start|> tools {"name": function name, "parameters": dictionary}', "llama", None),
    ],
)
def test_the_template_names_the_formats(template: str, tools: str | None, reasoning: str | None) -> None:
    """Each family is known by what only its chat template holds."""
    assert detect_tool_format(template) == tools
    assert detect_reasoning_format(template) == reasoning


def test_the_settings_know_every_format() -> None:
    """Each name of the tables can be set, and none that is in no table, but the word for none of them."""
    assert set(get_args(ToolFormatName)) == {*TOOL_FORMATS, "none"}
    assert set(get_args(ReasoningFormatName)) == {*REASONING_FORMATS, "none"}


def test_every_format_of_the_table_is_in_the_corpus() -> None:
    """No format goes untested."""
    assert set(TOOL_FORMATS) == set(FORMATS)


def test_markers_are_what_the_worker_must_keep() -> None:
    """The set holds every literal of both formats, and nothing without a format."""
    assert markers(None, None) == frozenset()
    assert markers("hermes", "think") >= {"<tool_call>", "</tool_call>", "<think>", "</think>"}
    assert markers("harmony", "harmony") == markers(None, "harmony") == frozenset(HARMONY_MARKERS)
    assert markers("mistral", "mistral") == {"[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]"}
    assert markers("gemma", "gemma") >= {"<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>"}
    assert deepseek("tool▁sep") in markers("deepseek_v3", None)


def test_no_marker_is_empty() -> None:
    """An empty marker would match everything."""
    assert all(all(markers(tools, reasoning)) for tools in TOOL_FORMATS for reasoning in REASONING_FORMATS)


def test_unknown_names_are_refused() -> None:
    """A name that is in no table is an error, not an empty set."""
    with pytest.raises(KeyError):
        markers("klingon", None)
    with pytest.raises(KeyError):
        markers(None, "klingon")
