"""Benchmarks of the prox room."""
