"""The task of a process that trains with others, as one line of JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deformux.data.cases import Case, Scan
from deformux.data.preprocessing import Preprocessing
from deformux.fitting.recipe import Recipe
from deformux.networks.deformux_net import DeformUXNet

__all__ = ["RankTask"]


@dataclass(frozen=True)
class RankTask:
    """Arguments of ``fit`` that all processes of a training share; weights and checkpoint come from the writer.

    Args:
        network: arguments of ``DeformUXNet``.
        cases, recipe, prep, labels, val_cases, new, scans, seed, capture, compile_cache, store: as for ``fit``.
        can_stop: whether one of the processes is asked to stop after each step.
    """

    network: dict[str, Any]
    cases: Sequence[Case]
    recipe: Recipe
    prep: Preprocessing
    labels: Sequence[str]
    val_cases: Sequence[Case] = ()
    new: Collection[str] = ()
    scans: Sequence[Scan] = ()
    seed: int = 0
    capture: bool = True
    compile_cache: Path | None = None
    store: Path | None = None
    can_stop: bool = False

    def options(self) -> dict[str, Any]:
        """Return the arguments for ``fit``: all but the network, and what each process has of its own."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in ("network", "can_stop")]
        return {name: getattr(self, name) for name in names}

    def to_json(self) -> str:
        """Return the task as one line of text."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values |= {
            "cases": [_case_to_dict(case) for case in self.cases],
            "recipe": self.recipe.to_dict(),
            "prep": self.prep.to_dict(),
            "labels": list(self.labels),
            "val_cases": [_case_to_dict(case) for case in self.val_cases],
            "new": sorted(self.new),
            "scans": [(scan.id, list(map(str, scan.images))) for scan in self.scans],
            "compile_cache": None if self.compile_cache is None else str(self.compile_cache),
            "store": None if self.store is None else str(self.store),
        }
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str | bytes) -> RankTask:
        """Invert ``to_json``."""
        values = json.loads(text)
        cache, store = values["compile_cache"], values["store"]
        values |= {
            "cases": [_case_from_dict(case) for case in values["cases"]],
            "recipe": Recipe.from_dict(values["recipe"]),
            "prep": Preprocessing.from_dict(values["prep"]),
            "val_cases": [_case_from_dict(case) for case in values["val_cases"]],
            "scans": [Scan(name, tuple(map(Path, images))) for name, images in values["scans"]],
            "compile_cache": None if cache is None else Path(cache),
            "store": None if store is None else Path(store),
        }
        return cls(**values)

    @staticmethod
    def describe(network: DeformUXNet) -> dict[str, Any]:
        """Return the arguments that build a network like this one.

        Raises:
            ValueError: it has other options, which it does not remember.
        """
        arguments: dict[str, Any] = {
            "in_channels": network.in_channels,
            "out_channels": network.out_channels,
            "preset": network.preset,
            "activation_checkpointing": network.activation_checkpointing,
            "guidance": network.guidance_channels > 0,
            # As JSON gives them back.
            "strides": [list(stride) for stride in network.strides],
        }
        with torch.device("meta"):
            like = DeformUXNet(**arguments)
        if _shapes(like) != _shapes(network):
            raise ValueError(
                "several devices train networks with the published convolution, offsets and MLP only; use one device"
            )
        return arguments


def _shapes(network: DeformUXNet) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in network.state_dict().items()}


def _case_to_dict(case: Case) -> dict[str, Any]:
    annotated = None if case.annotated is None else list(case.annotated)
    images = [str(path) for path in case.images]
    return {
        "id": case.id, "image": str(case.image), "label": str(case.label), "annotated": annotated, "images": images
    }  # fmt: skip


def _case_from_dict(values: dict[str, Any]) -> Case:
    annotated = None if values["annotated"] is None else tuple(values["annotated"])
    images = tuple(map(Path, values["images"]))
    return Case(values["id"], Path(values["image"]), Path(values["label"]), annotated, images)
