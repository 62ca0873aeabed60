"""Optimal transport. The functions are in :mod:`fusee`."""
