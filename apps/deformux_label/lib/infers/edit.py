"""Editing task: clicks of Slicer's SmartEdit correct the automatic segmentation, or the client's own."""

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
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from monailabel.utils.others.generic import device_list

from deformux.data.grid import triple
from deformux.data.label_values import UNLABELLED
from deformux.data.loading import LoadVolumed
from deformux.data.preprocessing import Preprocessing
from deformux.data.sequences import first_present
from deformux.interactive.editor import Editor
from deformux.interactive.open_scan import OpenScan
from deformux_label.lib.configs.project import Project
from deformux_label.lib.infers.click_cache import ClickCache, ClientEditor, ScanKey
from deformux_label.lib.infers.gpu_memory import Placement, within_memory
from deformux_label.lib.infers.model_loader import ServedModels
from deformux_label.lib.infers.reply_file import write_reply
from deformux_label.lib.infers.segmented_scan import open_requested_scan
from deformux_label.lib.infers.served_network import UNTRAINED, ServedNetwork, as_http_errors, joined_warnings
from deformux_label.lib.infers.uncertainty_map import OPTION, uncertainty_reply
from deformux_label.lib.requests.clicks import (
    BACKGROUND_LABEL,
    VOXEL_ORDERS,
    ClickedVoxels,
    EditRequest,
    to_file_order,
)
from deformux_label.lib.requests.inference import InferenceRequest
from deformux_label.lib.store.annotator import annotator_of
from deformux_label.lib.store.label_check import label_array

__all__ = ["Edit"]

logger = logging.getLogger(__name__)

UNGUIDED = "This model was not trained with clicks: they move nearby borders and repair little else."


@dataclass(frozen=True)
class _Edited:
    """Labels ``(X, Y, Z)`` on the scan's grid, and the cost of computing them."""

    labels: np.ndarray
    windows: int
    network_s: float


class Edit(InferTask):
    """Segmentation corrected by clicks on any label or the background, on the scan's own grid.

    It starts from the label file of the request, else from the automatic segmentation. The result depends
    only on the image, the model, the start and the set of clicks; ``cache`` only makes it faster. Without a model, only
    the clicked voxels are set.
    """

    def __init__(self, project: Project, models: ServedModels, cache: ClickCache) -> None:
        super().__init__(
            type=InferType.DEEPEDIT,
            # Slicer offers clicks on the background only if it is listed.
            labels={**project.label_values, BACKGROUND_LABEL: 0},
            dimension=3,
            description="DeformUX-Net, corrected by clicks",
            config={"device": device_list(), "voxel_order": list(VOXEL_ORDERS), **OPTION},
        )
        self.project = project
        self.models = models
        self.cache = cache

    def is_valid(self) -> bool:
        return True

    def parsed(self, sent: Mapping[str, Any], asked: InferenceRequest, uploads: Path | None) -> EditRequest:
        """Return the typed request; raise HTTPException for a bad one."""
        client = annotator_of(sent)
        return EditRequest.of(sent, asked, labels=self.project.labels, uploads=uploads, client=client)

    def __call__(self, request: EditRequest) -> tuple[str, dict[str, Any]]:
        start = time.perf_counter()
        version = self.models.current()
        with as_http_errors():
            if version is None:
                labels, affine, params = self._without_a_model(request)
            else:
                labels, affine, params = self._edited(request, version)
        written = time.perf_counter()
        path = write_reply(labels, affine, request, self.project.label_values)
        now = time.perf_counter()
        latencies = params.setdefault("latencies", {"network": 0.0})
        latencies |= {"write": round(now - written, 4), "total": round(now - start, 4)}
        logger.info("Edit of %s: %s", Path(request.scan.path).name, params)
        return path, {"label_names": self.project.label_values, "model_version": version, **params}

    def _without_a_model(self, request: EditRequest) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        image = LoadVolumed("image")({"image": request.scan.path})["image"]
        points, affine = _on_grid(request, image.shape[1:], image.affine)
        labels = self._mask(request)
        if labels is None:
            labels = np.zeros(image.shape[1:], dtype=np.uint8)
        for value, voxels in points.items():
            labels[tuple(np.transpose(voxels))] = value
        return labels, affine, {"warning": joined_warnings(image, self.models.warning(None), UNTRAINED)}

    def _edited(self, request: EditRequest, version: str) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        device = request.options.device
        _, card = self.models.load(version, device)
        prep = card.preprocessing
        key = ScanKey.of(request.scan.files, version, device)
        held = self.cache.peek(key)
        if held is None:
            # Refuse bad points before a whole volume is segmented.
            image = LoadVolumed("image")({"image": first_present(request.scan.files)})["image"]
            points, _ = _on_grid(request, image.shape[1:], image.affine)
        else:
            points, _ = _on_grid(request, held.labels.shape, held.image.meta["original_affine"])
        opened = open_requested_scan(self.models, self.cache, request.scan, key)
        scan = opened.scan
        changed, warning = within_memory(
            lambda placement: self._apply(request, key, scan, prep, points, placement), prep.patch_size, device
        )
        unguided = UNGUIDED if points and not card.network_options.get("guidance") else None
        network_s = opened.network_s + changed.network_s
        params = {"latencies": {"network": round(network_s, 4)}, "windows": changed.windows}
        if request.options.uncertainty:
            params["uncertainty"] = uncertainty_reply(scan.logits, scan.image)
        if text := joined_warnings(scan.image, self.models.warning(version), opened.warning, warning, unguided):
            params["warning"] = text
        return changed.labels, np.asarray(scan.image.meta["original_affine"], dtype=float), params

    def _apply(
        self,
        request: EditRequest,
        key: ScanKey,
        scan: OpenScan,
        prep: Preprocessing,
        points: ClickedVoxels,
        placement: Placement,
    ) -> _Edited:
        def make() -> ClientEditor:
            network = ServedNetwork(self.models, key.version, placement)
            tried = dataclasses.replace(prep, patch_size=triple(placement.window))
            return ClientEditor(
                Editor(scan, network, tried, device=placement.volume_device, mask=self._mask(request)), network
            )

        # The next click must not start from the results of a fallback placement.
        first = placement == Placement(tuple(prep.patch_size), key.device, key.device)
        held = self.cache.editor(key, request.client, _mask_id(request), make)
        with held if first and request.scan.keep else nullcontext(make()) as client:
            before = client.network.seconds
            try:
                labels = client.editor.apply(points)
            finally:
                client.network.give_back_memory()
            return _Edited(labels, client.editor.windows_computed, client.network.seconds - before)

    def _mask(self, request: EditRequest) -> np.ndarray | None:
        """Return the client's own segmentation ``(X, Y, Z)`` in the project's values, or None if it sent none."""
        if request.mask is None:
            return None
        scan, info = request.scan, {"label_info": request.label_info}
        labels = label_array(request.mask, Path(scan.path), scan.name, self.project.labels, info)
        # Unlabelled voxels count as background.
        return np.where(labels == UNLABELLED, 0, labels)


def _on_grid(request: EditRequest, size: Any, affine: Any) -> tuple[ClickedVoxels, np.ndarray]:
    matrix = np.asarray(affine, dtype=float)
    return to_file_order(request.points, [int(n) for n in size], matrix, request.voxel_order), matrix


def _mask_id(request: EditRequest) -> str:
    """Return an id of the label file and its names; empty without a file."""
    if request.mask is None:
        return ""
    names = json.dumps(request.label_info, sort_keys=True, default=str)
    return hashlib.sha256(request.mask.read_bytes() + names.encode()).hexdigest()
