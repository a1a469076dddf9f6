"""The public name of the web server: ``--uvicorn_app deformux_label.server:app``."""

from deformux_label.web.asgi import app as app
