"""Scores of submitted labels."""
