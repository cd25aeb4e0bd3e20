"""A route: its path, its handler, and what the OpenAPI document says of it; served by Starlette, described by FastAPI.

FastAPI is not in the server's process: importing it is a fifth of the time from start to first answer, and its
dependencies are solved anew for every request though no handler here has one. ``openapi_document.py`` reads the same
operations to write the document, in a process of its own.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias, TypedDict, TypeVar, Unpack

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from opta_lmx.api.errors import json_response
from opta_lmx.types import JsonObject

# By status: FastAPI's ``model``, ``content`` and ``description``.
Responses: TypeAlias = dict[int | str, dict[str, Any]]
Answer: TypeAlias = Response | BaseModel | JsonObject
# Takes ``request`` and its path's parameters, all texts, by their names.
Handler: TypeAlias = Callable[..., Awaitable[Answer]]

_Handler = TypeVar("_Handler", bound=Handler)


class Description(TypedDict, total=False):
    """What is said of an operation, in FastAPI's words; without a ``response_model`` the handler's annotation is it."""

    tags: list[str | Enum]  # texts; a list of another type would not be FastAPI's
    responses: Responses
    openapi_extra: JsonObject
    response_model: type[BaseModel]
    response_class: type[Response]
    status_code: int
    response_model_exclude_none: bool


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path."""

    method: str
    path: str
    handler: Handler
    description: Description

    def to_route(self) -> Route:
        """What serves it; a GET does not answer HEAD, which would cost as much."""
        route = Route(self.path, self._answer, methods=[self.method], name=self.handler.__name__)
        route.methods = {self.method}
        return route

    async def _answer(self, request: Request) -> Response:
        answer = await self.handler(request=request, **request.path_params)
        if isinstance(answer, Response):
            return answer
        if isinstance(answer, BaseModel):
            exclude_none = self.description.get("response_model_exclude_none", False)
            content = answer.model_dump_json(by_alias=True, exclude_none=exclude_none)
            return Response(content, media_type="application/json")
        return json_response(answer)


class Router:
    """Collects the operations of a module. Its decorators give the handler back as it is."""

    def __init__(self, prefix: str = "", tags: Sequence[str] = ()) -> None:
        self.operations: list[Operation] = []
        self._prefix = prefix
        self._tags = list(tags)

    def get(self, path: str, **description: Unpack[Description]) -> Callable[[_Handler], _Handler]:
        """The handler of GET below the prefix."""
        return self._adding("GET", path, description)

    def post(self, path: str, **description: Unpack[Description]) -> Callable[[_Handler], _Handler]:
        """The handler of POST below the prefix."""
        return self._adding("POST", path, description)

    def delete(self, path: str, **description: Unpack[Description]) -> Callable[[_Handler], _Handler]:
        """The handler of DELETE below the prefix."""
        return self._adding("DELETE", path, description)

    def _adding(self, method: str, path: str, description: Description) -> Callable[[_Handler], _Handler]:
        described: Description = {**description, "tags": [*self._tags, *description.get("tags", [])]}

        def add(handler: _Handler) -> _Handler:
            self.operations.append(Operation(method, self._prefix + path, handler, described))
            return handler

        return add
