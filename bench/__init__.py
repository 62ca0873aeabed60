"""Microbenchmarks of fusee: `pytest bench` or `make bench`. To add one: bench/harness.py."""
