"""The router of the server: only what ``offered`` lists, each route checked at its door."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fastapi import FastAPI
from fastapi.routing import APIRoute
from monailabel.config import settings
from monailabel.endpoints import activelearning, batch_infer, datastore, infer, info, scoring
from starlette.routing import BaseRoute, Route

from deformux_label.web.checked_route import CheckedRoute
from deformux_label.web.offered import offered
from deformux_label.web.worker_threads import with_endpoint

__all__ = ["offer"]

# MONAI Label's groups of routes of which some stay.
_STOCK = (info, infer, batch_infer, activelearning, scoring, datastore)


def offer(server: FastAPI, own: Sequence[BaseRoute]) -> None:
    """Make ``own`` routes and MONAI Label's the routes of a server, as far as they are offered.

    The first of several with one method and path stays, so that ``own`` ones replace MONAI Label's.
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
    # A path that is written otherwise is another path, and is not there.
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
    # The pages about the server itself, and what its own modules added to it.
    for route in server.router.routes:
        if isinstance(route, Route):
            yield "", route
