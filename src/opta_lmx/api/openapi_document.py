"""The OpenAPI document, by FastAPI, out of what the routes say of themselves; nothing of it runs in the server."""

from collections.abc import Sequence
from typing import Final

import msgspec
from fastapi import APIRouter
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from opta_lmx import __version__
from opta_lmx.api.openapi import ERRORS, REFERENCE
from opta_lmx.api.routing import Description, Operation
from opta_lmx.types import JsonObject

_KEYS: Final[dict[str, JsonObject]] = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An inference key, or on /admin the admin key."},
    "api_key": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "An inference key."},
    "admin_key": {"type": "apiKey", "in": "header", "name": "X-Admin-Key", "description": "The admin key."},
}


def to_document(
    operations: Sequence[Operation], shapes: Sequence[type[BaseModel]], *, has_keys: bool, has_admin_key: bool
) -> bytes:
    """JSON: every operation, the ``shapes`` that request bodies refer to, and which key opens which route."""
    router = APIRouter()
    for operation in operations:
        responses = {**ERRORS, **operation.description.get("responses", {})}
        described: Description = {**operation.description, "responses": responses}
        router.add_api_route(operation.path, operation.handler, methods=[operation.method], **described)
    document = get_openapi(
        title="Opta-LMX",
        version=__version__,
        description="Local inference with the OpenAI API, and its administration.",
        routes=router.routes,
    )
    _, definitions = models_json_schema([(shape, "validation") for shape in shapes], ref_template=REFERENCE)
    components = document.setdefault("components", {})
    components.setdefault("schemas", {}).update(definitions["$defs"])
    components["securitySchemes"] = _KEYS
    _without_fastapis_errors(document)
    for path, operations_of_path in document["paths"].items():
        for described_operation in operations_of_path.values():
            described_operation["security"] = _security(path, has_keys=has_keys, has_admin_key=has_admin_key)
    return msgspec.json.encode(document)


def _without_fastapis_errors(document: JsonObject) -> None:
    """FastAPI promises a 422 of its own wherever a path has a parameter; ours are texts and always fit."""
    for operations in document["paths"].values():
        for operation in operations.values():
            if "HTTPValidationError" in str(operation["responses"].get("422")):
                del operation["responses"]["422"]
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)


def _security(path: str, *, has_keys: bool, has_admin_key: bool) -> list[JsonObject]:
    """Any one of these opens ``path``; the empty one, if it is there, is no key at all."""
    admin = path.startswith("/admin")
    keys = ["bearer", "admin_key" if admin else "api_key"]
    needed = path != "/admin/health" and (has_admin_key if admin else has_keys)
    return [*([] if needed else [{}]), *({key: []} for key in keys)]
