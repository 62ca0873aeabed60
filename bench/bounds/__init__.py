"""Benchmarks of the structured layers."""
