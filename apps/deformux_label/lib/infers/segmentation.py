"""One-click segmentation with the published model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monailabel.interfaces.tasks.infer_v2 import InferType
from monailabel.tasks.infer.basic_infer import BasicInferTask

from deformux.active_learning.uncertainty_map import UncertaintySlabs
from deformux.data.grid import ScanGrid
from deformux.data.preprocessing import Preprocessing
from deformux.data.transforms import inference_transforms, labels_of_scan
from deformux.inference.largest_component import keep_as_planned
from deformux.inference.slab_labels import SlabLabels
from deformux.inference.slabs import hand_on
from deformux.interactive.open_scan import OpenScan, scan_from_slabs
from deformux_label.lib.configs.project import Project
from deformux_label.lib.infers.click_cache import ClickCache, ScanKey
from deformux_label.lib.infers.gpu_memory import Placement, within_memory
from deformux_label.lib.infers.model_loader import ServedModels
from deformux_label.lib.infers.reply_file import write_reply
from deformux_label.lib.infers.served_network import (
    UNTRAINED,
    ServedNetwork,
    as_http_errors,
    joined_warnings,
    served_slabs,
)
from deformux_label.lib.infers.uncertainty_map import OPTION, uncertainty_reply
from deformux_label.lib.requests.inference import InferenceRequest

__all__ = ["Segmentation"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Segmented:
    """Labels ``(X, Y, Z)`` on the scan's grid, and what else a request asked for."""

    labels: torch.Tensor
    scan: OpenScan | None
    unsure: UncertaintySlabs | None


class Segmentation(BasicInferTask):
    """Automatic segmentation of a whole volume, on its own grid, with label values 1..N.

    Without a model, the reply is an empty mask and a warning in ``params``. The Slicer extension runs this task
    automatically at every Next Sample: an error would show the radiologist a dialog at each new case, and noise of an
    untrained network would have to be erased first. An empty mask gives empty segments to draw in.
    """

    def __init__(self, project: Project, models: ServedModels, cache: ClickCache) -> None:
        super().__init__(
            path=None,
            network=None,
            type=InferType.SEGMENTATION,
            labels=project.label_values,
            dimension=3,
            description="DeformUX-Net, fine-tuned on this project's submitted labels",
            config=dict(OPTION),
        )
        self.project = project
        self.models = models
        self.cache = cache

    def is_valid(self) -> bool:
        return True

    def parsed(self, sent: Mapping[str, Any], asked: InferenceRequest, uploads: Path | None) -> InferenceRequest:  # noqa: ARG002
        """Return the typed request; this task has no options of its own."""
        return asked

    def __call__(
        self, request: InferenceRequest, callbacks: dict[Any, Any] | None = None
    ) -> tuple[str | None, dict[str, Any]]:
        # MONAI Label passes a dict from step to step.
        given = {
            "image": request.scan.path,
            "device": request.options.device,
            "logging": request.options.logging,
            "request": request,
            # One version for the whole request, even if a new one is published meanwhile.
            "model_version": self.models.current(),
        }
        with as_http_errors():
            return super().__call__(given, callbacks)

    def pre_transforms(self, data: dict[str, Any] | None = None) -> Sequence[Callable]:
        data = data or {}
        return [_all_sequences, *inference_transforms(self._preprocessing(data), device=data.get("device", "cpu"))]

    def run_inferer(
        self,
        data: dict[str, Any],
        convert_to_batch: bool = True,  # noqa: ARG002 - MONAI Label's signature, here and below
        device: str = "cuda",
    ) -> dict[str, Any]:
        image = data[self.input_key]
        if data["model_version"] is None:
            logger.warning(UNTRAINED)
            empty = torch.zeros(ScanGrid.of(image).size, dtype=torch.uint8)
            data["segmented"] = _Segmented(empty, None, None)
            return data
        window = self._preprocessing(data).patch_size
        data["segmented"], data["warning"] = within_memory(lambda at: self._segmented(data, at), window, device)
        if (unsure := data["segmented"].unsure) is not None:
            data["uncertainty_reply"] = uncertainty_reply(unsure.found(), image)
        return data

    def _segmented(self, data: dict[str, Any], placement: Placement) -> _Segmented:
        """Segment the scan slab by slab, since the logits of all classes may not fit into memory."""
        image, request = data[self.input_key], data["request"]
        unsure = UncertaintySlabs(image) if request.options.uncertainty else None
        takers = [unsure] if unsure is not None else []
        prep = self._preprocessing(data)
        slabs = served_slabs(ServedNetwork(self.models, data["model_version"], placement), image)
        if request.scan.keep and self.cache.fits(image.nbytes):
            # So the first click after Next Sample need not wait for a second segmentation.
            scan = scan_from_slabs(image, slabs, takers=takers, prep=prep)
            return _Segmented(torch.from_numpy(scan.labels), scan, unsure)
        labels = SlabLabels(ScanGrid.of(image))
        hand_on(slabs, [labels, *takers])
        keep_as_planned(labels.labels.numpy(), labels.grid, prep)
        return _Segmented(labels.labels, None, unsure)

    def post_transforms(self, data: dict[str, Any] | None = None) -> Sequence[Callable]:  # noqa: ARG002
        return [self._labels_in_place]

    def _labels_in_place(self, data: dict[str, Any]) -> dict[str, Any]:
        """Put the labels, which are on the scan's own grid already, where the writer and callbacks look for them."""
        return data | {self.output_label_key: labels_of_scan(data["segmented"].labels, data[self.input_key])}

    def writer(
        self,
        data: dict[str, Any],
        extension: str | None = None,  # noqa: ARG002
        dtype: Any = None,  # noqa: ARG002
    ) -> tuple[str, dict[str, Any]]:
        pred = data[self.output_label_key]
        labels = pred[0].cpu().numpy()
        affine = np.asarray(pred.affine, dtype=float)
        request: InferenceRequest = data["request"]
        path = write_reply(labels, affine, request, self.project.label_values)
        if (scan := data["segmented"].scan) is not None:
            self.cache.put(ScanKey.of(request.scan.files, data["model_version"], data["device"]), scan)
        result = {"model_version": data["model_version"]}
        short = UNTRAINED if data["model_version"] is None else data["warning"]
        if warning := joined_warnings(data[self.input_key], self.models.warning(data["model_version"]), short):
            result["warning"] = warning
        if "uncertainty_reply" in data:
            result["uncertainty"] = data["uncertainty_reply"]
        return path, result

    def _preprocessing(self, data: dict[str, Any]) -> Preprocessing:
        """Return the model's preprocessing, which may differ from the server's options until the next training."""
        name = data.get("model_version")
        if name is None:
            # Empty segments to draw in need no sequence.
            return self.models.untrained_plan().preprocessing.with_dropout(1.0)
        _, card = self.models.load(name, data["device"])
        return card.preprocessing


def _all_sequences(data: dict[str, Any]) -> dict[str, Any]:
    # MONAI Label logs and copies a request only if its image is one path.
    return {**data, "image": data["request"].scan.files}
