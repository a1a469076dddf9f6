"""Requests from clients: parsed, checked and typed."""
