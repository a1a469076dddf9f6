"""A request to train, typed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from deformux_label.lib.requests.options import checked_device, checked_gpus, checked_number, chosen, one_of

__all__ = ["TrainingRequest"]


class TrainingRequest(BaseModel):
    """A checked request to train.

    Args:
        steps: number of optimizer steps.
        batch_size: patches in each step.
        learning_rate: for a start from scratch.
        device: one device.
        gpus: GPUs that the process sees, as ``checked_gpus`` returns them.
        start_from: the weights to start from, one of the trainer's choices.
    """

    model_config = ConfigDict(frozen=True)

    steps: int
    batch_size: int
    learning_rate: float
    device: str
    gpus: str
    start_from: str

    @classmethod
    def of(cls, sent: Mapping[str, Any], defaults: Mapping[str, Any], *, starts: Sequence[str]) -> TrainingRequest:
        """Parse a request.

        Args:
            sent: the request.
            defaults: defaults of ``steps``, ``batch_size`` and ``learning_rate``.
            starts: valid values of ``start_from``, the default first.

        Raises:
            HTTPException: 400 on a bad option.
        """

        def number(name: str, low: float, high: float, *, whole: bool) -> float:
            return checked_number(name, chosen(sent.get(name, defaults[name])), low=low, high=high, whole=whole)

        return cls(
            steps=int(number("steps", 1, 1_000_000, whole=True)),
            batch_size=int(number("batch_size", 1, 64, whole=True)),
            learning_rate=number("learning_rate", 1e-8, 1.0, whole=False),
            device=checked_device(sent.get("device")),
            gpus=checked_gpus(sent.get("gpus")),
            start_from=one_of("start_from", chosen(sent.get("start_from", starts[0])), starts),
        )
