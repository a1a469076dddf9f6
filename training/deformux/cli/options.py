"""Arguments and options that several commands of ``deformux`` have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deformux.cli.common import MAX_SEED, MAX_THREADS
from deformux.data.preprocessing import FRAMES, MODALITIES
from deformux.networks.presets import PRESETS

__all__ = [
    "ContinueSteps",
    "Device",
    "FirstSeed",
    "Frame",
    "KeepLargest",
    "LabelNames",
    "Modality",
    "ModelFile",
    "Overwrite",
    "PatchSize",
    "Percentiles",
    "PresetName",
    "ResultFolder",
    "ScanFolder",
    "Spacing",
    "TestFraction",
    "Threads",
    "Window",
]

Threads = Annotated[int, typer.Option(help="CPU threads; 0 lets PyTorch choose.", min=0, max=MAX_THREADS)]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N; auto takes the first GPU if there is one.")]
ModelFile = Annotated[
    str, typer.Argument(help="A .safetensors file with its .json card, or the name of a shipped model.")
]
ScanFolder = Annotated[Path, typer.Argument(help="A volume, or a folder of volumes.")]
ResultFolder = Annotated[Path, typer.Argument(help="Folder for the label volumes (.nii.gz).")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace results that another model has made.")]
LabelNames = Annotated[str, typer.Option(help="Names of labels 1..N, comma separated; default: from dataset.json.")]
Modality = Annotated[str, typer.Option(help=f"{', '.join(MODALITIES)}; plan and fit: or auto.")]
PresetName = Annotated[str, typer.Option(help=f"{', '.join(PRESETS)}; plan and fit: or auto.")]
Spacing = Annotated[str, typer.Option(help="Voxel size in mm along the frame's axes, native; plan and fit: or auto.")]
PatchSize = Annotated[str, typer.Option(help="Patch in voxels along the same axes; plan and fit: or auto.")]
Window = Annotated[str, typer.Option(help="CT window low,high in HU, e.g. -1000,400 for lung.")]
Percentiles = Annotated[str, typer.Option(help="Percentiles low,high to which MR is clipped.")]
Frame = Annotated[
    str, typer.Option(help=f"{' or '.join(FRAMES)}: anatomical axes, or the scan's own with the slices last.")
]
KeepLargest = Annotated[
    str, typer.Option(help="yes or no: keep only the largest connected piece of a segmentation's labels; or auto.")
]
FirstSeed = Annotated[
    int, typer.Option(help="To share a folder between processes, give each different seeds.", min=0, max=MAX_SEED)
]
ContinueSteps = Annotated[
    int, typer.Option(help="Continue from the previous round for this number of steps; 0: train from scratch.", min=0)
]
TestFraction = Annotated[
    float, typer.Option(help="Share of the volumes to test on, chosen by a hash of their ids.", min=0, max=1)
]
