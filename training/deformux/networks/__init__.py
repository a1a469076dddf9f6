"""DeformUX-Net, its fast layers, and the files that models are stored in."""
