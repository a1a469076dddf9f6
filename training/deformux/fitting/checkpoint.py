"""Checkpoints of trainings: everything that the next process needs to resume exactly."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from deformux.data.atomic_files import replacing
from deformux.data.cases import Case, Scan
from deformux.data.preprocessing import Preprocessing
from deformux.fitting.distributed import Ranks
from deformux.fitting.recipe import Recipe

__all__ = [
    "Checkpoint",
    "CheckpointFile",
    "broadcast_checkpoint",
    "fingerprint",
    "label_checksum",
    "load_checkpoint",
    "save_checkpoint",
]

logger = logging.getLogger(__name__)

_STATE = "state"


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by group (``network``, ``optimizer``, ``average``, ``best``) and name, and plain values."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    values: Mapping[str, Any]


def save_checkpoint(path: Path, checkpoint: Checkpoint, *, of: str) -> None:
    """Write one safetensors file by rename, with the plain values as JSON in its header.

    Args:
        path: the file.
        checkpoint: what to keep.
        of: fingerprint of the training.

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
    """Return the checkpoint of the training with this fingerprint, or None if there is none; log the reason."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            values = json.loads((file.metadata() or {})[_STATE])
            if values.pop("fingerprint") != of:
                logger.warning("Starting over: %s belongs to another training (recipe, cases, labels or start)", path)
                return None
            tensors: dict[str, dict[str, Tensor]] = {}
            for key in file.keys():  # noqa: SIM118 - it is not a mapping
                group, _, name = key.partition("/")
                tensors.setdefault(group, {})[name] = file.get_tensor(key)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        logger.warning("Starting over: %s cannot be read (%s)", path, error)
        return None
    return Checkpoint(tensors, values)


def broadcast_checkpoint(load: Callable[[], Checkpoint | None], ranks: Ranks) -> Checkpoint | None:
    """Return, in all processes, the checkpoint that the writer loads."""
    own = load() if ranks.is_writer else None
    if ranks.size == 1:
        return own

    def describe() -> dict[str, Any] | None:
        if own is None:
            return None
        layout = {
            group: {
                name: (str(value.dtype).removeprefix("torch."), list(value.shape)) for name, value in tensors.items()
            }
            for group, tensors in own.tensors.items()
        }
        return {"values": dict(own.values), "tensors": layout}

    described = ranks.from_writer(describe)
    if described is None:
        return None
    checkpoint = own or Checkpoint(
        {
            group: {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in layout.items()}
            for group, layout in described["tensors"].items()
        },
        described["values"],
    )
    for group in described["tensors"]:
        ranks.broadcast_tensors(checkpoint.tensors[group][name] for name in described["tensors"][group])
    return checkpoint


class CheckpointFile:
    """File in which a training keeps its checkpoint.

    Args:
        path: the file.
        run_id: fingerprint of the training; checkpoints of others are ignored.
        seconds: least time between two checkpoints.
    """

    def __init__(self, path: Path, run_id: str, seconds: float) -> None:
        self.path, self.run_id, self.seconds = path, run_id, seconds
        self.last = time.monotonic()

    def load(self) -> Checkpoint | None:
        """Return the last checkpoint of this training, or None."""
        return load_checkpoint(self.path, of=self.run_id)

    @property
    def due(self) -> bool:
        """Return whether the last checkpoint is old enough."""
        return time.monotonic() - self.last >= self.seconds

    def save(self, checkpoint: Checkpoint) -> None:
        """Replace the last checkpoint; log an error if the disk is full."""
        try:
            save_checkpoint(self.path, checkpoint, of=self.run_id)
        except OSError as error:
            # A full disk must not end the training: it only cannot be resumed.
            logger.error("The training continues without a new checkpoint: %s", error)
        self.last = time.monotonic()

    def remove(self) -> None:
        """Delete the checkpoint, so that the next training starts over."""
        self.path.unlink(missing_ok=True)


def label_checksum(case: Case) -> str:
    """Return the SHA-256 of a case's label file, and of the labels that were annotated where these are not all."""
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
    scans: Sequence[Scan] = (),
) -> str:
    """Return a checksum of a training: its recipe, labels and first weights. Paths do not count."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    identity = {
        "recipe": recipe.to_dict(),
        "preprocessing": prep.to_dict(),
        "labels": list(labels),
        "seed": seed,
        "training": [(case.id, label_checksum(case)) for case in cases],
        "validation": [(case.id, label_checksum(case)) for case in val_cases],
        "new": sorted(new),
        **({"scans": [scan.id for scan in scans]} if scans else {}),
    }
    digest.update(json.dumps(identity).encode())
    return digest.hexdigest()
