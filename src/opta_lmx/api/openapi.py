"""The OpenAPI document: what FastAPI cannot see, since we read bodies, write errors and check keys ourselves.

A route says in its decorator what it reads (``request_body``), what it streams (``event_stream``) and which errors it
may end in (``errors``); ``describe`` adds what holds for all.
"""

from collections.abc import Iterable
from http import HTTPStatus
from typing import Any, Final, TypeAlias

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from opta_lmx.api.openai.wire import ErrorBody
from opta_lmx.config import SecurityConfig
from opta_lmx.types import JsonObject

Responses: TypeAlias = dict[int | str, dict[str, Any]]

_REFERENCE: Final = "#/components/schemas/{model}"

# What routes end in that have a model do the work: unknown, stopping, broken, busy, stuck, too large.
MODEL_ERRORS: Final = (404, 409, 422, 429, 504, 507)

# Beside those of ``ERRORS``.
_TOO_LARGE: Final = 413

_KEYS: Final[dict[str, JsonObject]] = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An inference key, or on /admin the admin key."},
    "api_key": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "An inference key."},
    "admin_key": {"type": "apiKey", "in": "header", "name": "X-Admin-Key", "description": "The admin key."},
}


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
    """The ``openapi_extra`` of a route that reads a ``shape``; ``describe`` must be given the shape too.

    Each example must work on a server with the starter models as it stands; a test sends them.
    """
    content: JsonObject = {"schema": {"$ref": _REFERENCE.format(model=shape.__name__)}}
    if examples:
        content["examples"] = {
            name: {"summary": name.replace("_", " "), "value": body} for name, body in examples.items()
        }
    error = {"application/json": {"schema": {"$ref": _REFERENCE.format(model=ErrorBody.__name__)}}}
    too_large = {"description": HTTPStatus(_TOO_LARGE).phrase, "content": error}
    return {
        "requestBody": {"required": True, "content": {"application/json": content}},
        "responses": {str(_TOO_LARGE): too_large},
    }


def describe(app: FastAPI, shapes: Iterable[type[BaseModel]], security: SecurityConfig) -> None:
    """Makes ``app.openapi`` include the ``shapes`` that request bodies refer to, and which key opens which route."""
    requested = [(shape, "validation") for shape in shapes]

    def openapi() -> JsonObject:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            _, definitions = models_json_schema(requested, ref_template=_REFERENCE)  # type: ignore[arg-type]
            components = document.setdefault("components", {})
            components.setdefault("schemas", {}).update(definitions["$defs"])
            components["securitySchemes"] = _KEYS
            _without_fastapis_errors(document)
            for path, operations in document["paths"].items():
                for operation in operations.values():
                    operation["security"] = _security(path, security)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _without_fastapis_errors(document: JsonObject) -> None:
    """FastAPI promises a 422 of its own wherever a path has a parameter; ours are texts and always fit."""
    for operations in document["paths"].values():
        for operation in operations.values():
            if "HTTPValidationError" in str(operation["responses"].get("422")):
                del operation["responses"]["422"]
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)


def _security(path: str, security: SecurityConfig) -> list[JsonObject]:
    """Any one of these opens ``path``; the empty one, if it is there, is no key at all."""
    admin = path.startswith("/admin")
    keys = ["bearer", "admin_key" if admin else "api_key"]
    needed = path != "/admin/health" and bool(security.admin_key if admin else security.inference_keys)
    return [*([] if needed else [{}]), *({key: []} for key in keys)]
