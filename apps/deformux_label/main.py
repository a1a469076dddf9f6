"""The file that MONAI Label loads by path: it only imports the app, so that no module has two identities."""

from deformux_label.app import DeformUXLabel as DeformUXLabel
