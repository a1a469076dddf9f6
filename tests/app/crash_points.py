"""Kill a process at each of its writing calls in turn, and check what is left.

``python crash_points.py FOLDER`` prints a list of cases as JSON. Forked, since importing torch and MONAI Label for each
crash would take minutes; with one thread, which can be forked.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["MONAI_LABEL_DATASTORE_AUTO_RELOAD"] = "false"

import nibabel as nib
import numpy as np
from live import LABELS, write_volume

from deformux_label.lib.store.datastore import CheckedDatastore
from deformux_label.lib.store.leases import Leases
from deformux_label.lib.trainers.queue import TrainingQueue

_CALLS = ((os, "replace"), (os, "fsync"), (os, "unlink"), (shutil, "copyfile"), (Path, "write_text"))


def main(folder: Path) -> None:
    cases = []
    for name, act in ACTIONS.items():
        last = 0
        while last < 200:
            last += 1
            studies = prepared(folder / f"{name}-{last}")
            finished = in_a_process_that_dies(last, functools.partial(act, studies))
            cases.append({"action": name, "call": last, "finished": finished, **left(studies)})
            if finished:
                break
    print(json.dumps(cases))


def prepared(root: Path) -> Path:
    """Make a scan with an acknowledged label, and a second scan without one."""
    studies = root / "studies"
    for number, scan in enumerate(("scan", "other")):
        write_volume(studies / f"{scan}.nii.gz", root / f"{scan}_label.nii.gz", spacing=(8, 8, 8), seed=number)
    open_store(studies).save_label("scan", str(root / "scan_label.nii.gz"), "final", {"client_id": "first"})
    newer = nib.load(root / "scan_label.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros(newer.shape, np.uint8), newer.affine), root / "empty.nii.gz")
    return studies


def open_store(studies: Path) -> CheckedDatastore:
    return CheckedDatastore(str(studies), labels=LABELS)


def save(studies: Path) -> None:
    open_store(studies).save_label("scan", str(studies.parent / "empty.nii.gz"), "final", {"client_id": "second"})


def save_another(studies: Path) -> None:
    label = str(studies.parent / "other_label.nii.gz")
    open_store(studies).save_label("other", label, "final", {"client_id": "second"})


def delete(studies: Path) -> None:
    open_store(studies).remove_label("scan", "final")


def rebuild(studies: Path) -> None:
    (studies / "datastore_v2.json").write_bytes(b"{")
    open_store(studies)


def lease_and_queue(studies: Path) -> None:
    Leases(studies.parent / "leases.json").claim("somebody", ["scan"])
    TrainingQueue(studies.parent / "state").add({"model": "segmentation"})


ACTIONS: dict[str, Callable[[Path], None]] = {
    "save": save,
    "save_another": save_another,
    "delete": delete,
    "rebuild": rebuild,
    "lease_and_queue": lease_and_queue,
}


def in_a_process_that_dies(last: int, act: Callable[[], None]) -> bool:
    """Return whether the action finished, and so was acknowledged, before its ``last`` call."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        left_to_do = last

        def deadly(call: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*arguments: Any, **options: Any) -> Any:
                nonlocal left_to_do
                left_to_do -= 1
                if left_to_do == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments, **options)

            return counted

        for owner, name in _CALLS:
            setattr(owner, name, deadly(getattr(owner, name)))
        try:
            act()
        except BaseException:
            os._exit(3)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), f"the action failed by itself: {status}"
    return status == 0


def left(studies: Path) -> dict[str, Any]:
    """Return what the next server finds, after its own recovery."""
    store = open_store(studies)
    entries = {}
    for scan in ("scan", "other"):
        label = store.get_label_uri(scan, "final")
        entries[scan] = {
            "revisions": [
                {
                    "annotator": revision.annotator,
                    "voxels": voxels(None if revision.deleted else store.revisions.file(revision)),
                }
                for revision in store.revisions.history(scan, "final")
            ],
            "current": voxels(Path(label) if label else None),
            "info": store.get_label_info(scan, "final") if label else None,
        }
    index = json.loads((studies / "datastore_v2.json").read_text())
    save_another(studies)
    return {
        "entries": entries,
        "indexed": {name: sorted(entry["labels"]) for name, entry in index["objects"].items()},
        "files": sorted(path.name for path in (studies / "labels" / "final").iterdir()),
        "leases": sorted(Leases(studies.parent / "leases.json").active()),
        "tasks": len(TrainingQueue(studies.parent / "state").tasks()),
    }


def voxels(label: Path | None) -> int | None:
    return None if label is None else int((np.asarray(nib.load(label).dataobj) > 0).sum())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
