"""Interval bounds: boxes through networks, certified training, and how tight the bounds are."""
