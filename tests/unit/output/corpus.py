"""Answers as the model families write them, and what each says: text, reasoning, calls."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from opta_lmx.inference.output.events import CallArguments, CallStarted, OutputEvent, Reasoning, Text
from opta_lmx.inference.output.parser import OutputParser

Call = tuple[str, dict[str, Any]]

PARIS: Call = ("get_weather", {"city": "Paris"})
FULL: Call = ("search", {"query": "cats & dogs", "limit": 3, "exact": True, "filter": {"tags": ["a", "b"], "min": 1.5}})
EMPTY: Call = ("now", {})

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {"type": "object", "properties": {key: {"type": kind} for key, kind in properties.items()}},
        },
    }
    for name, properties in {
        "get_weather": {"city": "string"},
        "search": {"query": "string", "limit": "integer", "exact": "boolean", "filter": "object"},
        "now": {},
        "run": {"code": "string"},
    }.items()
]


@dataclass(frozen=True)
class Answer:
    """One output of a model and its meaning."""

    format: str
    output: str
    calls: Sequence[Call] = ()
    text: str = ""
    reasoning: str = ""
    reasoning_format: str | None = None
    in_reasoning: bool = False
    forced: bool = False

    def parser(self) -> OutputParser:
        """A parser set up for this answer."""
        return OutputParser(
            tool_format=self.format or None,
            reasoning_format=self.reasoning_format,
            tools=TOOLS,
            in_reasoning=self.in_reasoning,
            forced=self.forced,
        )


@dataclass
class Said:
    """What a list of events says, whatever its cuts."""

    order: list[tuple[str, int, str]] = field(default_factory=list)

    @property
    def text(self) -> str:
        return self._all("text")

    @property
    def reasoning(self) -> str:
        return self._all("reasoning")

    @property
    def calls(self) -> list[tuple[str, str]]:
        """Name and JSON text of the arguments of every call, whole or not."""
        names = [text for kind, _, text in self.order if kind == "call"]
        return [
            (name, "".join(text for kind, of, text in self.order if kind == "arguments" and of == index))
            for index, name in enumerate(names)
        ]

    def _all(self, wanted: str) -> str:
        return "".join(text for kind, _, text in self.order if kind == wanted)


def _piece(event: OutputEvent) -> tuple[str, int, str]:
    match event:
        case Text(text):
            return "text", -1, text
        case Reasoning(text):
            return "reasoning", -1, text
        case CallStarted(index, name):
            return "call", index, name
        case CallArguments(index, text):
            return "arguments", index, text


def said(events: Iterable[OutputEvent]) -> Said:
    """``events`` with neighbours of one kind merged."""
    merged: list[tuple[str, int, str]] = []
    for event in events:
        piece = _piece(event)
        if merged and piece[0] != "call" and merged[-1][:2] == piece[:2]:
            piece = (*piece[:2], merged.pop()[2] + piece[2])
        merged.append(piece)
    return Said(merged)


def read(answer: Answer, pieces: Iterable[str] | None = None) -> Said:
    """What our parser makes of an answer in ``pieces``, or in one."""
    parser = answer.parser()
    events: list[OutputEvent] = []
    for piece in [answer.output] if pieces is None else pieces:
        events += parser.feed(piece)
    return said(events + parser.finish())


def _json(call: Call, key: str = "arguments") -> str:
    return json.dumps({"name": call[0], key: call[1]})


def _raw(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _xml(call: Call) -> str:
    pairs = "".join(f"<parameter={key}>\n{_raw(value)}\n</parameter>\n" for key, value in call[1].items())
    return f"<function={call[0]}>\n{pairs}</function>"


def _invoke(call: Call) -> str:
    pairs = "".join(f'<parameter name="{key}">{_raw(value)}</parameter>\n' for key, value in call[1].items())
    return f'<invoke name="{call[0]}">\n{pairs}</invoke>'


def _minicpm(call: Call) -> str:
    return _invoke(call).replace("<invoke", "<function").replace("</invoke", "</function").replace("parameter", "param")


def _command(call: Call) -> str:
    return json.dumps({"tool_call_id": "0", "tool_name": call[0], "parameters": call[1]})


def _glm(call: Call) -> str:
    pairs = "".join(
        f"<arg_key>{key}</arg_key>\n<arg_value>{_raw(value)}</arg_value>\n" for key, value in call[1].items()
    )
    return f"<tool_call>{call[0]}\n{pairs}</tool_call>"


def _brace(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_brace(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_brace, value)) + "]"
    return f'<|"|>{value}<|"|>' if isinstance(value, str) else json.dumps(value)


def _python(call: Call) -> str:
    return f"{call[0]}({', '.join(f'{key}={value!r}' for key, value in call[1].items())})"


def _channel(call: Call) -> str:
    return f"<|channel|>commentary to=functions.{call[0]} <|constrain|>json<|message|>{json.dumps(call[1])}<|call|>"


def deepseek(name: str) -> str:
    """A token of DeepSeek's."""
    return f"<\uff5c{name}\uff5c>"


