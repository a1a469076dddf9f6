"""One-click segmentation with the published model."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastapi import HTTPException
from monailabel.interfaces.tasks.infer_v2 import InferType
from monailabel.tasks.infer.basic_infer import BasicInferTask

from deformux.inference import WindowInferer, mixed_precision
from deformux.transforms import InvalidVolume, Preprocessing, inference_transforms, restore_transforms
from deformux.weights import InvalidModel
from deformux_label.offloop import raise_if_client_gone

from ..configs.project import Project
from ..models import ServedModels
from .memory import Attempt, within_memory
from .uncertainty import OPTION, uncertainty_reply
from .writer import FORMATS, write_labels

__all__ = ["UNTRAINED", "Segmentation"]

logger = logging.getLogger(__name__)

UNTRAINED = "There is no trained model yet: submit a label and train, or start from a pretrained model."


class Segmentation(BasicInferTask):
    """Automatic segmentation of a whole volume, on its own grid, with label values 1..N.

    A project without any model answers with an empty mask and a warning in ``params``. The Slicer extension runs this
    task by itself on every Next Sample: an error would put a dialog between the radiologist and each new case, and an
    untrained network would draw noise that must be erased first. An empty mask leaves the empty segments to draw in.
    """

    def __init__(self, project: Project, models: ServedModels) -> None:
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

    def is_valid(self) -> bool:
        return True

    def __call__(self, request: dict[str, Any], callbacks: dict[Any, Any] | None = None) -> tuple[str | None, dict]:
        # One version for the whole request, whatever is published meanwhile.
        try:
            return super().__call__({**request, "model_version": self.models.current()}, callbacks)
        except InvalidVolume as error:
            raise HTTPException(422, str(error)) from error
        except InvalidModel as error:
            raise HTTPException(500, f"the published model cannot be served: {error}") from error
        except MemoryError as error:
            raise HTTPException(507, str(error)) from error

    def pre_transforms(self, data: dict[str, Any] | None = None) -> Sequence[Callable]:
        return inference_transforms(self._preprocessing(data or {}))

    def run_inferer(self, data: dict[str, Any], convert_to_batch: bool = True, device: str = "cuda") -> dict[str, Any]:
        if data["model_version"] is None:
            logger.warning(UNTRAINED)
            logits = torch.zeros(2, *data[self.input_key].shape[1:])
            logits[0] = 1
            data[self.output_label_key] = logits
            return data
        window = self._preprocessing(data).patch_size
        logits, warning = within_memory(lambda attempt: self._logits(data, attempt), window, device)
        data[self.output_label_key] = logits
        data["warning"] = warning
        if data["uncertainty"]:
            data["uncertainty_reply"] = uncertainty_reply(logits, data[self.input_key])
        return data

    @torch.inference_mode()
    def _logits(self, data: dict[str, Any], attempt: Attempt) -> torch.Tensor:
        network, _ = self.models.load(data["model_version"], attempt.device)

        def on_device(patch: torch.Tensor) -> torch.Tensor:
            raise_if_client_gone()
            with mixed_precision(attempt.device):
                return network(patch.to(attempt.device)).float().to(attempt.volume_device)

        try:
            image = data[self.input_key][None].to(attempt.volume_device)
            return WindowInferer(attempt.window)(image, on_device)[0]
        finally:
            if attempt.device.startswith("cuda"):
                # A training in its own process cannot use what this one keeps for the next request.
                torch.cuda.empty_cache()

    def post_transforms(self, data: dict[str, Any] | None = None) -> Sequence[Callable]:
        return restore_transforms()

    def writer(
        self, data: dict[str, Any], extension: str | None = None, dtype: Any = None
    ) -> tuple[str, dict[str, Any]]:
        pred = data[self.output_label_key]
        suffix = extension or data.get("result_extension") or _suffix(data["image_path"])
        labels = pred[0].cpu().numpy().astype(np.dtype(dtype or data.get("result_dtype") or "uint8"))
        handle, path = tempfile.mkstemp(suffix=suffix)
        os.close(handle)
        write_labels(Path(path), labels, np.asarray(pred.affine, dtype=float), self.project.label_values)
        result = {"model_version": data["model_version"]}
        if warning := UNTRAINED if data["model_version"] is None else data["warning"]:
            result["warning"] = warning
        if "uncertainty_reply" in data:
            result["uncertainty"] = data["uncertainty_reply"]
        return path, result

    def _preprocessing(self, data: dict[str, Any]) -> Preprocessing:
        """The model's own, which may differ from what the server was started with until the next training."""
        name = data.get("model_version")
        if name is None:
            return self.project.preprocessing
        _, card = self.models.load(name, data["device"])
        return card.preprocessing


def _suffix(image_path: str) -> str:
    """The image's own format where it can hold labels."""
    return next((suffix for suffix in FORMATS if image_path.endswith(suffix)), FORMATS[0])
