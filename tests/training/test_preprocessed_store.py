"""Training from files of preprocessed volumes: the same patches, and no trust in what is on the disk."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from deformux.data import preprocessed_store
from deformux.data.preprocessed_store import PreprocessedStore, store_key
from deformux.data.preprocessing import Preprocessing
from deformux.fitting import stored_volumes
from deformux.fitting.patches import Patches
from deformux.fitting.recipe import RECIPES, Recipe

PREP = Preprocessing("ct", patch_size=(32, 32, 16))
RECIPE = RECIPES["finetune"].replace(steps=6, batch_size=4, patches_per_volume=2)


def drawn(cases, *, store: Path | None, cache_gb: float = 0.0, prep: Preprocessing = PREP, **options) -> list:
    recipe = RECIPE.replace(cache_gb=cache_gb, **options)
    patches = Patches(cases, new=(), recipe=recipe, prep=prep, labels=("ball", "box"), workers=0, store=store)
    return list(patches.loader(first_step=0, steps=RECIPE.steps, seed=5))


def same(ours: list, theirs: list) -> bool:
    return all(torch.equal(a[key], b[key]) for a, b in zip(ours, theirs, strict=True) for key in b)


def volumes(store: Path) -> list[Path]:
    return sorted(path for plan in store.iterdir() for path in plan.iterdir())


@pytest.fixture
def cases(write_case) -> list:
    # One is smaller than a patch, so that it is padded.
    return [write_case("a", seed=1, size=(40, 36, 24)), write_case("b", seed=2, size=(20, 24, 12))]


def test_patches_from_files_are_those_from_memory_bit_for_bit(cases: list, tmp_path: Path) -> None:
    store = tmp_path / "preprocessed"
    in_memory = drawn(cases, store=None, cache_gb=1.0)
    assert same(drawn(cases, store=store), in_memory), "while the files are made"
    assert len(volumes(store)) == 2
    made = {path: path.stat().st_mtime_ns for path in store.rglob("*.npy")}
    assert same(drawn(cases, store=store), in_memory), "from the files"
    keeping = dataclasses.replace(PREP, keep_largest=True)
    assert same(drawn(cases, store=store, prep=keeping), in_memory), "what is kept of a result changes no input"
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*.npy")} == made
    assert not drawn(cases, store=tmp_path / "unused", cache_gb=1.0)[0]["image"].isnan().any()
    assert not (tmp_path / "unused").exists(), "volumes in memory need no files"


def test_files_are_made_again_when_they_are_damaged_or_old(cases: list, tmp_path: Path) -> None:
    store = tmp_path / "preprocessed"
    expected = drawn(cases, store=store)
    first, second = volumes(store)
    image = first / "image.npy"
    image.write_bytes(image.read_bytes()[:-100])
    label = second / "label.npy"
    damaged = bytearray(label.read_bytes())
    damaged[-1] ^= 1
    label.write_bytes(damaged)
    assert same(drawn(cases, store=store), expected)
    assert np.load(image, allow_pickle=False).nbytes > 0
    (first / "facts.json").write_text("[]")
    (second / "facts.json").unlink()
    assert same(drawn(cases, store=store), expected)

    # A scan that was replaced is another one.
    before = store_key(cases[0].image, cases[0].label)
    os.utime(cases[0].image, ns=(1, 1))
    assert store_key(cases[0].image, cases[0].label) != before
    # Another plan deletes the volumes of the first.
    drawn(cases, store=store, prep=Preprocessing("ct", patch_size=(16, 16, 16)))
    assert len(list(store.iterdir())) == 1
    assert not first.exists()


def test_the_disk_is_bounded_and_may_be_full(
    cases: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = drawn(cases, store=None)
    assert same(drawn(cases, store=tmp_path / "small", disk_gb=0.0), expected)
    assert not list((tmp_path / "small").rglob("*.npy"))
    assert "more than 0 GB" in caplog.text

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(preprocessed_store.np, "save", full)
    caplog.clear()
    assert same(drawn(cases, store=tmp_path / "full"), expected)
    assert caplog.text.count("No space left on device") == 1
    assert not list((tmp_path / "full").rglob(".writing-*"))


def test_large_volumes_keep_a_sample_of_centres(cases: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_volumes, "_ALL_CENTRES", 1000)
    monkeypatch.setattr(stored_volumes, "_SAMPLE", 50)
    found = drawn(cases, store=tmp_path / "preprocessed")
    assert all(len(np.load(file)) <= 50 for file in (tmp_path / "preprocessed").rglob("*_indices.npy"))
    assert same(drawn(cases, store=tmp_path / "preprocessed"), found)
    assert any((batch["label"] > 0).any() for batch in found)


def test_only_what_is_touched_is_read(tmp_path: Path) -> None:
    store = PreprocessedStore(tmp_path, {"a": 1}, most_bytes=10**9)
    assert store.put("x", {"image": np.arange(1000, dtype=np.float32)})
    arrays = store.get("x")
    assert arrays is not None
    assert isinstance(arrays["image"], np.memmap)
    arrays["image"][0] = 5  # a private copy of that page
    assert np.load(store.folder / "x" / "image.npy")[0] == 0
    assert store.get("y") is None


def test_the_bound_does_not_change_what_identifies_a_training() -> None:
    assert "disk_gb" not in Recipe().to_dict()
    assert Recipe.from_dict(Recipe(disk_gb=5.0).to_dict()).disk_gb == 5
