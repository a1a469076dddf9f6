"""Pages that describe the API. They load scripts from this server only: a hospital's network may be closed."""

from __future__ import annotations

import re
from pathlib import Path

import fastapi_offline
from fastapi import APIRouter, HTTPException
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse

from deformux_label.web.content_policy import source_hash

__all__ = ["pages_router"]

_ASSETS = Path(fastapi_offline.__file__).parent / "static"
_KINDS = {
    "swagger-ui-bundle.js": "text/javascript",
    "redoc.standalone.js": "text/javascript",
    "swagger-ui.css": "text/css",
}
# Relative, so that they work under any path of a proxy.
_OPENAPI = "openapi.json"
_ICON = "favicon.ico"


def pages_router(title: str) -> APIRouter:
    """Return the routes ``/`` (Swagger UI), ``/docs`` (ReDoc), and the three files that these load."""
    router = APIRouter(include_in_schema=False)
    swagger = _with_policy(
        get_swagger_ui_html(
            openapi_url=_OPENAPI,
            title=title,
            swagger_js_url="assets/swagger-ui-bundle.js",
            swagger_css_url="assets/swagger-ui.css",
            swagger_favicon_url=_ICON,
            swagger_ui_parameters={"defaultModelsExpandDepth": -1},
        )
    )
    redoc = _with_policy(
        get_redoc_html(
            openapi_url=_OPENAPI,
            title=title,
            redoc_js_url="assets/redoc.standalone.js",
            redoc_favicon_url=_ICON,
            with_google_fonts=False,
        )
    )

    @router.get("/")
    async def swagger_page() -> HTMLResponse:
        return swagger

    @router.get("/docs")
    async def redoc_page() -> HTMLResponse:
        return redoc

    @router.get("/assets/{name}")
    async def asset(name: str) -> FileResponse:
        if name not in _KINDS:
            raise HTTPException(404, "there is no such file")
        return FileResponse(_ASSETS / name, media_type=_KINDS[name])

    return router


def _with_policy(page: HTMLResponse) -> HTMLResponse:
    """Allow a page to load from and call only this server, and to run only its own scripts."""
    text = bytes(page.body).decode()
    inline = " ".join(source_hash(script) for script in re.findall(r"<script>(.*?)</script>", text, re.DOTALL))
    policy = (
        f"default-src 'self'; script-src 'self' {inline}; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
        "worker-src blob:; base-uri 'none'; frame-ancestors 'none'"
    )
    return HTMLResponse(text, headers={"Content-Security-Policy": policy})
