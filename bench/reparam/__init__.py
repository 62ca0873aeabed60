"""Benchmarks of the reparam room."""
