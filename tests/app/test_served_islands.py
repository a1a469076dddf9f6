"""A model that keeps the largest piece of a segmentation, on a real server: the same mask from every task."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import requests
import torch
from live import APP, CONF, LABELS, LiveServer, project_of, publish_untrained, serve_command, write_volume
from scipy import ndimage

from deformux.inference.sliding_window import segment_labels
from deformux.networks.model_file import load_model
from deformux.publishing.model_versions import ModelVersions

KEEPING = {**CONF, "keep_largest": "yes"}


def mask_of(answer: requests.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.asarray(nib.Nifti1Image.from_bytes(answer.content).dataobj)


def test_every_task_keeps_the_largest_piece(start_here: Callable[..., LiveServer], tmp_path: Path) -> None:
    studies = tmp_path / "studies"
    scan = write_volume(studies / "scan.nii.gz", tmp_path / "label.nii.gz", spacing=(2.0, 2.0, 2.5)).image
    torch.manual_seed(0)
    version = publish_untrained(studies, KEEPING, guidance=0.0, background=0.7)
    versions = ModelVersions(project_of(KEEPING).state_folder(APP, str(studies)) / "versions")
    network, card = load_model(versions.path(version))
    assert card.preprocessing.keep_largest
    everything = segment_labels(network, scan, dataclasses.replace(card.preprocessing, keep_largest=False))[0].numpy()
    pieces, count = ndimage.label(everything > 0, np.ones((3, 3, 3)))
    assert count > 1
    expected = np.where(pieces == np.bincount(pieces[pieces > 0]).argmax(), everything, 0)

    server = start_here(studies, KEEPING, serve_command)
    query = {"output": "image"}
    # An upload is not kept for clicks.
    uploaded = {"params": (None, json.dumps({"result_extension": ".nii"})), "file": (scan.name, scan.read_bytes())}
    answer = requests.post(f"{server.url}/infer/segmentation", params=query, files=uploaded, timeout=120)
    np.testing.assert_array_equal(mask_of(answer), expected)
    for model in ("segmentation", "edit"):
        answer = server.infer("scan", model=model, query=query, result_extension=".nii")
        np.testing.assert_array_equal(mask_of(answer), expected)
    island = np.argwhere(everything != expected)[0].tolist()
    value = int(everything[tuple(island)])
    clicks = {LABELS[value - 1]: [island]}
    corrected = mask_of(server.infer("scan", model="edit", query=query, result_extension=".nii", **clicks))
    assert corrected[tuple(island)] == value
    assert set(np.unique(corrected[corrected != expected])) == {value}
