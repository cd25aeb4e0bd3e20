"""What a request says about the form of its answer, as one grammar.

OpenAI's ``response_format``, and vLLM's ``structured_outputs`` for the forms OpenAI has no word for, or its older
``guided_json`` and the like. Whether a schema or a pattern can be used is found by its compiler, in the worker.
"""

import msgspec

from opta_lmx.api.openai.wire import ChatRequest, StructuredOutputs
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


def _outputs(chat: ChatRequest) -> list[Structured]:
    new = chat.structured_outputs or StructuredOutputs()
    forms = [
        Structured("json_schema", new.json_, "structured_outputs.json"),
        Structured("regex", new.regex, "structured_outputs.regex"),
        Structured("choice", new.choice, "structured_outputs.choice"),
        Structured("grammar", new.grammar, "structured_outputs.grammar"),
        Structured("json_schema", chat.guided_json, "guided_json"),
        Structured("regex", chat.guided_regex, "guided_regex"),
        Structured("choice", chat.guided_choice, "guided_choice"),
        Structured("grammar", chat.guided_grammar, "guided_grammar"),
    ]
    return [form for form in forms if form.spec is not None]
