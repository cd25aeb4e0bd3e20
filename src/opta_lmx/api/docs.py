"""GET /docs: the OpenAPI document as a page, with Swagger UI as the package ``fastapi-offline`` carries it.

FastAPI's own page asks a public network for its program. This one asks nobody but the server it came from, and says so
to the browser. ``routes.py`` includes it where ``server.docs`` is on.
"""

from importlib.metadata import distribution
from pathlib import Path
from typing import Final

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import FileResponse, HTMLResponse, Response

from opta_lmx.api.errors import UnknownRoute

router = APIRouter(prefix="/docs", include_in_schema=False)

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


@router.get("")
async def show_docs(request: Request) -> HTMLResponse:
    """The page."""
    page = get_swagger_ui_html(
        openapi_url="/openapi.json",
        title=f"{request.app.title} API",
        swagger_js_url="/docs/swagger-ui-bundle.js",
        swagger_css_url="/docs/swagger-ui.css",
        swagger_favicon_url="/docs/favicon.png",
        # A badge from validator.swagger.io, which would be sent the document's address.
        swagger_ui_parameters={"validatorUrl": None},
    )
    page.headers["content-security-policy"] = _POLICY
    return page


@router.get("/{asset}")
async def get_asset(request: Request, asset: str) -> Response:
    """A file of the page."""
    media_type = _MEDIA_TYPES.get(asset)
    if media_type is None:
        raise UnknownRoute(request.method, request.scope["path"])
    static = Path(str(distribution("fastapi-offline").locate_file("fastapi_offline/static")))
    return FileResponse(static / asset, media_type=media_type, headers={"cache-control": "max-age=86400"})
