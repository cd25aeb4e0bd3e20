"""The OpenAPI document: request bodies, which FastAPI does not see since we read them ourselves."""

from collections.abc import Iterable
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from opta_lmx.api.openai.wire import ErrorBody
from opta_lmx.types import JsonObject

_REFERENCE: Final = "#/components/schemas/{model}"

# For every route: whatever goes wrong, the body has this shape.
ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    "4XX": {"model": ErrorBody, "description": "The request is at fault."},
    "5XX": {"model": ErrorBody, "description": "The server is at fault, or has no room."},
}


def request_body(shape: type[BaseModel]) -> JsonObject:
    """The ``openapi_extra`` of a route that reads a ``shape``; ``describe`` must be given the shape too."""
    content = {"application/json": {"schema": {"$ref": _REFERENCE.format(model=shape.__name__)}}}
    return {"requestBody": {"required": True, "content": content}}


def describe(app: FastAPI, shapes: Iterable[type[BaseModel]]) -> None:
    """Makes ``app.openapi`` include the ``shapes`` that request bodies refer to."""
    requested = [(shape, "validation") for shape in shapes]

    def openapi() -> JsonObject:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            _, definitions = models_json_schema(requested, ref_template=_REFERENCE)  # type: ignore[arg-type]
            document.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
