"""Blocking endpoints in threads, so that the event loop can answer other requests."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

import anyio.to_thread
from anyio import CapacityLimiter
from fastapi import Request, Response
from fastapi.encoders import jsonable_encoder
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from deformux_label.lib.infers.cancellation import ClientGone, watch_client
from deformux_label.lib.infers.progress import watch_windows
from deformux_label.web.inference_queue import Turn

__all__ = ["client_left", "in_thread", "watched", "with_endpoint", "with_signature"]

# nginx's status for a client that closed its connection; it is never read.
_CLIENT_CLOSED_REQUEST = 499


def in_thread(endpoint: Callable[..., Any], *, threads: int) -> Callable[..., Coroutine[Any, Any, Response]]:
    """Return an endpoint with the same parameters that runs, and encodes its response, in its own pool of ``threads``.

    ``endpoint`` is a function, or a coroutine function that never awaits, like MONAI Label's.
    """
    limiter = CapacityLimiter(threads)

    async def run(**arguments: Any) -> Response:
        return await anyio.to_thread.run_sync(_answer, endpoint, arguments, limiter=limiter)

    return with_signature(run, endpoint)


def watched(
    endpoint: Callable[..., Any], turn: Callable[[Mapping[str, Any], Request], Awaitable[Turn]]
) -> Callable[..., Coroutine[Any, Any, Response]]:
    """Return an endpoint that waits for its ``turn``, runs in a thread, and ends early when its client disconnects.

    Args:
        endpoint: as for ``in_thread``.
        turn: takes the endpoint's arguments and the request, waits, and returns the turn.
    """
    # Turns already limit the number of running endpoints; a second limit would break their order.
    limiter = CapacityLimiter(1_000_000)

    async def run(http_request: Request, **arguments: Any) -> Response:
        leaving = asyncio.create_task(client_left(http_request))
        waiting = asyncio.ensure_future(turn(arguments, http_request))
        try:
            await asyncio.wait({leaving, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if leaving.done():
                return Response(status_code=_CLIENT_CLOSED_REQUEST)
            watch_windows(waiting.result().progress)
            watch_client(leaving.done)
            return await anyio.to_thread.run_sync(_answer, endpoint, arguments, limiter=limiter)
        except ClientGone:
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        finally:
            leaving.cancel()
            if waiting.done() and not waiting.cancelled() and waiting.exception() is None:
                waiting.result()()
            else:
                waiting.cancel()

    return with_signature(run, endpoint, http_request=Request)


async def client_left(request: Request) -> None:
    """Wait until the client closes its connection; the request's body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _answer(endpoint: Callable[..., Any], arguments: Mapping[str, Any]) -> Response:
    result = endpoint(**arguments)
    if inspect.iscoroutine(result):
        result = _finish(result)
    return result if isinstance(result, Response) else JSONResponse(jsonable_encoder(result))


def _finish(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine that never awaits, and return its result."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    coroutine.close()
    raise RuntimeError(f"{coroutine} awaits something and must stay on the event loop")


def with_endpoint(
    route: APIRoute, endpoint: Callable[..., Any], *, prefix: str = "", kind: type[APIRoute] = APIRoute
) -> APIRoute:
    """Return the same route with a different endpoint, under a prefix."""
    return kind(
        f"{prefix}{route.path}",
        endpoint,
        methods=route.methods,
        name=route.name,
        summary=route.summary,
        description=route.description,
        tags=route.tags,
        responses=route.responses,
        deprecated=route.deprecated,
        include_in_schema=route.include_in_schema,
    )


def with_signature(run: Callable[..., Any], endpoint: Callable[..., Any], **more: type) -> Callable[..., Any]:
    """Give ``run`` the name and the parameters of ``endpoint``, for FastAPI to read."""
    signature = inspect.signature(endpoint, eval_str=True)
    by_name = inspect.Parameter.KEYWORD_ONLY
    parameters = [parameter.replace(kind=by_name) for parameter in signature.parameters.values()]
    parameters += [inspect.Parameter(name, by_name, annotation=kind) for name, kind in more.items()]
    run.__name__, run.__doc__ = endpoint.__name__, endpoint.__doc__
    run.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=parameters, return_annotation=inspect.Signature.empty
    )
    return run
