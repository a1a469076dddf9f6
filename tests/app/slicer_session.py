"""Real 3D Slicer in a process of its own: what the extension does with a reply, and with a label to save.

Reads a JSON list of jobs from standard input and writes a JSON list of answers as the last line of standard output.
A job has ``image``; and ``result`` with ``labels`` to import as the extension's ``updateSegmentationMask`` does; or
``export`` to save the imported segments as ``onSaveLabel`` does; or ``markups``, positions in RAS millimetres by label,
to place as markups and read as voxels with the extension's own ``getControlPointsXYZ``; or ``roi``, centre and size in
RAS millimetres, to read with its ``getROIPointsXYZ``; or ``probes``, positions at which the answer names the segment
that is there; or ``array``, where to save the voxels as Slicer has them; or ``draw``, boxes of voxels by segment, to
save as a segmentation of their own under ``segmentation``.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import SimpleITK as sitk
import slicer
import slicer.util
import vtk
import vtk.util.numpy_support
from trame_slicer.core import SlicerApp

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def matrix_of(node: Any) -> list[list[float]]:
    m = vtk.vtkMatrix4x4()
    node.GetIJKToRASMatrix(m)
    return [[m.GetElement(i, j) for j in range(4)] for i in range(4)]


def push_label_map(app: SlicerApp, path: str) -> Any:
    """The extension's ``sitkUtils.PushVolumeToSlicer(sitk.ReadImage(path))``, which only the desktop has."""
    image = sitk.ReadImage(path)
    node = app.scene.AddNewNodeByClass("vtkMRMLLabelMapVolumeNode")
    slicer.util.updateVolumeFromArray(node, sitk.GetArrayFromImage(image))
    to_lps = np.eye(4)
    to_lps[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    to_lps[:3, 3] = image.GetOrigin()
    m = vtk.vtkMatrix4x4()
    for (i, j), value in np.ndenumerate(LPS_TO_RAS @ to_lps):
        m.SetElement(i, j, value)
    node.SetIJKToRASMatrix(m)
    return node


def segments_of(node: Any) -> dict[str, dict[str, Any]]:
    """Voxels and centre in RAS millimetres of each segment, by name."""
    found = {}
    segmentation = node.GetSegmentation()
    for index in range(segmentation.GetNumberOfSegments()):
        segment_id = segmentation.GetNthSegmentID(index)
        mask = slicer.vtkOrientedImageData()
        node.GetBinaryLabelmapRepresentation(segment_id, mask)
        answer: dict[str, Any] = {"voxels": 0, "centre": None}
        if mask.GetPointData().GetScalars() is not None and mask.GetNumberOfPoints():
            array = vtk.util.numpy_support.vtk_to_numpy(mask.GetPointData().GetScalars())
            filled = np.argwhere(array.reshape(mask.GetDimensions()[::-1]) > 0)[:, ::-1]
            if len(filled):
                m = vtk.vtkMatrix4x4()
                mask.GetImageToWorldMatrix(m)
                centre = filled.mean(0) + np.array(mask.GetExtent()[::2])
                point = m.MultiplyPoint((*centre, 1.0))
                answer = {"voxels": len(filled), "centre": list(point[:3])}
        found[segmentation.GetSegment(segment_id).GetName()] = answer
    return found


def of_the_extension(name: str) -> Any:
    """A method of the extension's widget, which as a whole needs Slicer's desktop."""
    files = importlib.metadata.files("monailabel") or []
    (module,) = [f for f in files if str(f).endswith("plugins/slicer/MONAILabel/MONAILabel.py")]
    tree = ast.parse(Path(str(module.locate())).read_text())
    (method,) = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name]
    found: dict[str, Any] = {"vtk": vtk, "logging": logging}
    exec(compile(ast.Module([method], []), str(module), "exec"), found)
    return found[name]


def voxels_of(app: SlicerApp, volume: Any, positions: list[list[float]]) -> list[list[int]]:
    """Voxels that the extension sends for markups at these positions."""
    node = app.scene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode")
    for position in positions:
        node.AddControlPoint(vtk.vtkVector3d(position))
    return of_the_extension("getControlPointsXYZ")(SimpleNamespace(_volumeNode=volume), node, "foreground")


def bounds_of(app: SlicerApp, volume: Any, centre: list[float], size: list[float]) -> list[int]:
    """Voxel bounds that the extension sends for a region of interest."""
    node = app.scene.AddNewNodeByClass("vtkMRMLMarkupsROINode")
    node.SetCenter(centre)
    node.SetSize(size)
    return of_the_extension("getROIPointsXYZ")(SimpleNamespace(_volumeNode=volume), node)


