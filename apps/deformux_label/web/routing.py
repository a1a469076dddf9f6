"""The server's router: the routes that ``offered`` lists, each with checked requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fastapi import FastAPI
from fastapi.routing import APIRoute
from monailabel.config import settings
from monailabel.endpoints import activelearning, batch_infer, datastore, infer, info, scoring
from starlette.routing import BaseRoute, Route

from deformux_label.web.checked_route import CheckedRoute
from deformux_label.web.route_roles import offered
from deformux_label.web.worker_threads import with_endpoint

__all__ = ["offer"]

# Groups of MONAI Label's routes of which some are kept.
_STOCK = (info, infer, batch_infer, activelearning, scoring, datastore)


def offer(server: FastAPI, own: Sequence[BaseRoute]) -> None:
    """Replace the routes of a server by those of ``own`` and of MONAI Label that ``offered`` lists.

    The first route of a method and path is kept, so ``own`` takes precedence.
    """
    taken: set[tuple[str, str]] = set()
    kept: list[BaseRoute] = []
    for prefix, route in _candidates(server, own):
        path = prefix + route.path
        below = path.removeprefix(settings.MONAI_LABEL_API_STR)
        methods = {name for name in route.methods or () if (name, path) not in taken and offered(name, below)}
        if not methods:
            continue
        taken |= {(name, path) for name in methods}
        if isinstance(route, APIRoute):
            checked = with_endpoint(route, route.endpoint, prefix=prefix, kind=CheckedRoute)
            checked.methods = methods
            kept.append(checked)
        else:
            kept.append(route)
    server.router.routes[:] = kept
    # Paths must match exactly.
    server.router.redirect_slashes = False
    server.openapi_schema = None


def _candidates(server: FastAPI, own: Sequence[BaseRoute]) -> Iterator[tuple[str, Route]]:
    for route in own:
        if isinstance(route, Route):
            yield "", route
    for module in _STOCK:
        for route in module.router.routes:
            if isinstance(route, Route):
                yield settings.MONAI_LABEL_API_STR, route
    # Pages about the server itself, and routes that its own modules added.
    for route in server.router.routes:
        if isinstance(route, Route):
            yield "", route
