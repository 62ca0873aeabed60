"""What the operators of transport have in common: costs, and the plan's exponentials.

A batch of problems has costs x (batch, n, m), or points x (batch, n, d) and y (batch, m, d) with one of
``METRICS``; masses a (batch, n) and b (batch, m); reg (batch). The potentials f and g give the plan
P = a b^T exp((f + g - C) / reg). All but x and y is float64, and so is all arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

METRICS = ("sqeuclidean", "euclidean", "cityblock", "dot")
"""In the order of the operators' numbers for them, from one; zero stands for given costs."""


def costs(x: Tensor, y: Tensor | None, metric: int) -> Tensor:
    """The costs (batch, n, m) in float64."""
    x = x.double()
    if y is None:
        return x
    y = y.double()
    if metric == 4:
        return -(x @ y.mT)
    difference = x.unsqueeze(2) - y.unsqueeze(1)
    if metric == 3:
        return difference.abs().sum(-1)
    squared = difference.square().sum(-1)
    return squared if metric == 1 else root(squared)


def root(squared: Tensor) -> Tensor:
    """The square root, with derivative zero at zero."""
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)


def unit_of_mass(a: Tensor, b: Tensor) -> Tensor:
    """What errors of marginals are measured in: the larger of the two masses, or one where there is
    none."""
    mass = torch.maximum(a.sum(-1), b.sum(-1))
    return torch.where(mass > 0, mass, 1.0)


def exponentials(cost: Tensor, reg: Tensor, f: Tensor, g: Tensor) -> Tensor:
    """exp((f + g - C) / reg). Between points without mass nothing bounds it, so it ends at exp(700)."""
    exponent = ((f.unsqueeze(-1) - cost) + g.unsqueeze(-2)) / reg.view(-1, 1, 1)
    return exponent.clamp(max=700.0).exp()


def charge(potential: Tensor, weight: Tensor) -> Tensor:
    """What the dual objective has of a potential for a unit of mass: itself where the marginal holds,
    otherwise weight (1 - exp(-potential / weight))."""
    holds = weight.isinf()
    safe = torch.where(holds, 1.0, weight)
    soft = -safe * torch.expm1(-torch.where(holds, 0.0, potential) / safe)
    return torch.where(holds, potential, soft)


def factor(potential: Tensor, weight: Tensor) -> Tensor:
    """What a potential makes of the marginal: one where that holds, otherwise
    exp(-potential / weight)."""
    holds = weight.isinf()
    safe = torch.where(holds, 1.0, weight)
    return torch.exp(-torch.where(holds, 0.0, potential) / safe)
