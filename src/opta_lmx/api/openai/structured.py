"""What a request says about the form of its answer, as one grammar.

OpenAI's ``response_format``, and vLLM's ``structured_outputs`` for the forms OpenAI has no word for. Whether a schema
or a pattern can be used is found by its compiler, in the worker.
"""

from opta_lmx.api.openai.wire import ChatRequest
from opta_lmx.errors import InvalidRequest
from opta_lmx.types import Structured


def to_structured(chat: ChatRequest) -> Structured | None:
    """The grammar the answer must follow, None for free text; raises InvalidRequest if two were given."""
    wanted = [(name, form) for name, form in (_format(chat), *_outputs(chat)) if form is not None]
    if len(wanted) > 1:
        names = " and ".join(repr(name) for name, _ in wanted)
        raise InvalidRequest(f"Only one form of answer can be asked for, but got {names}.", param=wanted[1][0])
    return wanted[0][1] if wanted else None


def _format(chat: ChatRequest) -> tuple[str, Structured | None]:
    wanted = chat.response_format
    if wanted is None or wanted.type == "text":
        return "response_format", None
    if wanted.type == "json_object":
        return "response_format", Structured("json_object")
    if wanted.json_schema is None:
        raise InvalidRequest(
            "Missing required parameter: 'response_format.json_schema'.",
            param="response_format.json_schema",
            code="missing_required_parameter",
        )
    schema = wanted.json_schema.schema_
    return "response_format", Structured("json_object") if schema is None else Structured("json_schema", schema)


def _outputs(chat: ChatRequest) -> list[tuple[str, Structured | None]]:
    wanted = chat.structured_outputs
    if wanted is None:
        return []
    return [
        ("structured_outputs.json", None if wanted.json_ is None else Structured("json_schema", wanted.json_)),
        ("structured_outputs.regex", None if wanted.regex is None else Structured("regex", wanted.regex)),
        ("structured_outputs.choice", None if wanted.choice is None else Structured("choice", wanted.choice)),
        ("structured_outputs.grammar", None if wanted.grammar is None else Structured("grammar", wanted.grammar)),
    ]
