"""Processes that work in the background and end with the server."""
