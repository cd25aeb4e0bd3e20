"""GET /openapi.json and /docs: the OpenAPI document, and as a page, with Swagger UI as ``fastapi-offline`` carries it.

FastAPI's own page asks a public network for its program. This one asks nobody but the server it came from, and says so
to the browser. ``routes.py`` includes it where ``server.docs`` is on.
"""

from collections.abc import Sequence
from importlib.metadata import distribution
from pathlib import Path
from typing import Final

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response

from opta_lmx.api.apart import run_apart
from opta_lmx.api.errors import UnknownRoute
from opta_lmx.api.routing import Operation, Router
from opta_lmx.config import SecurityConfig

router = Router()

_MEDIA_TYPES: Final = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon.png": "image/png",
}

# What the page needs, and no host but this one; its own script and Swagger UI's styles stand in the page.
_POLICY: Final = (
    "default-src 'none'; connect-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

# Without its validatorUrl Swagger UI shows a badge from a public host, which would be sent the document's address.
_PAGE: Final = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Opta-LMX API</title>
<link rel="icon" href="/docs/favicon.png">
<link rel="stylesheet" href="/docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="/docs/swagger-ui-bundle.js"></script>
<script>
SwaggerUIBundle({
  url: '/openapi.json',
  dom_id: '#swagger-ui',
  deepLinking: true,
  "validatorUrl": null,
  presets: [SwaggerUIBundle.presets.apis],
});
</script>
</body>
</html>
"""


class ApiDocument:
    """The document of a set of operations, written when it is first asked for and kept."""

    def __init__(self, operations: Sequence[Operation], shapes: Sequence[type[BaseModel]]) -> None:
        """``shapes`` are what request bodies refer to."""
        self._operations = list(operations)
        self._shapes = list(shapes)
        self._written: dict[tuple[bool, bool], bytes] = {}

    async def get(self, security: SecurityConfig) -> bytes:
        """JSON that says which key opens which route; a reload may change that."""
        needed = bool(security.inference_keys), bool(security.admin_key)
        if needed not in self._written:
            self._written[needed] = await run_apart(_write, self._operations, self._shapes, *needed)
        return self._written[needed]


def _write(
    operations: Sequence[Operation], shapes: Sequence[type[BaseModel]], has_keys: bool, has_admin_key: bool
) -> bytes:
    # FastAPI, which only the process that writes the document needs.
    from opta_lmx.api.openapi_document import to_document  # noqa: PLC0415

    return to_document(operations, shapes, has_keys=has_keys, has_admin_key=has_admin_key)


@router.get("/openapi.json")
async def get_document(request: Request) -> Response:
    """The document."""
    document: ApiDocument = request.app.state.document
    content = await document.get(request.app.state.services.config.security)
    return Response(content, media_type="application/json")


@router.get("/docs")
async def show_docs(request: Request) -> HTMLResponse:
    """The page."""
    return HTMLResponse(_PAGE, headers={"content-security-policy": _POLICY})


@router.get("/docs/{asset}")
async def get_asset(request: Request, asset: str) -> Response:
    """A file of the page."""
    media_type = _MEDIA_TYPES.get(asset)
    if media_type is None:
        raise UnknownRoute(request.method, request.scope["path"])
    static = Path(str(distribution("fastapi-offline").locate_file("fastapi_offline/static")))
    return FileResponse(static / asset, media_type=media_type, headers={"cache-control": "max-age=86400"})
