"""Choosing the next volume to label."""
