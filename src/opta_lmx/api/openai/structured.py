"""What a request says about the form of its answer, as one grammar.

OpenAI's ``response_format``, and vLLM's ``structured_outputs`` for the forms OpenAI has no word for. Whether a schema
or a pattern can be used is found by its compiler, in the worker.
"""

import msgspec

from opta_lmx.api.openai.wire import ChatRequest
from opta_lmx.api.validation import missing
from opta_lmx.errors import InvalidRequest
from opta_lmx.types import Structured


def to_structured(chat: ChatRequest, *, or_call: bool = False) -> Structured | None:
    """The grammar the answer must follow, None for free text; raises InvalidRequest if two were given.

    ``or_call``: the model may call a tool in place of answering.
    """
    wanted = [form for form in (_format(chat), *_outputs(chat)) if form is not None]
    if len(wanted) > 1:
        names = " and ".join(repr(form.field) for form in wanted)
        raise InvalidRequest(f"Only one form of answer can be asked for, but got {names}.", param=wanted[1].field)
    return msgspec.structs.replace(wanted[0], or_call=or_call) if wanted else None


def _format(chat: ChatRequest) -> Structured | None:
    wanted = chat.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return Structured("json_object")
    if wanted.json_schema is None:
        raise missing("response_format.json_schema")
    schema = wanted.json_schema.schema_
    return Structured("json_object") if schema is None else Structured("json_schema", schema)


def _outputs(chat: ChatRequest) -> list[Structured | None]:
    wanted = chat.structured_outputs
    if wanted is None:
        return []
    return [
        None if wanted.json_ is None else Structured("json_schema", wanted.json_, "structured_outputs.json"),
        None if wanted.regex is None else Structured("regex", wanted.regex, "structured_outputs.regex"),
        None if wanted.choice is None else Structured("choice", wanted.choice, "structured_outputs.choice"),
        None if wanted.grammar is None else Structured("grammar", wanted.grammar, "structured_outputs.grammar"),
    ]
