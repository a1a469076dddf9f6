"""Trainings: their queue, their process and their status."""
