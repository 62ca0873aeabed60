"""Proximal operators and projections. The functions are in :mod:`fusee`, the optimisers in
:mod:`fusee.optim`."""
