"""How far results may be from the oracle, per dtype: one table, the forward apart from each gradient.

Errors are relative to the largest magnitude of the expected tensor. The oracle runs in float64 on the same rounded
inputs, so that the numbers bound the arithmetic and the final rounding. The offset's gradient differences neighbouring
samples and sums them over channels; the weight's and bias's sum over all voxels.
"""

import torch
from torch import Tensor

TOLERANCES: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {"output": 1e-13, "input": 1e-13, "offset": 1e-13, "weight": 1e-13, "bias": 1e-13, "mask": 1e-13},
    torch.float32: {"output": 2e-6, "input": 2e-6, "offset": 5e-6, "weight": 5e-6, "bias": 5e-6, "mask": 5e-6},
    torch.bfloat16: {"output": 8e-3, "input": 8e-3, "offset": 8e-3, "weight": 8e-3, "bias": 8e-3, "mask": 8e-3},
    torch.float16: {"output": 1e-3, "input": 1e-3, "offset": 1e-3, "weight": 1e-3, "bias": 1e-3, "mask": 1e-3},
}


def assert_near(actual: Tensor, expected: Tensor, what: str = "output") -> None:
    """Compare `actual`, in its own dtype, with a float64 oracle, on whichever device that was computed."""
    assert actual.shape == expected.shape
    if not expected.numel():
        return
    error = (actual.to(expected) - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    allowed = TOLERANCES[actual.dtype][what]
    assert error <= allowed, f"{what}: relative error {error:.1e}, allowed {allowed:.1e} for {actual.dtype}"
