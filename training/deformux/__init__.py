"""DeformUX-Net for volumetric segmentation: network, preprocessing, training, scores; see the ``deformux`` command."""

import warnings

# What MONAI 1.5 itself does, and PyTorch or MONAI deprecates: the user can do nothing about it.
for _message in (
    "`torch.jit.interface` is deprecated",
    "Using a non-tuple sequence for multidimensional indexing",
    "monai.metrics.utils get_mask_edges:always_return_as_numpy",
):
    warnings.filterwarnings("ignore", message=_message)
