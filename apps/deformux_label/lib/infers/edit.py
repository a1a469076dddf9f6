"""Editing: the clicks of Slicer's SmartEdit correct the automatic segmentation, or the client's own, where they are."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from monailabel.utils.others.generic import device_list

from deformux.data.grid import triple
from deformux.data.preprocessing import UNLABELLED, LoadVolumed, Preprocessing, apply, inference_transforms
from deformux.interactive.editor import Editor, Study, study_from_logits
from deformux_label.lib.configs.project import Project
from deformux_label.lib.infers.click_cache import ClientEditor, Sessions, StudyKey
from deformux_label.lib.infers.gpu_memory import Attempt, within_memory
from deformux_label.lib.infers.model_loader import ServedModels
from deformux_label.lib.infers.served_network import UNTRAINED, ServedNetwork, in_a_sentence, sentences, volume_logits
from deformux_label.lib.infers.uncertainty_map import OPTION, uncertainty_reply
from deformux_label.lib.requests.clicks import BACKGROUND, VOXEL_ORDERS, Points, in_files_order, points_of
from deformux_label.lib.requests.options import chosen, one_of
from deformux_label.lib.store.annotator import annotator_of
from deformux_label.lib.store.label_check import label_array
from deformux_label.lib.store.volume_writer import write_result
from deformux_label.web.label_upload import label_file_of

__all__ = ["Edit", "open_study"]

logger = logging.getLogger(__name__)

UNGUIDED = "This model was not trained with clicks, so that they move borders near them and repair little else."


@dataclass(frozen=True)
class _Edited:
    """Labels ``(X, Y, Z)`` on the scan's grid, and what computing them took."""

    labels: np.ndarray
    windows: int
    network_s: float


