"""Draw the pictures of docs/radiologist.md: one case segmented and corrected by a click, in Slicer's own views.

Starts a server with the shipped hippocampus weights, asks it with MONAI Label's client, and renders scan and masks with
``slicer-core``, which is 3D Slicer without its window. The click goes where an annotator who knows the true label
would place it: into the largest error.

    python docs/pictures/make_pictures.py ../shared/data/hippocampus hippocampus_322
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import slicer
import slicer.util
import vtk
from monailabel.client import MONAILabelClient
from PIL import Image
from trame_slicer.core import SlicerApp
from trame_slicer.views import SliceView, ThreeDView
from vtk.util.numpy_support import vtk_to_numpy

from deformux.interactive.simulated_annotator import Click, ClickAnnotator
from deformux_label.cli.common import app_folder
from deformux_label.demo.server_process import Server
from deformux_label.lib.configs.project import Project

MODEL = {"pretrained": "hippocampus"}
COLOURS = {"anterior": (0.90, 0.62, 0.0), "posterior": (0.34, 0.71, 0.91)}
VIEW_PIXELS = 380
GAP_PIXELS = 6

Picture = npt.NDArray[np.uint8]


class Viewer:
    """Slicer's slice views and 3D view of one scan, rendered into arrays."""

    def __init__(self, scan: Path) -> None:
        self.app = SlicerApp()
        # slicer.util works on the scene that the desktop sets here.
        slicer.mrmlScene = self.app.scene
        (self.volume,) = self.app.io_manager.load_volumes(str(scan))
        low, high = np.percentile(read(scan), (1, 99))
        self.volume.GetDisplayNode().AutoWindowLevelOff()
        self.volume.GetDisplayNode().SetWindowLevelMinMax(float(low), float(high))
        self.slices = {name: self._slice_view(name) for name in ("Axial", "Coronal", "Sagittal")}
        self.surfaces = ThreeDView(self.app.scene, self.app.app_logic, "3D")
        self.surfaces.render_window().SetSize(VIEW_PIXELS, VIEW_PIXELS)
        self.surfaces.set_background_gradient_color([193, 195, 232], [116, 120, 190])
        self.segmentation: Any = None

    def _slice_view(self, orientation: str) -> SliceView:
        view = SliceView(self.app.scene, self.app.app_logic, orientation)
        view.set_orientation(orientation)
        view.render_window().SetSize(VIEW_PIXELS, VIEW_PIXELS)
        view.set_background_volume_id(self.volume.GetID())
        view.fit_view_to_content()
        return view

    def position_of(self, voxel: tuple[int, int, int]) -> list[float]:
        """Return the position of a voxel in RAS millimetres."""
        matrix = vtk.vtkMatrix4x4()
        self.volume.GetIJKToRASMatrix(matrix)
        return list(matrix.MultiplyPoint((*voxel, 1.0))[:3])

    def go_to(self, position: list[float]) -> None:
        """Scroll every slice view to a position."""
        for view in self.slices.values():
            self.app.scene.GetNodeByID(view.get_view_node_id()).JumpSliceByOffsetting(*position)

    def show_mask(self, path: Path) -> None:
        """Show the labels of a file as segments over the scan, instead of those shown before."""
        scene, logic = self.app.scene, self.app.segmentations_logic
        if self.segmentation is not None:
            scene.RemoveNode(self.segmentation)
        self.segmentation = scene.AddNewNodeByClass("vtkMRMLSegmentationNode")
        self.segmentation.CreateDefaultDisplayNodes()
        self.segmentation.SetReferenceImageGeometryParameterFromVolumeNode(self.volume)
        ids = vtk.vtkStringArray()
        for name, colour in COLOURS.items():
            self.segmentation.GetSegmentation().AddEmptySegment(name, name, colour)
            ids.InsertNextValue(name)
        label_map = scene.AddNewNodeByClass("vtkMRMLLabelMapVolumeNode")
        slicer.util.updateVolumeFromArray(label_map, np.ascontiguousarray(read(path).astype(np.uint8).T))
        label_map.CopyOrientation(self.volume)
        logic.ImportLabelmapToSegmentationNode(label_map, self.segmentation, ids)
        scene.RemoveNode(label_map)
        self.segmentation.CreateClosedSurfaceRepresentation()
        self.segmentation.GetDisplayNode().SetOpacity2DFill(0.4)

    def place_click(self, position: list[float]) -> None:
        """Place a point, as SmartEdit does."""
        node = self.app.scene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode")
        node.CreateDefaultDisplayNodes()
        node.AddControlPoint(vtk.vtkVector3d(position), "")
        node.GetDisplayNode().SetSelectedColor(1.0, 0.15, 0.15)
        node.GetDisplayNode().SetGlyphScale(4.0)

    def slice(self, orientation: str) -> Picture:
        """Render a slice view."""
        return rendered(self.slices[orientation])

    def surface(self) -> Picture:
        """Render the 3D view, from the left and a little above."""
        self.surfaces.fit_view_to_content()
        camera = self.surfaces.renderer().GetActiveCamera()
        camera.Azimuth(60)
        camera.Elevation(25)
        self.surfaces.renderer().ResetCameraClippingRange()
        return rendered(self.surfaces)


