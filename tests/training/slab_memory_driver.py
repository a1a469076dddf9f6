"""A scan of many classes, segmented and opened for clicks in a process of its own, which prints its peak memory."""

import json
import resource
import sys

import numpy as np
import torch
from monai.data import MetaTensor

from deformux.active_learning.uncertainty_map import UncertaintySlabs
from deformux.inference.slabs import Windows, logit_slabs
from deformux.interactive import kept_logits
from deformux.interactive.open_scan import scan_from_slabs

CLASSES, SIZE = 43, (132, 132, 192)


def network(x: torch.Tensor) -> torch.Tensor:
    """Return logits that differ from class to class."""
    return x * torch.linspace(-5, 5, CLASSES)[:, None, None, None]


def peak() -> int:
    """Return the most bytes this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Print bytes before and at the peak, and those of all logits in float32."""
    # What the first call of everything loads is not the scan's.
    kept_logits._ALL_BYTES = 100 * 2**20
    run((40, 40, 40))
    before = peak()
    run(SIZE)
    print(json.dumps({"grown": peak() - before, "all_logits": 4 * CLASSES * int(np.prod(SIZE))}))


def run(size: tuple[int, int, int]) -> None:
    """Segment a scan."""
    image = MetaTensor(torch.rand(1, *size) - 0.5, affine=np.eye(4))
    image.meta |= {"original_affine": np.diag([0.9, 0.9, 0.9, 1.0]), "spatial_shape": np.array(size)}
    windows = Windows(size, (32, 32, 32))
    unsure = UncertaintySlabs(image)
    scan = scan_from_slabs(image, logit_slabs(image, network, windows), takers=[unsure])
    assert len(np.unique(scan.labels)) > 1
    unsure.found()


if __name__ == "__main__":
    main()
