"""A request to train, typed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from deformux.data.choices import AUTO
from deformux_label.lib.requests.options import checked_device, checked_gpus, checked_number, chosen, one_of

__all__ = ["TrainingRequest"]


class TrainingRequest(BaseModel):
    """A checked request to train.

    Args:
        minutes: time of a training from scratch, unless ``steps`` are given.
        steps: number of optimizer steps; None for as many as fit.
        batch_size: patches in each step; None for what the plan says.
        learning_rate: for a start from scratch.
        device: one device.
        gpus: GPUs that the process sees, as ``checked_gpus`` returns them.
        start_from: the weights to start from, one of the trainer's choices.
    """

    model_config = ConfigDict(frozen=True)

    minutes: float
    steps: int | None
    batch_size: int | None
    learning_rate: float
    device: str
    gpus: str
    start_from: str

    @classmethod
    def of(cls, sent: Mapping[str, Any], defaults: Mapping[str, Any], *, starts: Sequence[str]) -> TrainingRequest:
        """Parse a request.

        Args:
            sent: the request.
            defaults: defaults of ``minutes`` and ``learning_rate``.
            starts: valid values of ``start_from``, the default first.

        Raises:
            HTTPException: 400 on a bad option.
        """

        def number(name: str, low: float, high: float) -> float:
            return checked_number(name, chosen(sent.get(name, defaults[name])), low=low, high=high)

        def count(name: str, most: int) -> int | None:
            value = chosen(sent.get(name, AUTO))
            return None if value == AUTO else int(checked_number(name, value, low=1, high=most, whole=True))

        return cls(
            minutes=number("minutes", 0.1, 100_000),
            steps=count("steps", 1_000_000),
            batch_size=count("batch_size", 64),
            learning_rate=number("learning_rate", 1e-8, 1.0),
            device=checked_device(sent.get("device")),
            gpus=checked_gpus(sent.get("gpus")),
            start_from=one_of("start_from", chosen(sent.get("start_from", starts[0])), starts),
        )
