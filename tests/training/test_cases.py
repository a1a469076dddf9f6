"""Labelled folders: pairs of image and label, and names of labels."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from deformux.data.cases import InvalidFolder, find_cases, label_names, split_label_names


def _folder(folder: Path, images: Sequence[str], labels: Sequence[str]) -> Path:
    for kind, names in (("images", images), ("labels", labels)):
        (folder / kind).mkdir()
        for name in names:
            (folder / kind / name).write_text("")
    return folder


def test_cases_are_paired_by_name(tmp_path: Path) -> None:
    _folder(tmp_path, ["a.nii.gz", "b.nii.gz", "c.nii.gz", "._a.nii.gz"], ["a.nii.gz", "b.nii.gz", "d.nii.gz"])
    assert [case.id for case in find_cases(tmp_path)] == ["a", "b"]
    (tmp_path / "split.json").write_text(json.dumps({"train": ["a"], "val": ["b"]}))
    assert [case.id for case in find_cases(tmp_path, subset="val")] == ["b"]
    with pytest.raises(InvalidFolder, match="train, val"):
        find_cases(tmp_path, subset="test")


@pytest.mark.parametrize(
    ("images", "labels", "paired"),
    [
        (["a.nii.gz"], ["a.nrrd"], ("a.nii.gz", "a.nrrd")),
        # A foreign file beside the image, or beside the label.
        (["a.nii.gz", "a.nrrd"], ["a.nii.gz"], ("a.nii.gz", "a.nii.gz")),
        (["a.nii", "a.nii.gz"], ["a.nii"], ("a.nii", "a.nii")),
        (["a.nrrd"], ["a.mha", "a.nii.gz", "a.nrrd"], ("a.nrrd", "a.nrrd")),
        (["a.NII.GZ", "a.nrrd"], ["a.nii.gz"], ("a.NII.GZ", "a.nii.gz")),
        (["a.NII.GZ", "a.nii.gz"], ["a.nii.gz"], ("a.nii.gz", "a.nii.gz")),
        (["a.mha", "a.nii.gz"], ["a.nii.gz", "a.nrrd"], ("a.nii.gz", "a.nii.gz")),
    ],
)
def test_files_that_share_a_stem_are_paired_by_suffix(
    images: list[str], labels: list[str], paired: tuple[str, str], tmp_path: Path
) -> None:
    _folder(tmp_path, images, labels)
    (case,) = find_cases(tmp_path)
    assert (case.id, case.image.name, case.label.name) == ("a", *paired)


@pytest.mark.parametrize(
    ("images", "labels", "named"),
    [
        (["a.nii.gz", "a.nrrd"], ["a.mha"], ("images/a.nii.gz", "images/a.nrrd")),
        (["a.mha"], ["a.nii.gz", "a.nrrd"], ("labels/a.nii.gz", "labels/a.nrrd")),
        (["a.nii.gz", "a.nrrd"], ["a.nii.gz", "a.nrrd"], ("images/a.nii.gz", "images/a.nrrd")),
        (["a.NII", "a.Nii"], ["a.nii"], ("images/a.NII", "images/a.Nii")),
        (["a.mha", "a.nii", "a.nrrd"], ["a.nii", "a.nrrd"], ("images/a.nii", "images/a.nrrd")),
    ],
)
def test_an_ambiguous_pair_is_refused_naming_its_files(
    images: list[str], labels: list[str], named: tuple[str, str], tmp_path: Path
) -> None:
    _folder(tmp_path, ["b.nii.gz", *images], ["b.nii.gz", *labels])
    sentence = re.escape(f"{tmp_path / named[0]} and {tmp_path / named[1]} ")
    with pytest.raises(InvalidFolder, match=f"^{sentence}.*keep one"):
        find_cases(tmp_path)
    # Cases outside the subset do no harm.
    (tmp_path / "split.json").write_text(json.dumps({"train": ["a"], "val": ["b"]}))
    assert [case.id for case in find_cases(tmp_path, subset="val")] == ["b"]


def test_files_that_share_a_stem_do_no_harm_without_a_label(tmp_path: Path) -> None:
    _folder(tmp_path, ["a.nii.gz", "a.nrrd", "b.nii.gz"], ["b.nii.gz", "c.mha", "c.nii"])
    assert [case.id for case in find_cases(tmp_path)] == ["b"]


def test_label_names_come_from_a_decathlon_file(tmp_path: Path) -> None:
    assert label_names(tmp_path) is None
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "liver", "2": "tumour"}}))
    assert label_names(tmp_path) == ["liver", "tumour"]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "2": "tumour"}}))
    with pytest.raises(InvalidFolder, match="without gaps"):
        label_names(tmp_path)
    for names, words in ((["liver", "liver"], "'liver' twice"), (["liver", " "], "label 2 has no name")):
        listed = {"0": "background", **{str(value): name for value, name in enumerate(names, start=1)}}
        (tmp_path / "dataset.json").write_text(json.dumps({"labels": listed}))
        with pytest.raises(InvalidFolder, match=f"dataset.json: .*{words}"):
            label_names(tmp_path)


def test_label_names_of_an_option_must_differ() -> None:
    assert split_label_names(" left kidney , tumour (3)") == ("left kidney", "tumour (3)")
    assert len(split_label_names(",".join(map(str, range(254))))) == 254
    for text, words in (("a,b,a", "'a' twice"), ("a,,b", "without gaps"), (",".join(map(str, range(255))), "254")):
        with pytest.raises(ValueError, match=words):
            split_label_names(text)
