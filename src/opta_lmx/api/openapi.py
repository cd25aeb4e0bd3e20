"""What a route says of itself for the OpenAPI document, since we read bodies and write errors ourselves.

In its decorator: what it reads (``request_body``), what it streams (``event_stream``) and which errors it may end in
(``errors``). ``openapi_document.py`` adds what holds for all.
"""

from http import HTTPStatus
from typing import Final

from pydantic import BaseModel

from opta_lmx.api.openai.wire import ErrorBody
from opta_lmx.api.routing import Responses
from opta_lmx.types import JsonObject

# How one shape of the document refers to another.
REFERENCE: Final = "#/components/schemas/{model}"

# What routes end in that have a model do the work: unknown, stopping, broken, busy, stuck, too large.
MODEL_ERRORS: Final = (404, 409, 422, 429, 504, 507)

# Beside those of ``ERRORS``.
_TOO_LARGE: Final = 413


def errors(*statuses: int) -> Responses:
    """The ``responses`` of a route that may end in these; whatever goes wrong, the body has one shape."""
    return {status: {"model": ErrorBody, "description": HTTPStatus(status).phrase} for status in statuses}


# For every route: not readable, without a key, by a wrong host or origin, too slow, with endless headers; a bug; a
# server that is full or stops.
ERRORS: Final = errors(400, 401, 403, 408, 431, 500, 503)


def event_stream(example: str) -> JsonObject:
    """The ``content`` of an answer that may be server-sent events, like these."""
    text = {"type": "string"}
    schema = {
        "description": "One of the server-sent events.",
        "type": "object",
        "required": ["data"],
        "properties": {"event": text, "data": text},
    }
    return {"text/event-stream": {"schema": schema, "example": example}}


def request_body(shape: type[BaseModel], **examples: JsonObject) -> JsonObject:
    """The ``openapi_extra`` of a route that reads a ``shape``; the document must be given the shape too.

    Each example must work on a server with the starter models as it stands; a test sends them.
    """
    content: JsonObject = {"schema": {"$ref": REFERENCE.format(model=shape.__name__)}}
    if examples:
        content["examples"] = {
            name: {"summary": name.replace("_", " "), "value": body} for name, body in examples.items()
        }
    error = {"application/json": {"schema": {"$ref": REFERENCE.format(model=ErrorBody.__name__)}}}
    too_large = {"description": HTTPStatus(_TOO_LARGE).phrase, "content": error}
    return {
        "requestBody": {"required": True, "content": {"application/json": content}},
        "responses": {str(_TOO_LARGE): too_large},
    }
