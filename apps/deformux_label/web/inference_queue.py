"""The queue of inferences on each device."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Collection, Mapping
from typing import Any

from deformux_label.lib.infers.progress import WindowProgress

__all__ = ["Turn", "Turns"]


class Turn:
    """A turn that runs; calling it ends it."""

    def __init__(self, turns: Turns, device: str) -> None:
        self.progress = WindowProgress()
        self._turns, self._device = turns, device

    def __call__(self) -> None:
        """End the turn: the next request in line gets its own."""
        self._turns.end(self._device)


class Turns:
    """One inference at a time on each device, first come, first served; clients with several requests alternate.

    Use it from one event loop only.
    """

    def __init__(self) -> None:
        self._running: dict[str, str] = {}
        self._progress: dict[str, WindowProgress] = {}
        # By device: clients in the order of serving, each with its requests in order.
        self._waiting: dict[str, OrderedDict[str, deque[asyncio.Future[None]]]] = {}

    async def take(self, device: str, client: str) -> Turn:
        """Wait for a turn and return it; a cancelled wait gives up its place."""
        if device in self._running:
            await self._wait(device, client)
        else:
            self._running[device] = client
        turn = Turn(self, device)
        self._progress[device] = turn.progress
        return turn

    def end(self, device: str) -> None:
        """End the turn that runs on a device."""
        self._progress.pop(device, None)
        self._next(device)

    def state(self) -> dict[str, dict[str, Any]]:
        """Return, for each busy device, the client being served and those waiting, in the order of serving.

        Once the first window of the inference is computed, its ``windows_done``, ``windows`` and ``seconds_left`` too.
        """
        return {
            device: {
                "running": client,
                "waiting": _in_turn(self._waiting.get(device, {})),
                **(self._progress[device].to_dict() if device in self._progress else {}),
            }
            for device, client in self._running.items()
        }

    async def _wait(self, device: str, client: str) -> None:
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        clients = self._waiting.setdefault(device, OrderedDict())
        clients.setdefault(client, deque()).append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():  # the turn came at the same time
                self._next(device)
            elif client in clients and place in clients[client]:
                clients[client].remove(place)
                if not clients[client]:
                    del clients[client]
            raise

    def _next(self, device: str) -> None:
        clients = self._waiting.get(device)
        while clients:
            client, places = clients.popitem(last=False)
            place = places.popleft()
            if places:
                clients[client] = places  # behind all others
            if not place.done():
                self._running[device] = client
                place.set_result(None)
                return
        del self._running[device]


def _in_turn(waiting: Mapping[str, Collection[Any]]) -> list[str]:
    left = {client: len(places) for client, places in waiting.items()}
    order: list[str] = []
    while left:
        order += left
        left = {client: number - 1 for client, number in left.items() if number > 1}
    return order
