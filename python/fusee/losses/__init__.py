"""Losses. The functions are at the top of the package: ``fusee.stablemax_cross_entropy``."""
