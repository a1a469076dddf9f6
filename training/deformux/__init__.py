"""DeformUX-Net for volumetric segmentation: network, preprocessing, training, scores; see the ``deformux`` command."""
