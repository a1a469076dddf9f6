"""Corrections by clicks, and simulated annotators."""
