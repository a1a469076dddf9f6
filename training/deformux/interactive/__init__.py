"""Corrections by clicks, and simulated annotators that make them."""
