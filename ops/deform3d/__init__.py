"""3D deformable convolution for PyTorch: the 3D sister of ``torchvision.ops.deform_conv2d``."""

from .functional import deform_conv3d, deform_conv3d_fused_offset
from .modules import DeformConv3d

__all__ = ["DeformConv3d", "deform_conv3d", "deform_conv3d_fused_offset"]
