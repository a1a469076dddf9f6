"""Both client libraries and real 3D Slicer against a live server: replies lie on their image."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel as nib
import nrrd
import numpy as np
import pytest
import requests
import SimpleITK as sitk
from live import LABELS, LiveServer, Volume, slicer, write
from monailabel.client import MONAILabelClient

from deformux.inference.metrics import dice_per_label
from deformux_label.lib.configs.project import InvalidOption, Project

GEOMETRIES = ["axial", "anisotropic", "permuted", "oblique", "oblique_nrrd", "plain_nii"]
TOLERANCE_MM = 1e-3


def slicer_parameters(info: dict[str, Any]) -> dict[str, Any]:
    """Return the options that the extension sends: the first of each list, and always these two."""
    config = info["models"]["segmentation"]["config"]
    params = {key: value[0] if isinstance(value, list) else value for key, value in config.items()}
    return {**params, "result_extension": ".nrrd", "result_dtype": "uint8"}


@pytest.fixture(params=["monailabel", "slicer"])
def client(request: pytest.FixtureRequest, server: LiveServer, slicer_client: ModuleType, tmp_path: Path) -> Any:
    library = MONAILabelClient if request.param == "monailabel" else slicer_client.MONAILabelClient
    return library(server.url, str(tmp_path), "radiologist-1")


def test_info_is_what_the_extension_needs(client: Any) -> None:
    info = client.info()
    assert not client.auth_enabled()
    # Slicer offers clicks on the background if it is a label; last, so that the others keep their positions.
    assert info["labels"] == [*LABELS, "background"]
    assert not info.get("config"), "the extension refuses a server with a top-level config"
    name, model = next(iter(info["models"].items()))
    assert (name, model["type"]) == ("segmentation", "segmentation")
    assert model["labels"] == {"liver": 1, "spleen": 2}
    assert {"random", "first", "uncertainty"} <= set(info["strategies"])
    assert {"dice", "uncertainty"} <= set(info["scoring"])
    sections = [model, *info["trainers"].values()]
    for config in (section["config"] for section in sections):
        for key, value in config.items():
            with pytest.raises(InvalidOption):  # requests carry options and labels side by side
                Project.from_conf({"labels": key})
            assert not isinstance(value, list) or (value and all(isinstance(item, str) for item in value))


def test_a_whole_round(client: Any, server: LiveServer, volumes: dict[str, Volume], trainings: list) -> None:
    unlabelled = {name for name, entry in server.objects().items() if "final" not in entry["labels"]}
    for strategy in ("random", "first", "uncertainty"):
        sample = client.next_sample(strategy, {})
        assert sample["id"] in unlabelled
        assert Path(sample["path"]).is_file()
    volume = volumes["axial"]
    file, params = client.infer("segmentation", volume.id, slicer_parameters(client.info()))
    assert params["label_names"] == {"liver": 1, "spleen": 2}
    assert params["model_version"] == "v0002"
    saved = client.save_label(volume.id, file, params={"label_info": [{"name": name} for name in LABELS]})
    assert saved["image"] == volume.id
    stored = client.download_label(volume.id, "final")
    assert (sitk.GetArrayFromImage(sitk.ReadImage(stored)) == sitk.GetArrayFromImage(sitk.ReadImage(file))).all()
    deleted = requests.delete(f"{server.url}/datastore/label", params={"id": volume.id, "tag": "final"}, timeout=30)
    assert deleted.status_code == 200
    assert not server.objects()[volume.id]["labels"]


def test_a_volume_outside_the_studies(client: Any, volumes: dict[str, Volume], trainings: list) -> None:
    """In the extension: File > Add Data, then Run; the volume travels as a session."""
    session = client.create_session(str(volumes["oblique"].image))["session_id"]
    assert client.get_session(session)
    file, _ = client.infer("segmentation", "MRHead", slicer_parameters(client.info()), session_id=session)
    np.testing.assert_allclose(affine_of(file), volumes["oblique"].affine, atol=TOLERANCE_MM)
    client.remove_session(session)
    # And as an upload within the request.
    file, _ = client.infer("segmentation", "", {}, file=str(volumes["permuted"].image))
    np.testing.assert_allclose(affine_of(file), volumes["permuted"].affine, atol=TOLERANCE_MM)


def test_uploading_an_image(client: Any, server: LiveServer, volumes: dict[str, Volume]) -> None:
    name = f"uploaded {type(client).__module__}"
    assert client.upload_image(str(volumes["oblique_nrrd"].image), name)["image"] == name
    try:
        answer = requests.get(f"{server.url}/datastore/image", params={"image": name}, timeout=30)
        assert answer.content == volumes["oblique_nrrd"].image.read_bytes()
    finally:
        requests.delete(f"{server.url}/datastore/image", params={"id": name}, timeout=30)
    assert name not in server.objects()


@pytest.mark.parametrize("extension", [".nii.gz", ".nii", ".nrrd", ".seg.nrrd", None])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_mask_is_on_the_images_grid(
    server: LiveServer, volumes: dict[str, Volume], trainings: list, name: str, extension: str | None, tmp_path: Path
) -> None:
    volume = volumes[name]
    options = {"result_extension": extension} if extension else {}
    answer = server.infer(volume.id, query={"output": "image"}, **options)
    assert answer.status_code == 200, answer.text
    sent = answer.headers["content-disposition"].rpartition("filename=")[2].strip('"')
    assert sent.endswith(extension or "".join(volume.image.suffixes))
    file = tmp_path / sent
    file.write_bytes(answer.content)
    labels = array_of(file)
    assert labels.shape == volume.truth.shape
    assert labels.dtype == np.uint8
    np.testing.assert_allclose(affine_of(file), volume.affine, atol=TOLERANCE_MM)
    # The model has learned where the organs are: a flip or a swap of axes would move them by centimetres.
    assert (dice_per_label(labels, volume.truth, len(LABELS)) > 0.4).all()


def test_the_mask_opens_over_its_image_in_slicer(
    server: LiveServer, volumes: dict[str, Volume], trainings: list, slicer_client: ModuleType, tmp_path: Path
) -> None:
    client = slicer_client.MONAILabelClient(server.url, str(tmp_path), "radiologist-1")
    params = slicer_parameters(client.info())
    jobs, truths = [], []
    for name in GEOMETRIES:
        file, _ = client.infer("segmentation", volumes[name].id, dict(params))
        jobs.append({"image": str(volumes[name].image), "result": file, "labels": list(LABELS)})
        truths.append(volumes[name])
    answer = server.infer("oblique", query={"output": "image"}, result_extension=".seg.nrrd")
    (tmp_path / "own.seg.nrrd").write_bytes(answer.content)
    jobs.append({"image": str(volumes["oblique"].image), "result": str(tmp_path / "own.seg.nrrd"), "labels": []})
    truths.append(volumes["oblique"])

    for job, seen, volume in zip(jobs, slicer(jobs), truths, strict=True):
        check_overlay(seen)
        assert list(seen["segments"]) == list(LABELS)
        for value, label in enumerate(LABELS, start=1):
            segment = seen["segments"][label]
            mask = array_of(job["result"]) == value
            assert segment["voxels"] == mask.sum() > 0
            centre = nib.affines.apply_affine(volume.affine, np.argwhere(mask).mean(0))
            np.testing.assert_allclose(segment["centre"], centre, atol=1e-2)


def test_what_slicer_saves_is_accepted_and_keeps_its_meaning(
    server: LiveServer, volumes: dict[str, Volume], tmp_path: Path
) -> None:
    """Slicer numbers saved segments by position: with the first one deleted, the second is saved as 1."""
    names = ["oblique", "oblique_nrrd", "permuted"]
    jobs = [
        {
            "image": str(volumes[name].image),
            "result": str(volumes[name].label),
            "labels": list(LABELS),
            "delete": delete,
            "export": str(tmp_path / f"{name}-{len(delete)}.nii.gz"),
        }
        for name in names
        for delete in ([], ["liver"])
    ]
    for job, seen in zip(jobs, slicer(jobs), strict=True):
        name = Path(job["export"]).name.split("-")[0]
        saved = server.submit(name, Path(job["export"]), label_info=seen["label_info"])
        assert saved.status_code == 200, saved.text
        stored = requests.get(f"{server.url}/datastore/label", params={"label": name, "tag": "final"}, timeout=30)
        file = tmp_path / stored.headers["content-disposition"].rpartition("filename=")[2].strip('"')
        file.write_bytes(stored.content)
        expected = np.where(volumes[name].truth == 1, 0, volumes[name].truth) if job["delete"] else volumes[name].truth
        assert (array_of(file) == expected).all()
    for name in names:
        requests.delete(f"{server.url}/datastore/label", params={"id": name, "tag": "final"}, timeout=30)


@pytest.mark.parametrize("scan", ["example_ct_sm", "example_mr_sm", "example_ct_dicom"])
def test_real_scans_open_in_slicer(
    server: LiveServer,
    studies: Path,
    trainings: list,
    shared_data: Path,
    scan: str,
    slicer_client: ModuleType,
    tmp_path: Path,
) -> None:
    source = shared_data / "ct" / scan
    client = slicer_client.MONAILabelClient(server.url, str(tmp_path), "radiologist-1")
    params = slicer_parameters(client.info())
    if source.is_dir():
        # A series has no id in MONAI Label's local datastore; a client sends its files as a session.
        files = [("files", (path.name, path.read_bytes())) for path in sorted(source.iterdir())]
        session = requests.put(f"{server.url}/session/", files=files, timeout=60).json()["session_id"]
        file, _ = client.infer("segmentation", "series", params, session_id=session)
        image = next(iter(sorted(source.iterdir())))
    else:
        image = source.with_name(f"{scan}.nii.gz")
        session = client.create_session(str(image))["session_id"]
        file, _ = client.infer("segmentation", scan, params, session_id=session)
    client.remove_session(session)
    job = {"image": str(image), "result": file, "labels": list(LABELS)}
    if source.is_dir():
        series = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(source)))
        result = sitk.ReadImage(file)
        assert result.GetSize() == series.GetSize()
        for ours, theirs in [(result.GetOrigin(), series.GetOrigin()), (result.GetSpacing(), series.GetSpacing())]:
            np.testing.assert_allclose(ours, theirs, atol=TOLERANCE_MM)
        job["image"] = str(tmp_path / "series.nrrd")
        sitk.WriteImage(series, job["image"])
    (seen,) = slicer([job])
    check_overlay(seen)
    assert list(seen["segments"]) == list(LABELS)


def test_an_untrained_project_answers_with_an_empty_mask(
    fresh: tuple[LiveServer, Path], volumes: dict[str, Volume], slicer_client: ModuleType, tmp_path: Path
) -> None:
    server, folder = fresh
    write(
        folder / "dropped_in.nii.gz", np.asarray(nib.load(volumes["oblique"].image).dataobj), volumes["oblique"].affine
    )
    client = slicer_client.MONAILabelClient(server.url, str(tmp_path), "radiologist-1")
    for _ in range(100):
        if "id" in (sample := client.next_sample("uncertainty", {})):
            break
        time.sleep(0.1)  # the folder is watched, which takes a moment
    assert sample["id"] == "dropped_in"
    file, params = client.infer("segmentation", sample["id"], slicer_parameters(client.info()))
    assert params["model_version"] is None
    assert "no trained model" in params["warning"]
    assert not array_of(file).any()
    (seen,) = slicer([{"image": sample["path"], "result": file, "labels": list(LABELS)}])
    check_overlay(seen)
    assert {name: segment["voxels"] for name, segment in seen["segments"].items()} == {"liver": 0, "spleen": 0}
    # An empty proposal must not be taken for a prediction.
    refused = server.infer("dropped_in", save_label=True)
    assert refused.status_code == 409
    assert "no trained model" in refused.json()["detail"]
    assert server.objects()["dropped_in"]["labels"] == {}


def check_overlay(seen: dict[str, Any]) -> None:
    """Check that Slicer shows image and mask in one place."""
    if "result_matrix" not in seen:
        return
    assert seen["result_dimensions"] == seen["dimensions"]
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in seen["dimensions"]], indexing="ij")).reshape(3, -1).T
    image, mask = (nib.affines.apply_affine(np.array(seen[key]), corners) for key in ("matrix", "result_matrix"))
    # Slicer mirrors the third axis of a left-handed scan, which may reorder the corners.
    distances = np.linalg.norm(image[:, None] - mask[None], axis=-1)
    assert distances.min(0).max() < TOLERANCE_MM
    assert distances.min(1).max() < TOLERANCE_MM


def array_of(path: str | Path) -> np.ndarray:
    if str(path).endswith(".nrrd"):
        return nrrd.read(str(path))[0]
    return np.asarray(nib.load(path).dataobj)


def affine_of(path: str | Path) -> np.ndarray:
    if not str(path).endswith(".nrrd"):
        return nib.load(path).affine
    header = nrrd.read_header(str(path))
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = header["space directions"].T, header["space origin"]
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def test_seg_nrrd_names_its_segments(server: LiveServer, volumes: dict[str, Volume], tmp_path: Path) -> None:
    (tmp_path / "a.seg.nrrd").write_bytes(
        server.infer("axial", query={"output": "image"}, result_extension=".seg.nrrd").content
    )
    header = nrrd.read_header(str(tmp_path / "a.seg.nrrd"))
    assert [header[f"Segment{i}_Name"] for i in range(2)] == list(LABELS)
    assert [header[f"Segment{i}_LabelValue"] for i in range(2)] == ["1", "2"]


def test_json_only_replies(server: LiveServer) -> None:
    answer = server.infer("axial", query={"output": "json"})
    assert json.loads(answer.text)["label_names"] == {"liver": 1, "spleen": 2}
