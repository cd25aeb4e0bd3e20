"""What a request says about tools, in OpenAI's present words or its old ones (``functions``), as one value.

A schema is looked at here only from outside; whether it can be enforced is found by its compiler, in the worker.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

from opta_lmx.api.openai.wire import AllowedTools, ChatRequest, FunctionTool, NamedTool, Tool, ToolChoice
from opta_lmx.api.validation import missing
from opta_lmx.errors import InvalidRequest, UnsupportedParameter
from opta_lmx.types import JsonObject, Structured

# OpenAI: a function without parameters takes none.
_NO_PARAMETERS: JsonObject = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class OfferedTool:
    """A tool as templates and parsers take it (OpenAI's form), and where its schema stands in the request."""

    shown: JsonObject
    param: str

    @property
    def name(self) -> str:
        """What a call names."""
        name: str = self.shown["function"]["name"]
        return name

    def sealed(self) -> "OfferedTool":
        """What a parser needs of it, the schema as JSON: thousands of objects are not made before a call asks."""
        function = self.shown["function"]
        schema = msgspec.Raw(msgspec.json.encode(function.get("parameters")))
        return replace(self, shown={"type": "function", "function": {"name": self.name, "parameters": schema}})


@dataclass(frozen=True, slots=True)
class ToolUse:
    """How the answer may call tools; without ``tools`` it cannot.

    ``shown`` are the tools the model is told of, ``tools`` those it may call. ``forced``: the answer is a call.
    ``single``: the answer ends with its first call. ``legacy``: calls are told in the old words.
    """

    shown: tuple[OfferedTool, ...] = ()
    tools: tuple[OfferedTool, ...] = ()
    forced: bool = False
    single: bool = False
    legacy: bool = False

    def sealed(self) -> "ToolUse":
        """What is needed to read the answer, once the model is told of the tools."""
        return replace(self, shown=(), tools=tuple(tool.sealed() for tool in self.tools))

    def grammar(self) -> Structured | None:
        """The grammar that enforces a call; None where none is forced."""
        if not self.forced:
            return None
        spec = [
            {
                "name": tool.name,
                "parameters": tool.shown["function"].get("parameters", _NO_PARAMETERS),
                "field": tool.param,
            }
            for tool in self.tools
        ]
        return Structured("tool_call", spec, "functions" if self.legacy else "tools")


def to_tool_use(chat: ChatRequest) -> ToolUse:
    """How the request may be answered with calls.

    Raises InvalidRequest for a bad tool or a choice that names none of them, UnsupportedParameter for custom tools.
    """
    if chat.functions or not (chat.function_call is None or isinstance(chat.function_call, str)):
        return _legacy_use(chat)
    tools = tuple(_from_tool(tool, f"tools[{at}]") for at, tool in enumerate(chat.tools or ()))
    choice, single = chat.tool_choice, chat.parallel_tool_calls is False
    if not tools and choice not in (None, "none", "auto"):
        raise _choice_without_tools("tool_choice", "tools")
    if not tools or choice == "none":
        return ToolUse()
    if choice is None or isinstance(choice, str):
        return ToolUse(tools, tools, forced=choice == "required", single=single)
    if choice.type == "allowed_tools":
        allowed = _allowed(choice)
        names = [_name_of(tool, f"tool_choice.allowed_tools.tools[{at}]") for at, tool in enumerate(allowed.tools)]
        # Without a grammar only what the model is not told of is certain not to be called.
        tools = _chosen(tools, names, "tool_choice", "tools")
        return ToolUse(tools, tools, forced=allowed.mode == "required", single=single)
    name = _name_of(NamedTool(type=choice.type, function=choice.function), "tool_choice")
    return ToolUse(tools, _chosen(tools, [name], "tool_choice", "tools"), forced=True)


def _legacy_use(chat: ChatRequest) -> ToolUse:
    if chat.tools:
        raise InvalidRequest("Only one of 'tools' and 'functions' can be given.", param="functions")
    functions, choice = chat.functions or (), chat.function_call
    tools = tuple(_offered(function, f"functions[{at}]") for at, function in enumerate(functions))
    if choice == "none":
        return ToolUse()
    if choice is None or isinstance(choice, str):
        return ToolUse(tools, tools, single=True, legacy=True)
    if not tools:
        raise _choice_without_tools("function_call", "functions")
    chosen = _chosen(tools, [choice.name], "function_call", "functions")
    return ToolUse(tools, chosen, forced=True, single=True, legacy=True)


def _from_tool(tool: Tool, param: str) -> OfferedTool:
    _refuse_custom(tool.type, param)
    if tool.function is None:
        raise missing(f"{param}.function")
    return _offered(tool.function, f"{param}.function")


def _offered(function: FunctionTool, param: str) -> OfferedTool:
    """The tool without ``strict``, which is for the server: arguments that are enforced are so either way."""
    param = f"{param}.parameters"
    parameters = function.parameters
    # The type may be left out, and often is; anything but an object takes no arguments by name.
    if parameters is not None and not (isinstance(parameters, dict) and "object" in _types_of(parameters)):
        raise InvalidRequest(
            f"Invalid schema for function {function.name!r}: schema must be a JSON Schema of 'type: \"object\"'.",
            param=param,
            code="invalid_function_parameters",
        )
    return OfferedTool(
        {"type": "function", "function": function.model_dump(exclude={"strict"}, exclude_none=True)}, param
    )


def _types_of(schema: JsonObject) -> list[object]:
    types = schema.get("type", "object")
    return types if isinstance(types, list) else [types]


def _allowed(choice: ToolChoice) -> AllowedTools:
    if choice.allowed_tools is None:
        raise missing("tool_choice.allowed_tools")
    return choice.allowed_tools


def _name_of(tool: NamedTool, param: str) -> str:
    _refuse_custom(tool.type, param)
    if tool.function is None:
        raise missing(f"{param}.function")
    return tool.function.name


def _refuse_custom(kind: str, param: str) -> None:
    if kind == "custom":
        raise UnsupportedParameter("Custom tools are not supported; use tools of type 'function'.", param=param)


def _chosen(tools: Sequence[OfferedTool], names: Sequence[str], param: str, field: str) -> tuple[OfferedTool, ...]:
    """The tools of these names, in the order of the request; raises InvalidRequest for a name that is not there."""
    known = {tool.name for tool in tools}
    for name in names:
        if name not in known:
            raise InvalidRequest(
                f"Invalid value for {param!r}: no function named {name[:64]!r} was specified in {field!r}.", param=param
            )
    return tuple(tool for tool in tools if tool.name in names)


def _choice_without_tools(param: str, field: str) -> InvalidRequest:
    return InvalidRequest(
        f"Invalid value for {param!r}: {param!r} is only allowed when {field!r} are specified.", param=param
    )
