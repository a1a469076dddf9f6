"""Volumes and labels on disk."""
