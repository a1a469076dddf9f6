"""Installation of the app in MONAI Label's web server: perimeter, routes, and responses to failed requests."""

from __future__ import annotations

from fastapi import FastAPI
from monailabel.config import settings
from starlette.middleware import Middleware

from deformux_label.web.connections import watch_connections
from deformux_label.web.error_responses import install_error_responses
from deformux_label.web.perimeter import Perimeter, host_names
from deformux_label.web.routes import App, routers
from deformux_label.web.routing import offer

__all__ = ["install"]


def install(server: FastAPI, app: App) -> None:
    """Add the app to a running MONAI Label server, and remove routes that are not offered."""
    install_error_responses(server)
    offer(server, [route for router in routers(app) for route in router.routes])
    options = app.server_options
    # Replaces MONAI Label's middleware, which admits pages of every site. The login is added inside it.
    server.user_middleware[:] = [
        Middleware(
            Perimeter,
            hosts=host_names(options.allow_origin),
            origins=options.allow_origin,
            max_upload_gb=options.max_upload_gb,
            prefix=settings.MONAI_LABEL_API_STR,
        )
    ]
    watch_connections()
    # Starlette collected the handlers at the start; this makes it collect them again at the next request.
    server.middleware_stack = None
