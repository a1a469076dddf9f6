"""``python -m deformux.cli``: the ``deformux`` command."""

from deformux.cli.main import app

app()
