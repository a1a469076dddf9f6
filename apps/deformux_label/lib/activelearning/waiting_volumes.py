"""Unlabelled volumes, and the unreadable ones among them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from monailabel.interfaces.datastore import Datastore

from deformux_label.lib.activelearning.background_scores import Orders, SelectionScores, changed_since
from deformux_label.lib.store.leases import Lease

__all__ = ["Waiting", "WaitingVolumes"]

# Most volumes that a message names.
_MAX_NAMED = 5


@dataclass(frozen=True)
class Waiting:
    """Unlabelled volumes at one state of the studies.

    Args:
        listed: all unlabelled volumes, in the datastore's order.
        images: those that can be offered, sorted.
        names: ``images`` as a set.
        unreadable: those that scoring could not read or with an unusable header; they are not offered.
        changed: those that scoring could not read, with files that have changed since.
    """

    listed: Sequence[str]
    images: Sequence[str]
    names: frozenset[str]
    unreadable: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()

    def why_none(self, leases: Mapping[str, Lease]) -> str:
        """Return why no volume can be offered, in one sentence."""
        ends = [leases[image].until for image in self.images if image in leases]
        reasons = []
        if ends:
            until = time.strftime("%H:%M", time.localtime(min(ends)))
            reasons.append(f"{_number(len(ends))} leased to others, the first until {until}")
        if self.unreadable:
            reasons.append(f"{_number(len(self.unreadable))} unreadable: {first_names(self.unreadable)}")
        if not reasons:
            return "no volume is left without a label"
        return f"of the volumes without a label {' and '.join(reasons)}"

    def warnings(self) -> list[str]:
        """Return a warning for the operator about unreadable volumes, if any."""
        if not self.unreadable:
            return []
        only = "" if self.images else "; no other volume is left without a label"
        return [
            f"of the volumes without a label {_number(len(self.unreadable))} unreadable and not handed out: "
            f"{first_names(self.unreadable)}{only}; repair the files or remove them"
        ]


class WaitingVolumes:
    """The current ``Waiting``, recomputed only after the studies or the scores have changed."""

    def __init__(self, scores: SelectionScores) -> None:
        self.scores = scores
        self._last: tuple[tuple[frozenset[str], float, frozenset[str]], Waiting] | None = None

    def now(self, datastore: Datastore, orders: Orders | None = None) -> Waiting:
        """Return the unlabelled volumes for these orders, by default the latest."""
        listed = datastore.get_unlabeled_images()
        orders = self.scores.latest_orders() if orders is None else orders
        unusable: frozenset[str] = getattr(datastore, "unusable_scans", frozenset())
        key = (orders.unreadable, orders.written, unusable)
        last = self._last
        # Comparing lists of the same strings takes a hundredth of the time of sorting them.
        if last is not None and last[0] == key and last[1].listed == listed:
            suspects = sorted({*last[1].unreadable, *last[1].changed} - unusable)
            if last[1].changed == tuple(changed_since(suspects, datastore, orders.written)):
                return last[1]
        found = _waiting(datastore, listed, orders, unusable)
        # Requests run in threads, so the tuple is replaced as a whole.
        self._last = (key, found)
        return found


def first_names(images: Sequence[str]) -> str:
    """Return the first names, and the number of the others."""
    more = f" and {len(images) - _MAX_NAMED} more" if len(images) > _MAX_NAMED else ""
    return f"{', '.join(images[:_MAX_NAMED])}{more}"


def _waiting(datastore: Datastore, listed: Sequence[str], orders: Orders, unusable: frozenset[str]) -> Waiting:
    # Headers are read again after each change of a file; scoring may have read an older file.
    suspects = sorted((orders.unreadable - unusable).intersection(listed))
    changed = tuple(changed_since(suspects, datastore, orders.written))
    unreadable = tuple(sorted({*suspects, *unusable.intersection(listed)}.difference(changed)))
    names = frozenset(listed).difference(unreadable)
    return Waiting(listed, sorted(names), names, unreadable, changed)


def _number(count: int) -> str:
    return "1 is" if count == 1 else f"{count} are"
