"""The app's parts; MONAI Label imports this folder as ``lib``, an installed wheel as ``deformux_label.lib``."""
