"""Recovering accuracy after a cut."""
