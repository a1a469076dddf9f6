"""The MONAI Label app: automatic segmentation in 3D Slicer that learns from submitted corrections."""
