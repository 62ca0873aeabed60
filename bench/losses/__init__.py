"""Benchmarks of the losses room."""
