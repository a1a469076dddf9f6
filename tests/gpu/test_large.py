"""More than 2**31 elements in one tensor, checked in small boxes against the oracle."""

import pytest
import torch
from gpu_layers import off_the_kinks
from torch import Tensor

from deform3d import deform_conv3d
from tolerances import assert_near

# Offsets stay within 2 voxels: with the tap and the far corner of a cell, nothing beyond 4 voxels matters.
SPREAD, REACH = 2.0, 4
LAST = torch.channels_last_3d
MANY_CHANNELS = {"channels": 1040, "size": (128, 127, 128)}  # the input has more than 2**31 elements
FEW_CHANNELS = {"channels": 8, "size": (297, 299, 301)}  # the offsets have


def box_around(centre: tuple[int, ...], size: tuple[int, ...], margin: int) -> tuple[slice, ...]:
    return tuple(slice(max(c - margin, 0), min(c + margin + 1, n)) for c, n in zip(centre, size, strict=True))


def within(inner: tuple[slice, ...], outer: tuple[slice, ...]) -> tuple[slice, ...]:
    return tuple(slice(i.start - o.start, i.stop - o.start) for i, o in zip(inner, outer, strict=True))


@pytest.mark.parametrize("layer", [MANY_CHANNELS, FEW_CHANNELS], ids=["input", "offsets"])
@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format], ids=["channels-last", "contiguous"])
def test_forward_and_backward(device, layer, layout):
    channels, size = layer["channels"], layer["size"]
    voxels = size[0] * size[1] * size[2]
    assert max(channels, 81) * voxels > 2**31
    # Input, output and their gradients, one of them temporarily in float32, and copies in the other layout.
    needed = 2 * voxels * (10 * channels + 6 * 81)
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0]
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory, {free / 2**30:.0f} GiB are free")

    torch.manual_seed(0)
    x = torch.empty(1, channels, *size, dtype=torch.bfloat16, device=device, memory_format=layout).normal_()
    offset = torch.empty(1, 81, *size, dtype=torch.bfloat16, device=device, memory_format=layout)
    off_the_kinks(offset.uniform_(-SPREAD, SPREAD))
    weight = torch.randn(channels, 1, 3, 3, 3, device=device).bfloat16()
    # The first and the last voxels, some between, and those that hold element 2**31 of a channels-last tensor;
    # a contiguous tensor holds it in the last channels, and so in every box.
    middle = 2**31 // max(channels, 81)
    crossing = (middle // (size[1] * size[2]), middle // size[2] % size[1], middle % size[2])
    centres = [(0, 0, 0), tuple(n // 2 for n in size), crossing, tuple(n - 1 for n in size)]
    boxes = [box_around(centre, size, 1) for centre in centres]
    grad = torch.zeros_like(x)
    for box in boxes:
        part = grad[(..., *box)]
        part.copy_(torch.randn(part.shape, device=device))

    leaves = [t.requires_grad_() for t in (x, offset, weight)]
    output = deform_conv3d(*leaves, padding=1, backend="cuda")
    results = dict(zip(("input", "offset", "weight"), torch.autograd.grad(output, leaves, grad), strict=True))
    results["output"] = output.detach()

    total = torch.zeros(weight.shape, dtype=torch.float64)
    for centre, box in zip(centres, boxes, strict=True):
        around = box_around(centre, size, 1 + REACH)
        inner = (..., *within(box, around))

        def cut(tensor: Tensor, around: tuple[slice, ...] = around) -> Tensor:
            return tensor.detach()[(..., *around)].cpu().double()

        small = [cut(x).requires_grad_(), cut(offset).requires_grad_(), weight.detach().cpu().double().requires_grad_()]
        expected = deform_conv3d(*small, padding=1, backend="reference")
        assert_near(results["output"][(..., *box)], expected.detach()[inner])
        # Only the gradient of this box: no other box is within its reach.
        own = torch.zeros_like(expected)
        own[inner] = cut(grad)[inner]
        by_input, by_offset, by_weight = torch.autograd.grad(expected, small, own)
        assert_near(results["input"][(..., *box)], by_input[inner], "input")
        assert_near(results["offset"][(..., *box)], by_offset[inner], "offset")
        total += by_weight
    assert_near(results["weight"], total, "weight")