def _deepseek_calls(calls: Sequence[Call]) -> str:
    begin, end, middle = deepseek("tool▁call▁begin"), deepseek("tool▁call▁end"), deepseek("tool▁sep")
    body = "\n".join(f"{begin}function{middle}{n}\n```json\n{json.dumps(a)}\n```{end}" for n, a in calls)
    return deepseek("tool▁calls▁begin") + body + deepseek("tool▁calls▁end")


def _kimi_calls(calls: Sequence[Call]) -> str:
    body = "".join(
        f"<|tool_call_begin|>functions.{n}:{i}<|tool_call_argument_begin|>{json.dumps(a)}<|tool_call_end|>"
        for i, (n, a) in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{body}<|tool_calls_section_end|>"


_NEWLINE = "\n"

_WRITERS: dict[str, Callable[[Sequence[Call]], str]] = {
    "hermes": lambda calls: "\n".join(f"<tool_call>\n{_json(call)}\n</tool_call>" for call in calls),
    "qwen3_xml": lambda calls: "\n".join(f"<tool_call>\n{_xml(call)}\n</tool_call>" for call in calls),
    "llama": lambda calls: "<|python_tag|>" + "; ".join(_json(call, "parameters") for call in calls),
    "mistral": lambda calls: f"[TOOL_CALLS] [{', '.join(map(_json, calls))}]",
    "deepseek_v3": _deepseek_calls,
    "glm47": lambda calls: "\n".join(map(_glm, calls)),
    "kimi": _kimi_calls,
    "harmony": lambda calls: "<|start|>assistant".join(map(_channel, calls)),
    "gemma": lambda calls: "".join(f"<|tool_call>call:{name}{_brace(values)}<tool_call|>" for name, values in calls),
    "minimax": lambda calls: "\n".join(["<minimax:tool_call>", *map(_invoke, calls), "</minimax:tool_call>"]),
    "granite": lambda calls: f"<|tool_call|>[{', '.join(map(_json, calls))}]",
    "command": lambda calls: f"<|START_ACTION|>[{', '.join(map(_command, calls))}]<|END_ACTION|>",
    "minicpm": lambda calls: "\n".join(map(_minicpm, calls)),
    "nemotron": lambda calls: f"<TOOLCALL>[{', '.join(map(_json, calls))}]</TOOLCALL>",
    "seed": lambda calls: f"<seed:tool_call>\n{_NEWLINE.join(map(_xml, calls))}\n</seed:tool_call>",
    "tool_calls": lambda calls: f"<tool_calls>[{', '.join(map(_json, calls))}]</tool_calls>",
    "pythonic": lambda calls: f"<|tool_call_start|>[{', '.join(map(_python, calls))}]<|tool_call_end|>",
}
FORMATS = tuple(_WRITERS)


def written(name: str, calls: Sequence[Call]) -> str:
    """``calls`` as the family ``name`` writes them."""
    return _WRITERS[name](calls)


# The marker that begins a call: what prose may quote.
BEGINS = {name: written(name, [EMPTY]).split("now")[0] for name in FORMATS} | {
    "hermes": "<tool_call>",
    "llama": "<|python_tag|>",
    "mistral": "[TOOL_CALLS]",
    "harmony": "<|channel|>",
    "granite": "<|tool_call|>",
    "command": "<|START_ACTION|>",
    "minicpm": '<function name="',
    "nemotron": "<TOOLCALL>",
    "seed": "<seed:tool_call>",
    "tool_calls": "<tool_calls>",
}
_CLOSE = {
    "hermes": "</tool_call>",
    "llama": "<|python_tag|>",
    "mistral": "[TOOL_CALLS]",
    "deepseek_v3": deepseek("tool▁call▁end"),
    "kimi": "<|tool_call_end|>",
    "harmony": "<|call|>",
    "qwen3_xml": "</function></tool_call>",
    "glm47": "</tool_call>",
    "gemma": "<tool_call|>",
    "minimax": "</invoke>",
    "granite": "<|tool_call|>",
    "pythonic": "<|tool_call_end|>",
    "command": "<|END_ACTION|>",
    "minicpm": "</function>",
    "nemotron": "</TOOLCALL>",
    "seed": "</function></seed:tool_call>",
    "tool_calls": "</tool_calls>",
}


def _of(name: str) -> Iterable[Answer]:
    final = "<|channel|>final<|message|>" if name == "harmony" else ""
    before = f"{final}Let me look.<|end|><|start|>assistant" if name == "harmony" else "Let me look.\n\n"
    after = f"<|start|>assistant{final} Done." if name == "harmony" else " Done."
    closing: Call = ("run", {"code": f'print("{{{_CLOSE[name]}}}")'})
    yield Answer(name, written(name, [PARIS]), [PARIS])
    yield Answer(name, written(name, [FULL, EMPTY]), [FULL, EMPTY])
    yield Answer(name, before + written(name, [EMPTY, PARIS]), [EMPTY, PARIS], "Let me look.")
    yield Answer(name, written(name, [PARIS]) + after, [PARIS], "Done.")
    yield Answer(name, written(name, [closing]), [closing])
    yield Answer(
        name, f"{final}The marker {BEGINS[name]} begins a call. ", text=f"The marker {BEGINS[name]} begins a call. "
    )
    yield Answer(name, f"{final}Just a < b, [x] and {{y}}: done.\n", text="Just a < b, [x] and {y}: done.\n")


THINK = (
    Answer("hermes", "<think>\nHm. a < b\n\nYes.\n</think>\n\nHello", (), "Hello", "Hm. a < b\n\nYes.", "think"),
    Answer("hermes", "Hm.\n</think>\n\nHello", (), "Hello", "Hm.", "think", in_reasoning=True),
    Answer("", "\n<think>\n\n</think>\n\nHello", (), "Hello", "", "think"),
    Answer("", "<think>never closed", (), "", "never closed", "think"),
    Answer("", "The <think> tag and </think> in prose", (), "The <think> tag and </think> in prose", "", "think"),
    Answer("", "[THINK]Hm.[/THINK]Hello", (), "Hello", "Hm.", "mistral"),
    Answer("", "<seed:think>\nHm.\n</seed:think>\nHello", (), "Hello", "Hm.", "seed"),
    Answer(
        "command",
        "<|START_THINKING|>Hm.<|END_THINKING|>" + written("command", [PARIS]),
        [PARIS],
        "",
        "Hm.",
        "command",
    ),
    Answer("gemma", "<|channel>thought\nHm.\n<channel|>Hello", (), "Hello", "Hm.", "gemma"),
    Answer(
        "hermes",
        "<think>use <tool_call>?</think>\n" + written("hermes", [PARIS]),
        [PARIS],
        "",
        "use <tool_call>?",
        "think",
    ),
    Answer(
        "harmony",
        "<|channel|>analysis<|message|>Hm.\n<|end|><|start|>assistant<|channel|>final<|message|>Hello<|return|>",
        (),
        "Hello",
        "Hm.",
        "harmony",
    ),
    Answer(
        "harmony",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant" + written("harmony", [PARIS]),
        [PARIS],
        "",
        "Hm.",
        "harmony",
    ),
    Answer("harmony", "Hm.<|end|>" + written("harmony", [PARIS]), [PARIS], "", "Hm.", "harmony", in_reasoning=True),
    Answer(
        "harmony",
        "<|channel|>commentary<|message|>Let me look. <|end|><|start|>assistant<|channel|>analysis<|message|>Hm.<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>Yes.<|end|><|start|>assistant<|channel|>final<|message|>Done.",
        (),
        "Let me look. Done.",
        "Hm.\nYes.",
        "harmony",
    ),
    Answer("harmony", " to=functions.now<|channel|>commentary json<|message|>{}", [EMPTY], "", "", "harmony"),
)

UNICODE: Call = ("run", {"code": 'h\u00e9llo \u2713 \u65e5\u672c \U0001f642 "q" \\ \n\tend'})
NESTED: Call = (
    "search",
    {"query": "[]", "limit": -1, "exact": False, "filter": {"a": [{"b": [None, {}]}, []], "c": "}"}},
)


def _after_thought(name: str) -> Answer:
    """Reasoning that quotes the mark of a call, then calls."""
    thought, calls = f"Hm.\n\nUse {BEGINS[name]}?", [UNICODE, NESTED, PARIS]
    if name == "harmony":
        begin, end, reasoning = "<|channel|>analysis<|message|>", "<|end|><|start|>assistant", "harmony"
        thought = "Hm.\n\nUse it?"
    else:
        begin, end, reasoning = "<think>\n", "\n</think>\n\n", "think"
    return Answer(name, begin + thought + end + written(name, calls), calls, "", thought, reasoning)


MIXED = tuple(map(_after_thought, FORMATS))

VARIANTS = (
    Answer("hermes", '<tool_call>{"name": "now"}</tool_call>', [EMPTY]),
    Answer("hermes", '<tool_call>{"name":"get_weather","arguments":"{\\"city\\":\\"Paris\\"}"}</tool_call>', [PARIS]),
    Answer("hermes", f"<tool_call> tag, then {written('hermes', [PARIS])}", [PARIS], "<tool_call> tag, then"),
    Answer("hermes", f"<tool_call>\n{_xml(FULL)}\n</tool_call>", [FULL]),
    Answer("qwen3_xml", _xml(PARIS), [PARIS]),
    Answer("qwen3_xml", f"{_xml(PARIS)}\n</tool_call>", [PARIS]),
    Answer("llama", _json(PARIS, "parameters"), [PARIS]),
    Answer("llama", '{"name": "Ann", "age": 3} is JSON', text='{"name": "Ann", "age": 3} is JSON'),
    Answer("llama", "[1] see [the page](http://x)", text="[1] see [the page](http://x)"),
    Answer("llama", '<function=get_weather>{"city": "Paris"}</function>', [PARIS]),
    Answer("mistral", '[TOOL_CALLS]get_weather{"city": "Paris"}', [PARIS]),
    Answer("mistral", '[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}', [EMPTY, PARIS]),
    Answer("", '{"name": "get_weather", "arguments": {"city": "Paris"}}', [PARIS], forced=True),
    Answer("", 'Hm.</think>\n{"name": "now", "arguments": {}}', [EMPTY], "", "Hm.", "think", True, True),
)

# Ways of writing that vllm-mlx does not know.
OURS_ALONE = (
    Answer("hermes", '<tool_call>{"arguments": {"city": "Paris"}, "name": "get_weather"}', [PARIS]),
    Answer("hermes", '<tool_call>{"id":1,"name":"unheard_of","arguments":null}</tool_call>', [("unheard_of", {})]),
    Answer(
        "qwen3_xml",
        "<function=run><parameter=code>\n\n  a </parameter> b\n\n</parameter></function>",
        [("run", {"code": "\n  a </parameter> b\n"})],
    ),
    Answer("llama", f'\n{{"type": "function", "name": "now", "parameters": {{}}}}\n{_json(PARIS)}', [EMPTY, PARIS]),
    Answer("llama", f"[{_python(FULL)}, now()]", [FULL, EMPTY]),
    Answer("mistral", '[TOOL_CALLS]get_weather[CALL_ID]abc123def[ARGS]{"city": "Paris"}', [PARIS]),
    Answer(
        "deepseek_v3",
        f'{deepseek("tool▁call▁begin")}get_weather{deepseek("tool▁sep")}{{"city": "Paris"}}{deepseek("tool▁call▁end")}',
        [PARIS],
    ),
)

ANSWERS: tuple[Answer, ...] = (
    *(answer for name in FORMATS for answer in _of(name)),
    *THINK,
    *MIXED,
    *VARIANTS,
    *OURS_ALONE,
)
