"""``deformux predict`` on many scans: killed, resumed, shared between processes, with scans that cannot be used."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from typer.testing import CliRunner, Result

from deformux.cli.main import app
from deformux.cli.predict import scans_of
from deformux.cli.shards import Shard
from deformux.data.cases import result_names
from deformux.data.preprocessing import Preprocessing
from deformux.data.result_record import ResultRecord
from deformux.data.volume_reader import read_volume
from deformux.networks.deformux_net import DeformUXNet
from deformux.networks.model_file import ModelCard, save_model
from preloaded import PreloadedProcess, start_deformux

SMALL = (16, 16, 16)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models that differ in their weights."""
    folder = tmp_path_factory.mktemp("models")
    card = ModelCard(labels=("ball",), preprocessing=Preprocessing(modality="mr", patch_size=SMALL), preset="tiny")
    for name in ("a", "b"):
        save_model(folder / f"{name}.safetensors", DeformUXNet(1, 2, "tiny"), card)
    return [folder / "a.safetensors", folder / "b.safetensors"]


def write_scans(folder: Path, count: int, size: tuple[int, int, int] = SMALL) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"scan{number}.nii.gz" for number in range(count)]
    for number, path in enumerate(paths):
        values = np.random.default_rng(number).normal(100, 20, size).astype(np.float32)
        nib.save(nib.Nifti1Image(values, np.diag([1.0, 1.0, 2.0, 1.0])), path)
    return paths


def predict(*arguments: object) -> Result:
    command = ["predict", *map(str, arguments), "--device", "cpu"]
    return CliRunner().invoke(app, command, env={"COLUMNS": "300"})


def started(model: Path, scans: Path, output: Path, *options: object) -> PreloadedProcess:
    log = output.parent / f"{uuid.uuid4().hex}.log"
    return start_deformux("predict", model, scans, output, *options, "--device", "cpu", output=log)


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def changes(folder: Path) -> dict[str, int]:
    """Return when each result was written."""
    found = sorted(path for path in folder.glob("*.nii.gz") if not path.name.startswith("."))
    return {path.name: path.stat().st_mtime_ns for path in found}