def rendered(view: SliceView | ThreeDView) -> Picture:
    """Return the pixels of a view, ``(height, width, 3)``."""
    view.render()
    grab = vtk.vtkWindowToImageFilter()
    grab.SetInput(view.render_window())
    grab.ReadFrontBufferOff()
    grab.Update()
    width, height, _ = grab.GetOutput().GetDimensions()
    return vtk_to_numpy(grab.GetOutput().GetPointData().GetScalars()).reshape(height, width, 3)[::-1]


def save(path: Path, rows: list[list[Picture]]) -> None:
    """Write rows of views as one picture, with white gaps between them."""
    step = VIEW_PIXELS + GAP_PIXELS
    size = (step * len(rows) - GAP_PIXELS, step * len(rows[0]) - GAP_PIXELS, 3)
    whole = np.full(size, 255, np.uint8)
    for i, row in enumerate(rows):
        for j, view in enumerate(row):
            whole[i * step : i * step + VIEW_PIXELS, j * step : j * step + VIEW_PIXELS] = view
    Image.fromarray(whole).quantize(256, kmeans=1).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def read(path: Path) -> npt.NDArray[np.float64]:
    """Return the voxels of a NIfTI file, ``(i, j, k)``."""
    return np.asarray(nib.load(path).dataobj, dtype=float)


def segment_and_correct(scan: Path, truth: Path, folder: Path) -> tuple[Path, Path, Click]:
    """Serve a scan; return its automatic mask, the mask after one click into the largest error, and the click."""
    studies = folder / "studies"
    studies.mkdir()
    shutil.copy(scan, studies)
    image = scan.name.removesuffix(".nii.gz")
    options = {"result_extension": ".nii.gz", "result_dtype": "uint8"}
    with Server({"studies": str(studies), **MODEL}, log=folder / "server.log") as server:
        client = MONAILabelClient(server.url, str(folder))
        automatic = shutil.move(client.infer("segmentation", image, dict(options))[0], folder / "automatic.nii.gz")
        labels = (read(path).astype(np.uint8) for path in (truth, automatic))
        (click,) = ClickAnnotator(len(COLOURS)).clicks(*labels)
        name = ("background", *COLOURS)[click.label]
        clicked = {name: [list(click.voxel)], "label": name, **options}
        corrected = shutil.move(client.infer("edit", image, clicked)[0], folder / "corrected.nii.gz")
    # The server's record of these studies lies in the app's folder and would outlive them.
    shutil.rmtree(Project.from_conf(MODEL).state_folder(app_folder(), str(studies)), ignore_errors=True)
    return automatic, corrected, click


def main() -> None:
    """Write the three pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with images/ and labels/ of the hippocampus volumes")
    parser.add_argument("case", help="name of a volume there")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="where to write the pictures")
    arguments = parser.parse_args()
    scan, truth = (arguments.data / folder / f"{arguments.case}.nii.gz" for folder in ("images", "labels"))
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        automatic, corrected, click = segment_and_correct(scan, truth, Path(folder))
        viewer = Viewer(scan)
        position = viewer.position_of(click.voxel)
        viewer.go_to(position)
        bare = viewer.slice("Sagittal")
        viewer.show_mask(automatic)
        save(arguments.output / "segmentation.png", [[bare, viewer.slice("Sagittal")]])
        surface = viewer.surface()
        planes = [viewer.slice(name) for name in ("Axial", "Coronal", "Sagittal")]
        save(arguments.output / "views.png", [[planes[0], surface], [planes[1], planes[2]]])
        viewer.place_click(position)
        before = viewer.slice("Sagittal")
        viewer.show_mask(corrected)
        save(arguments.output / "click.png", [[before, viewer.slice("Sagittal")]])
    # Slicer's own teardown may crash when Python unloads it.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