def segment_at(node: Any, position: list[float]) -> str | None:
    """Name of the segment at a position in RAS millimetres."""
    segmentation = node.GetSegmentation()
    for index in range(segmentation.GetNumberOfSegments()):
        segment_id = segmentation.GetNthSegmentID(index)
        mask = slicer.vtkOrientedImageData()
        node.GetBinaryLabelmapRepresentation(segment_id, mask)
        if mask.GetPointData().GetScalars() is None or not mask.GetNumberOfPoints():
            continue
        m = vtk.vtkMatrix4x4()
        mask.GetWorldToImageMatrix(m)
        voxel = np.rint(m.MultiplyPoint((*position, 1.0))[:3]).astype(int)
        low, high = np.reshape(mask.GetExtent(), (3, 2)).T
        if ((voxel >= low) & (voxel <= high)).all() and mask.GetScalarComponentAsDouble(*voxel.tolist(), 0):
            return segmentation.GetSegment(segment_id).GetName()
    return None


def drawn(app: SlicerApp, volume: Any, job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Draw segments, some of which are deleted again, save them as Slicer does, and say what Slicer reads back."""
    node = app.scene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    node.SetReferenceImageGeometryParameterFromVolumeNode(volume)
    shape = volume.GetImageData().GetDimensions()[::-1]
    for name, boxes in job["draw"]:
        if boxes is None:
            node.GetSegmentation().RemoveSegment(node.GetSegmentation().GetSegmentIdBySegmentName(name))
            continue
        array = np.zeros(shape, dtype=np.uint8)
        for low, high in boxes:
            array[tuple(slice(a, b) for a, b in zip(low[::-1], high[::-1], strict=True))] = 1
        label_map = app.scene.AddNewNodeByClass("vtkMRMLLabelMapVolumeNode")
        slicer.util.updateVolumeFromArray(label_map, array)
        label_map.CopyOrientation(volume)
        image = slicer.vtkSlicerSegmentationsModuleLogic.CreateOrientedImageDataFromVolumeNode(label_map)
        segment = node.GetSegmentation().AddEmptySegment("", name)
        slicer.vtkSlicerSegmentationsModuleLogic.SetBinaryLabelmapToSegment(image, node, segment)
    storage = slicer.vtkMRMLSegmentationStorageNode()
    storage.SetCropToMinimumExtent(job.get("crop", False))
    storage.SetFileName(job["segmentation"])
    assert storage.WriteData(node)
    return segments_of(app.segmentations_logic.LoadSegmentationFromFile(job["segmentation"], False))


def run(app: SlicerApp, job: dict[str, Any]) -> dict[str, Any]:
    volume = app.io_manager.load_volumes(job["image"])[0]
    answer: dict[str, Any] = {"dimensions": volume.GetImageData().GetDimensions(), "matrix": matrix_of(volume)}
    if "markups" in job:
        answer["points"] = {name: voxels_of(app, volume, positions) for name, positions in job["markups"].items()}
    if "roi" in job:
        answer["roi"] = bounds_of(app, volume, *job["roi"])
    if "array" in job:
        np.save(job["array"], vtk.util.numpy_support.vtk_to_numpy(volume.GetImageData().GetPointData().GetScalars()))
    if "draw" in job:
        answer["segments"] = drawn(app, volume, job)
    if "result" not in job:
        app.scene.Clear(0)
        return answer
    node = app.scene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    node.SetReferenceImageGeometryParameterFromVolumeNode(volume)
    if job["result"].endswith(".seg.nrrd"):
        node = app.segmentations_logic.LoadSegmentationFromFile(job["result"], False)
    else:
        # Empty segments first, as on every new sample.
        for label in job["labels"]:
            node.GetSegmentation().AddEmptySegment(label, label)
        label_map = push_label_map(app, job["result"])
        answer["result_dimensions"] = label_map.GetImageData().GetDimensions()
        answer["result_matrix"] = matrix_of(label_map)
        ids = vtk.vtkStringArray()
        for label in job["labels"]:
            ids.InsertNextValue(label)
        app.segmentations_logic.ImportLabelmapToSegmentationNode(label_map, node, ids)
    answer["segments"] = segments_of(node)
    answer["at_probes"] = [segment_at(node, position) for position in job.get("probes", [])]
    if "export" in job:
        segmentation = node.GetSegmentation()
        for label in job.get("delete", []):
            segmentation.RemoveSegment(segmentation.GetSegmentIdBySegmentName(label))
        ids = vtk.vtkStringArray()
        for index in range(segmentation.GetNumberOfSegments()):
            ids.InsertNextValue(segmentation.GetNthSegmentID(index))
        label_map = app.scene.AddNewNodeByClass("vtkMRMLLabelMapVolumeNode")
        app.segmentations_logic.ExportSegmentsToLabelmapNode(node, ids, label_map, volume)
        app.io_manager.write_volume(label_map, job["export"])
        answer["label_info"] = [
            {"name": segmentation.GetSegment(ids.GetValue(i)).GetName(), "idx": i + 1}
            for i in range(ids.GetNumberOfValues())
        ]
    app.scene.Clear(0)
    return answer


def main() -> None:
    jobs = json.load(sys.stdin)
    app = SlicerApp()
    slicer.mrmlScene = app.scene
    answers = [run(app, job) for job in jobs]
    print("\n" + json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
