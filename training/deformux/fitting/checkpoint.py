"""A training on disk: everything that the next process needs to go on as if nothing had happened."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from deformux.data.atomic_files import replacing
from deformux.data.cases import Case
from deformux.data.preprocessing import Preprocessing
from deformux.fitting.recipe import Recipe

__all__ = ["Checkpoint", "CheckpointFile", "fingerprint", "label_checksum", "load_checkpoint", "save_checkpoint"]

logger = logging.getLogger(__name__)

_STATE = "state"


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by group (``network``, ``optimizer``, ``average``, ``best``) and name, and plain values."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    values: Mapping[str, Any]


def save_checkpoint(path: Path, checkpoint: Checkpoint, *, of: str) -> None:
    """Write one safetensors file by rename, its plain values as JSON in the header.

    Args:
        path: the file.
        checkpoint: what to keep.
        of: the run's fingerprint.

    Raises:
        OSError: the disk is full, or the file cannot be written; the previous checkpoint is still there.
    """
    flat = {
        # A copy: safetensors refuses tensors that share memory, which a moving average of one step does.
        f"{group}/{name}": value.detach().to("cpu", copy=True).contiguous()
        for group, tensors in checkpoint.tensors.items()
        for name, value in tensors.items()
    }
    header = {_STATE: json.dumps({**checkpoint.values, "fingerprint": of})}
    with replacing(path) as temporary:
        try:
            save_file(flat, temporary, metadata=header)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error


def load_checkpoint(path: Path, *, of: str) -> Checkpoint | None:
    """The checkpoint of the run with this fingerprint, or None where there is none; the reason is logged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            values = json.loads((file.metadata() or {})[_STATE])
            if values.pop("fingerprint") != of:
                logger.warning("Starting anew: %s is of another training (recipe, cases, labels or start)", path)
                return None
            tensors: dict[str, dict[str, Tensor]] = {}
            for key in file.keys():  # noqa: SIM118 - it is no mapping
                group, _, name = key.partition("/")
                tensors.setdefault(group, {})[name] = file.get_tensor(key)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        logger.warning("Starting anew: %s cannot be read (%s)", path, error)
        return None
    return Checkpoint(tensors, values)


class CheckpointFile:
    """Where a run keeps its checkpoint.

    Args:
        path: the file.
        run_id: the run's fingerprint; checkpoints of others are ignored.
        seconds: least time between two checkpoints.
    """

    def __init__(self, path: Path, run_id: str, seconds: float) -> None:
        self.path, self.run_id, self.seconds = path, run_id, seconds
        self.last = time.monotonic()

    def load(self) -> Checkpoint | None:
        """The last checkpoint of this run, or None."""
        return load_checkpoint(self.path, of=self.run_id)

    @property
    def due(self) -> bool:
        """Whether the last one is old enough."""
        return time.monotonic() - self.last >= self.seconds

    def save(self, checkpoint: Checkpoint) -> None:
        """Replace the last checkpoint; a disk that is full is logged."""
        try:
            save_checkpoint(self.path, checkpoint, of=self.run_id)
        except OSError as error:
            # A full disk costs the means to resume, not the training.
            logger.error("The training goes on without a new checkpoint: %s", error)
        self.last = time.monotonic()

    def remove(self) -> None:
        """Start anew next time."""
        self.path.unlink(missing_ok=True)


def label_checksum(case: Case) -> str:
    """SHA-256 of a case's label file, and of the labels that it was annotated for where these are not all."""
    digest = hashlib.sha256(case.label.read_bytes())
    if case.annotated is not None:
        digest.update(json.dumps(sorted(case.annotated)).encode())
    return digest.hexdigest()


def fingerprint(
    network: nn.Module,
    cases: Sequence[Case],
    val_cases: Sequence[Case],
    *,
    new: Collection[str],
    recipe: Recipe,
    prep: Preprocessing,
    labels: Sequence[str],
    seed: int,
) -> str:
    """What a run is, as a checksum: the same recipe on the same labels from the same weights. Paths do not count."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    said = {
        "recipe": recipe.to_json(),
        "preprocessing": prep.to_dict(),
        "labels": list(labels),
        "seed": seed,
        "training": [(case.id, label_checksum(case)) for case in cases],
        "validation": [(case.id, label_checksum(case)) for case in val_cases],
        "new": sorted(new),
    }
    digest.update(json.dumps(said).encode())
    return digest.hexdigest()