def wait_for(condition: Callable[[], bool], process: PreloadedProcess) -> None:
    end = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, process.ended()
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_killed_run_leaves_whole_results_and_goes_on(models: list[Path], tmp_path: Path) -> None:
    scans = write_scans(tmp_path / "scans", 6, (48, 48, 32))
    output = tmp_path / "out"
    process = started(models[0], tmp_path / "scans", output)
    wait_for(lambda: len(changes(output)) >= 2, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = changes(output)
    assert 2 <= len(before) < len(scans)
    for name in before:
        assert voxels(output / name).shape == (48, 48, 32)

    done = predict(models[0], tmp_path / "scans", output)
    assert done.exit_code == 0, done.output
    assert f"{6 - len(before)} of 6 volumes written to {output}, {len(before)} were there already" in done.output
    after = changes(output)
    assert len(after) == 6
    assert before.items() <= after.items()
    whole = predict(models[0], tmp_path / "scans", tmp_path / "at once")
    assert whole.exit_code == 0, whole.output
    for name in after:
        np.testing.assert_array_equal(voxels(output / name), voxels(tmp_path / "at once" / name))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_ends_cleanly(models: list[Path], tmp_path: Path, number: signal.Signals, status: int) -> None:
    write_scans(tmp_path / "scans", 6, (48, 48, 32))
    output = tmp_path / "out"
    process = started(models[0], tmp_path / "scans", output)
    wait_for(lambda: bool(changes(output)), process)
    process.send_signal(number)
    printed = process.ended(timeout=60)
    assert process.returncode == status, printed
    assert "stopped" in printed
    assert "Traceback" not in printed
    assert 1 <= len(list(output.iterdir())) < 6  # no unfinished file either
    for name in changes(output):
        assert voxels(output / name).shape == (48, 48, 32)


def test_a_changed_scan_is_done_again(models: list[Path], tmp_path: Path) -> None:
    first, second, third = write_scans(tmp_path / "scans", 3)
    output = tmp_path / "out"
    assert predict(models[0], tmp_path / "scans", output).exit_code == 0
    before = changes(output)
    volume = nib.load(first)
    nib.save(nib.Nifti1Image(volume.get_fdata(dtype=np.float32) + 1, volume.affine), first)
    os.utime(second)  # another time, the same content
    third.unlink()
    done = predict(models[0], tmp_path / "scans", output)
    assert done.exit_code == 0, done.output
    assert "1 of 2 volumes written" in done.output
    after = changes(output)
    assert {name for name in before if before[name] != after[name]} == {"scan0.nii.gz"}
    # The same size, but another time: the content decides.
    data = bytearray(second.read_bytes())
    data[4] ^= 1  # gzip's time of compression
    second.write_bytes(data)
    assert "1 of 2 volumes written" in predict(models[0], tmp_path / "scans", output).output


def test_results_of_another_model_stay_unless_overwritten(models: list[Path], tmp_path: Path) -> None:
    write_scans(tmp_path / "scans", 3)
    output = tmp_path / "out"
    assert predict(models[0], tmp_path / "scans", output).exit_code == 0
    before = changes(output)
    done = predict(models[1], tmp_path / "scans", output)
    assert done.exit_code == 2
    assert f"{output} has 3 results that this model did not make (such as scan0.nii.gz)" in done.output
    assert "--overwrite" in done.output
    assert changes(output) == before
    done = predict(models[1], tmp_path / "scans", output, "--overwrite")
    assert done.exit_code == 0, done.output
    assert "3 of 3 volumes written" in done.output
    # So that a killed run goes on with the same command.
    assert "0 of 3 volumes written" in predict(models[1], tmp_path / "scans", output, "--overwrite").output


def test_a_corrected_result_is_not_replaced(models: list[Path], tmp_path: Path) -> None:
    write_scans(tmp_path / "scans", 2)
    output = tmp_path / "out"
    assert predict(models[0], tmp_path / "scans", output).exit_code == 0
    path = output / "scan1.nii.gz"
    image = sitk.ReadImage(str(path))  # as an editor reads and saves it
    image[3, 3, 3] = 1 - image[3, 3, 3]
    sitk.WriteImage(image, str(path))
    corrected = path.read_bytes()
    done = predict(models[0], tmp_path / "scans", output)
    assert done.exit_code == 2
    assert "has a result that this model did not make (such as scan1.nii.gz)" in done.output
    assert path.read_bytes() == corrected


def test_a_model_with_another_preprocessing_is_another_model(models: list[Path], tmp_path: Path) -> None:
    write_scans(tmp_path / "scans", 1)
    output = tmp_path / "out"
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(models[0].read_bytes())
    card = models[0].with_suffix(".json").read_text()
    copy.with_suffix(".json").write_text(card.replace('"notes": ""', '"notes": "renamed"'))
    assert predict(models[0], tmp_path / "scans", output).exit_code == 0
    assert "0 of 1 volumes written" in predict(copy, tmp_path / "scans", output).output
    copy.with_suffix(".json").write_text(card.replace('"modality": "mr"', '"modality": "ct"'))
    assert predict(copy, tmp_path / "scans", output).exit_code == 2


def test_bad_scans_do_not_end_the_run(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scans = write_scans(tmp_path / "scans", 5)
    scans[0].write_text("no image")
    nib.save(nib.Nifti1Image(np.ones(SMALL, np.float32), np.eye(4)), scans[1])
    from deformux.cli import predict as implementation

    real = implementation.segment_labels

    def fails(network: object, files: tuple[Path, ...], *others: object, **options: object) -> object:
        if files == (scans[2],):
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate\nmore")
        if files == (scans[3],):
            raise KeyError("spacing")
        return real(network, files, *others, **options)

    monkeypatch.setattr(implementation, "segment_labels", fails)
    done = predict(models[0], tmp_path / "scans", tmp_path / "out")
    assert done.exit_code == 1, done.output
    lines = [line for line in done.output.splitlines() if line.startswith("skipped:")]
    assert len(lines) == 4
    assert "scan0.nii.gz cannot be read" in lines[0]
    assert "scan1.nii.gz has the same intensity everywhere" in lines[1]
    assert "scan2.nii.gz needs more memory than there is" in lines[2]
    assert "scan3.nii.gz cannot be segmented (KeyError: 'spacing')" in lines[3]
    assert "1 of 5 volumes written" in done.output
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["scan4.nii.gz"]
    monkeypatch.undo()
    done = predict(models[0], tmp_path / "scans", tmp_path / "out")
    assert done.exit_code == 1
    assert "2 of 5 volumes written" in done.output
    assert "1 were there already" in done.output


def test_a_full_disk_ends_the_run(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every further scan would take its minutes and be lost as well."""
    write_scans(tmp_path / "scans", 2)
    from deformux.cli import predict as implementation

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(implementation, "write_recorded", full)
    done = predict(models[0], tmp_path / "scans", tmp_path / "out")
    assert done.exit_code == 2
    assert "No space left on device" in done.output


def test_shards_are_disjoint_and_complete() -> None:
    items = {f"scan{number:03}": number for number in range(101)}
    for count in (1, 2, 7, 101, 150):
        shards = [Shard(number, count).of(items) for number in range(1, count + 1)]
        assert sorted(name for shard in shards for name in shard) == sorted(items)
        assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_shards_run_at_once_into_one_folder(models: list[Path], tmp_path: Path) -> None:
    scans = write_scans(tmp_path / "scans", 7)
    scans[0].write_text("no image")
    output = tmp_path / "out"
    processes = [started(models[0], tmp_path / "scans", output, "--shard", f"{number}/2") for number in (1, 2)]
    printed = [process.ended(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [1, 0], printed
    assert "3 of 4 volumes written" in printed[0]
    assert len(list(output.iterdir())) == 6
    done = predict(models[0], tmp_path / "scans", output)
    assert "0 of 7 volumes written" in done.output
    assert "6 were there already" in done.output


def test_sequences_of_a_case_stay_together(tmp_path: Path) -> None:
    paths = [tmp_path / f"{case}_{sequence:04}.nii.gz" for case in "abc" for sequence in (0, 1)]
    for path in paths[:-1]:
        path.write_bytes(path.name.encode())
    results = dict(zip(result_names(paths[:-1]), paths[:-1], strict=True))
    scans = scans_of(results, ("_0000", "_0001"))
    assert scans == {"a": tuple(paths[:2]), "b": tuple(paths[2:4]), "c": tuple(paths[4:])}
    assert [sorted(Shard(number, 2).of(scans)) for number in (1, 2)] == [["a", "c"], ["b"]]
    record = ResultRecord.of("model", scans["c"])
    assert record.holds_for(scans["c"])
    paths[-1].write_bytes(b"the sequence that was missing")
    assert not record.holds_for(scans["c"])


@pytest.mark.parametrize("shard", ["0/3", "4/3", "3", "a/b", "1/0", "-1/3", "1/9999999"])
def test_a_wrong_shard_is_one_sentence(models: list[Path], tmp_path: Path, shard: str) -> None:
    done = predict(models[0], tmp_path, tmp_path / "out", "--shard", shard)
    assert done.exit_code == 2
    assert f"--shard takes i/n with i from 1 to n, such as 3/8; got '{shard}'" in done.output


def test_unfinished_files_of_killed_runs_are_removed(models: list[Path], tmp_path: Path) -> None:
    write_scans(tmp_path / "scans", 1)
    output = tmp_path / "out"
    output.mkdir()
    abandoned, running = output / ".writing-old.nii.gz", output / ".writing-new.nii.gz"
    for path in (abandoned, running):
        path.write_bytes(b"half")
    os.utime(abandoned, (time.time() - 7200,) * 2)
    assert predict(models[0], tmp_path / "scans", output).exit_code == 0
    assert not abandoned.exists()
    assert running.exists()


def test_other_programs_read_results(models: list[Path], tmp_path: Path) -> None:
    """The record in the header is no obstacle to them, nor to our own reader."""
    (scan,) = write_scans(tmp_path / "scans", 1)
    assert predict(models[0], scan, tmp_path / "out").exit_code == 0
    path = tmp_path / "out" / "scan0.nii.gz"
    expected = voxels(path)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(path))).T, expected)
    np.testing.assert_array_equal(read_volume(path).values, expected)
