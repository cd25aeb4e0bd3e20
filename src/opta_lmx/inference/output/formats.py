"""How the model families write tool calls and reasoning: tables, and which of them a chat template asks for."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from enum import Enum, auto
from types import MappingProxyType


class Body(Enum):
    """What stands between the markers of a call."""

    # {"name": ..., "arguments" or "parameters": {...}}, a list of these, or [name(key=value), ...]
    JSON = auto()
    # name, then {...}
    NAMED_JSON = auto()
    # name, then key and value pairs between markers; values are bare text
    PARAMETERS = auto()
    # name{key:value,...} with bare keys and strings between marks of their own
    BRACES = auto()


@dataclass(frozen=True, slots=True)
class CallForm:
    """One way to write one call.

    ``between`` may stand after the name of a NAMED_JSON call, followed by one more word: the name itself where
    ``last_word_names``, an id otherwise. ``after`` may follow its arguments. ``close`` is required for PARAMETERS only.
    ``value_open`` may be empty: then the value begins right after ``key_close``.
    """

    body: Body
    open: str = ""
    close: str = ""
    name_close: str = ""
    between: tuple[str, ...] = ()
    last_word_names: bool = False
    after: tuple[str, ...] = ()
    key_open: str = ""
    key_close: str = ""
    value_open: str = ""
    value_close: str = ""
    quote: str = ""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How one family writes its calls: one or more of ``forms``, between ``section`` marks if it has them.

    ``separator`` may stand between calls. ``bare``: an answer may begin with a JSON call without any marker.
    ``channels``: calls are messages to a tool (harmony), and ``forms`` is empty.
    """

    forms: tuple[CallForm, ...]
    section: tuple[str, str] = ("", "")
    separator: str = ""
    bare: bool = False
    channels: bool = False

    @property
    def starts(self) -> tuple[str, ...]:
        """The markers at which a call may begin."""
        alone = (form.open for form in self.forms if form.body is not Body.BRACES)
        return tuple(filter(None, (self.section[0], *alone)))


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """The marks around reasoning; both empty where it is a channel (harmony)."""

    start: str = ""
    end: str = ""


HARMONY_MARKERS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>")


def _deepseek(name: str) -> str:
    # DeepSeek's tokens are written with fullwidth bars.
    return f"<\uff5c{name}\uff5c>"


_XML_PARAMETERS = CallForm(
    Body.PARAMETERS,
    open="<function=",
    close="</function>",
    name_close=">",
    key_open="<parameter=",
    key_close=">",
    value_close="</parameter>",
)

_QWEN = ToolFormat((CallForm(Body.JSON), _XML_PARAMETERS), section=("<tool_call>", "</tool_call>"))

TOOL_FORMATS: Mapping[str, ToolFormat] = MappingProxyType(
    {
        # Command's answers that are no calls stand between marks of their own, which are no part of the text.
        "command": ToolFormat((CallForm(Body.JSON),), section=("<|START_ACTION|>", "<|END_ACTION|>")),
        # Models of both families stray into the other's form, so both are read under either name.
        "hermes": _QWEN,
        "qwen3_xml": _QWEN,
        "llama": ToolFormat(
            (
                CallForm(Body.JSON),
                CallForm(Body.NAMED_JSON, open="<function=", close="</function>", name_close=">"),
            ),
            section=("<|python_tag|>", ""),
            separator=";",
            bare=True,
        ),
        "mistral": ToolFormat(
            (CallForm(Body.JSON), CallForm(Body.NAMED_JSON, between=("[CALL_ID]", "[ARGS]"))),
            section=("[TOOL_CALLS]", ""),
        ),
        "deepseek_v3": ToolFormat(
            (
                CallForm(
                    Body.NAMED_JSON,
                    open=_deepseek("tool▁call▁begin"),
                    close=_deepseek("tool▁call▁end"),
                    between=(_deepseek("tool▁sep"), "```json"),
                    last_word_names=True,
                    after=("```",),
                ),
            ),
            section=(_deepseek("tool▁calls▁begin"), _deepseek("tool▁calls▁end")),
        ),
        "glm47": ToolFormat(
            (
                CallForm(
                    Body.PARAMETERS,
                    open="<tool_call>",
                    close="</tool_call>",
                    key_open="<arg_key>",
                    key_close="</arg_key>",
                    value_open="<arg_value>",
                    value_close="</arg_value>",
                ),
            ),
        ),
        "kimi": ToolFormat(
            (
                CallForm(
                    Body.NAMED_JSON,
                    open="<|tool_call_begin|>",
                    close="<|tool_call_end|>",
                    between=("<|tool_call_argument_begin|>",),
                ),
            ),
            section=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        ),
        "harmony": ToolFormat((), channels=True),
        "gemma": ToolFormat(
            (CallForm(Body.BRACES, open="call:", quote='<|"|>'),), section=("<|tool_call>", "<tool_call|>")
        ),
        "minimax": ToolFormat(
            (
                CallForm(
                    Body.PARAMETERS,
                    open='<invoke name="',
                    close="</invoke>",
                    name_close='">',
                    key_open='<parameter name="',
                    key_close='">',
                    value_close="</parameter>",
                ),
            ),
            section=("<minimax:tool_call>", "</minimax:tool_call>"),
        ),
        "minicpm": ToolFormat(
            (
                CallForm(
                    Body.PARAMETERS,
                    open='<function name="',
                    close="</function>",
                    name_close='">',
                    key_open='<param name="',
                    key_close='">',
                    value_close="</param>",
                ),
            ),
        ),
        "nemotron": ToolFormat((CallForm(Body.JSON),), section=("<TOOLCALL>", "</TOOLCALL>")),
        "seed": ToolFormat((_XML_PARAMETERS,), section=("<seed:tool_call>", "</seed:tool_call>")),
        "tool_calls": ToolFormat((CallForm(Body.JSON),), section=("<tool_calls>", "</tool_calls>")),
        # The closing mark is Phi's.
        "granite": ToolFormat((CallForm(Body.JSON),), section=("<|tool_call|>", "<|/tool_call|>")),
        "pythonic": ToolFormat((CallForm(Body.JSON),), section=("<|tool_call_start|>", "<|tool_call_end|>")),
    }
)

