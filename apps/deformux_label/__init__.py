"""The MONAI Label app: automatic segmentation in 3D Slicer that learns from submitted corrections."""

# Before any module of this package imports MONAI Label, and with it MONAI: it silences what these deprecate.
import deformux  # noqa: F401
