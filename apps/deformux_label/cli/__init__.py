"""The ``deformux-label`` command line."""
