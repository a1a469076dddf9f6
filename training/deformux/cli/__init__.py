"""The ``deformux`` command line."""
