"""Microbenchmarks of fusee: `pytest bench`, or `make bench`. See bench/harness.py for how to add a case."""
