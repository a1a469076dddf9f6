"""``python -m deformux_label.cli``: the ``deformux-label`` command."""

from deformux_label.cli.main import app

app()