REASONING_FORMATS: Mapping[str, ReasoningFormat] = MappingProxyType(
    {
        "think": ReasoningFormat("<think>", "</think>"),
        "command": ReasoningFormat("<|START_THINKING|>", "<|END_THINKING|>"),
        "harmony": ReasoningFormat(),
        "mistral": ReasoningFormat("[THINK]", "[/THINK]"),
        "gemma": ReasoningFormat("<|channel>thought", "<channel|>"),
        "seed": ReasoningFormat("<seed:think>", "</seed:think>"),
    }
)

# The first whose every string stands in the template; the more particular come before those they contain.
_TOOL_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("harmony", ("<|channel|>", "<|message|>")),
    ("command", ("<|START_ACTION|>", "<|END_ACTION|>")),
    ("seed", ("<seed:tool_call",)),
    ("minimax", ("<minimax:tool_call>",)),
    ("gemma", ("<|tool_call>", "<tool_call|>")),
    ("glm47", ("<arg_key>",)),
    ("pythonic", ("<|tool_call_start|>",)),
    ("pythonic", ("<|tool_list_start|>",)),
    ("qwen3_xml", ("<tool_call>", "<function=")),
    ("minicpm", ('<function name="', '<param name="')),
    ("kimi", ("<|tool_calls_section_begin|>",)),
    # Its first template tells of tools but shows no call.
    ("kimi", ("tool_declare<|im_middle|>",)),
    ("deepseek_v3", (_deepseek("tool▁calls▁begin"),)),
    ("mistral", ("[TOOL_CALLS]",)),
    ("granite", ("<|tool_call|>",)),
    ("nemotron", ("<TOOLCALL>",)),
    ("tool_calls", ("<tool_calls>",)),
    ("hermes", ("<tool_call>",)),
    ("llama", ("<|python_tag|>",)),
    ("llama", ("<|start_header_id|>", "tools", '"parameters"')),
    ("llama", ("<|header_start|>", "tools", '"parameters"')),
)

_REASONING_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("harmony", ("<|channel|>", "<|message|>")),
    ("gemma", ("<|channel>", "<channel|>")),
    ("command", ("<|START_THINKING|>",)),
    ("mistral", ("[THINK]",)),
    ("seed", ("<seed:think>",)),
    ("think", ("</think>",)),
    ("think", ("<think>",)),
)


def detect_tool_format(template: str) -> str | None:
    """The name in TOOL_FORMATS of what a model with this chat template writes; None if it shows no calls."""
    return _first(_TOOL_SIGNS, template)


def detect_reasoning_format(template: str) -> str | None:
    """The name in REASONING_FORMATS of what a model with this chat template writes; None if it shows none."""
    return _first(_REASONING_SIGNS, template)


def markers(tool_format: str | None, reasoning_format: str | None) -> frozenset[str]:
    """Every literal string the formats are recognised by: special tokens that must stay in the text.

    Raises KeyError for a name that is in neither table.
    """
    found: set[str] = set()
    if tool_format is not None:
        table = TOOL_FORMATS[tool_format]
        found.update(HARMONY_MARKERS if table.channels else table.section)
        for form in table.forms:
            found.update(_strings(form))
    if reasoning_format is not None:
        reasoning = REASONING_FORMATS[reasoning_format]
        found.update((reasoning.start, reasoning.end) if reasoning.start else HARMONY_MARKERS)
    return frozenset(filter(None, found)) | _gemma_channel(reasoning_format)


def _gemma_channel(reasoning_format: str | None) -> frozenset[str]:
    # Gemma's start mark is a token and a word; the worker knows the token alone.
    return frozenset({"<|channel>"} if reasoning_format == "gemma" else ())


def _strings(form: CallForm) -> Iterable[str]:
    for field in fields(form):
        value = getattr(form, field.name)
        if isinstance(value, str):
            yield value
        elif isinstance(value, tuple):
            yield from value


def _first(signs: tuple[tuple[str, tuple[str, ...]], ...], template: str) -> str | None:
    return next((name for name, needed in signs if all(sign in template for sign in needed)), None)
