"""Reparameterisations of weights. The functions are in :mod:`fusee`, the modules in :mod:`fusee.nn`."""
