"""Inference on whole volumes, and scores of the result."""
