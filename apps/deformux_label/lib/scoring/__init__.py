"""Scores of labels and of volumes."""