class Edit(InferTask):
    """Segmentation corrected by clicks on any label or the background, on the scan's own grid.

    It starts from the label file of the request, else from the automatic segmentation. The answer depends on the
    image, the model, the start and the set of clicks alone: what ``sessions`` keeps only makes it faster. Without any
    model the clicked voxels are set, and nothing else.
    """

    def __init__(self, project: Project, models: ServedModels, sessions: Sessions) -> None:
        super().__init__(
            type=InferType.DEEPEDIT,
            # Slicer then offers clicks on the background too; a mask has no such value.
            labels={**project.label_values, BACKGROUND: 0},
            dimension=3,
            description="DeformUX-Net, corrected by clicks",
            config={"device": device_list(), "voxel_order": list(VOXEL_ORDERS), **OPTION},
        )
        self.project = project
        self.models = models
        self.sessions = sessions

    def is_valid(self) -> bool:
        return True

    def options(self, request: Mapping[str, Any], uploads: Path | None) -> dict[str, Any]:
        """The part of a request that is this task's own, checked as far as that needs no image."""
        file, active = label_file_of(request, (*self.project.labels, BACKGROUND), uploads)
        return {
            "points": points_of(request, self.project.labels, active),
            "voxel_order": one_of("voxel_order", chosen(request.get("voxel_order", "file")), VOXEL_ORDERS),
            "mask": file,
            "label_info": request.get("label_info"),
            "client": annotator_of(request),
        }

    def __call__(self, request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        start = time.perf_counter()
        version = self.models.current()
        with in_a_sentence():
            if version is None:
                labels, affine, params = self._without_a_model(request)
            else:
                labels, affine, params = self._edited(request, version)
        written = time.perf_counter()
        path = write_result(labels, affine, request, self.project.label_values)
        now = time.perf_counter()
        latencies = params.setdefault("latencies", {"network": 0.0})
        latencies |= {"write": round(now - written, 4), "total": round(now - start, 4)}
        logger.info("Edit of %s: %s", Path(request["image"]).name, params)
        return path, {"label_names": self.project.label_values, "model_version": version, **params}

    def _without_a_model(self, request: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        image = LoadVolumed("image")({"image": request["image"]})["image"]
        points, affine = _on_grid(request, image.shape[1:], image.affine)
        labels = self._mask(request)
        if labels is None:
            labels = np.zeros(image.shape[1:], dtype=np.uint8)
        for value, voxels in points.items():
            labels[tuple(np.transpose(voxels))] = value
        return labels, affine, {"warning": sentences(image, self.models.warning(None), UNTRAINED)}

    def _edited(self, request: dict[str, Any], version: str) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        device = request["device"]
        _, card = self.models.load(version, device)
        prep = card.preprocessing
        key = StudyKey.of(request["image"], version, device)
        held = self.sessions.peek(key)
        if held is None:
            # Before a whole volume is segmented for a request that cannot be answered.
            image = LoadVolumed("image")({"image": request["image"]})["image"]
            points, _ = _on_grid(request, image.shape[1:], image.affine)
        else:
            points, _ = _on_grid(request, held.labels.shape, held.image.meta["original_affine"])
        warnings: list[str | None] = [self.models.warning(version)]
        network_s = 0.0

        def compute() -> Study:
            nonlocal network_s
            study, warning, seconds = open_study(self.models, version, request["image"], prep, device)
            warnings.append(warning)
            network_s += seconds
            return study

        study = self.sessions.study(key, compute) if request["keep"] else compute()
        changed, warning = within_memory(
            lambda attempt: self._apply(request, key, study, prep, points, attempt), prep.patch_size, device
        )
        warnings.append(warning)
        if points and not card.network_options.get("guidance"):
            warnings.append(UNGUIDED)
        params = {"latencies": {"network": round(network_s + changed.network_s, 4)}, "windows": changed.windows}
        if request["uncertainty"]:
            params["uncertainty"] = uncertainty_reply(study.logits, study.image)
        if text := sentences(study.image, *warnings):
            params["warning"] = text
        return changed.labels, np.asarray(study.image.meta["original_affine"], dtype=float), params

    def _apply(
        self,
        request: dict[str, Any],
        key: StudyKey,
        study: Study,
        prep: Preprocessing,
        points: Points,
        attempt: Attempt,
    ) -> _Edited:
        def make() -> ClientEditor:
            network = ServedNetwork(self.models, key.version, attempt)
            tried = dataclasses.replace(prep, patch_size=triple(attempt.window))
            return ClientEditor(
                Editor(study, network, tried, device=attempt.volume_device, mask=self._mask(request)), network
            )

        # What was computed another way, for want of memory, is not what the next click is to start from.
        first = attempt == Attempt(tuple(prep.patch_size), key.device, key.device)
        held = self.sessions.editor(key, request["client"], _mask_id(request), make)
        with held if first and request["keep"] else nullcontext(make()) as client:
            before = client.network.seconds
            try:
                labels = client.editor.apply(points)
            finally:
                client.network.give_back_memory()
            return _Edited(labels, client.editor.windows_computed, client.network.seconds - before)

    def _mask(self, request: dict[str, Any]) -> np.ndarray | None:
        """The client's own segmentation ``(X, Y, Z)`` in the project's values, or None if it sent none."""
        if request["mask"] is None:
            return None
        image = Path(request["image"])
        info = {"label_info": request["label_info"]}
        labels = label_array(request["mask"], image, request["image_id"] or image.name, self.project.labels, info)
        # What nobody has labelled yet is no structure.
        return np.where(labels == UNLABELLED, 0, labels)


def open_study(
    models: ServedModels, version: str, path: str, prep: Preprocessing, device: str
) -> tuple[Study, str | None, float]:
    """Segment a volume for its edits: the study, a sentence if memory was short, and the network's seconds."""
    image = apply(inference_transforms(prep, device=device), {"image": path})["image"]
    networks: list[ServedNetwork] = []

    def logits(attempt: Attempt) -> torch.Tensor:
        networks.append(ServedNetwork(models, version, attempt))
        return volume_logits(networks[-1], image)

    found, warning = within_memory(logits, prep.patch_size, device)
    return study_from_logits(image, found), warning, sum(network.seconds for network in networks)


def _on_grid(request: dict[str, Any], size: Any, affine: Any) -> tuple[Points, np.ndarray]:
    matrix = np.asarray(affine, dtype=float)
    return in_files_order(request["points"], [int(n) for n in size], matrix, request["voxel_order"]), matrix


def _mask_id(request: dict[str, Any]) -> str:
    """The same for the same label file with the same names, empty without one."""
    if request["mask"] is None:
        return ""
    names = json.dumps(request["label_info"], sort_keys=True, default=str)
    return hashlib.sha256(request["mask"].read_bytes() + names.encode()).hexdigest()
