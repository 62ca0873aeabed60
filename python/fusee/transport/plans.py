"""Plans of entropic transport and what derivatives need of them, in plain torch operators.

A batch of problems has costs x (batch, n, m), or points x (batch, n, d) and y (batch, m, d) with one of
``METRICS``; masses a (batch, n) and b (batch, m); reg (batch). The potentials f and g give the plan
P = a b^T exp((f + g - C) / reg). All but x and y is float64, and so is all arithmetic.
"""

from __future__ import annotations

import math

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
    return squared if metric == 1 else _root(squared)


def _root(squared: Tensor) -> Tensor:
    """The square root, with derivative zero at zero."""
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)


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


def plan_reference(
    x: Tensor,
    y: Tensor | None,
    metric: int,
    a: Tensor,
    b: Tensor,
    reg: Tensor,
    f: Tensor,
    g: Tensor,
) -> Tensor:
    e = exponentials(costs(x, y, metric), reg, f, g)
    return (a.unsqueeze(2) * b.unsqueeze(1) * e).to(x.dtype).contiguous()


def gradient_reference(
    x: Tensor,
    y: Tensor | None,
    metric: int,
    a: Tensor,
    b: Tensor,
    reg: Tensor,
    f: Tensor,
    g: Tensor,
    left: Tensor,
    right: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    e = exponentials(costs(x, y, metric), reg, f, g)
    of_rows, of_columns = b.unsqueeze(1) * e, a.unsqueeze(2) * e
    row_sums = (of_rows * right.unsqueeze(1)).sum(2)
    column_sums = (of_columns * left.unsqueeze(2)).sum(1)
    weight = a.unsqueeze(2) * of_rows * (left.unsqueeze(2) + right.unsqueeze(1))
    if y is None:
        return weight.to(x.dtype).contiguous(), x.new_zeros(0), row_sums, column_sums
    from_, to = x.double(), y.double()
    if metric == 4:
        grad_x, grad_y = -(weight @ to), -(weight.mT @ from_)
    else:
        difference = from_.unsqueeze(2) - to.unsqueeze(1)
        if metric == 3:
            slope = difference.sign()
        elif metric == 2:
            distance = _root(difference.square().sum(-1, keepdim=True))
            slope = difference / torch.where(distance > 0, distance, 1.0)
        else:
            slope = 2 * difference
        pulls = weight.unsqueeze(-1) * slope
        grad_x, grad_y = pulls.sum(2), -pulls.sum(1)
    grad_x, grad_y = grad_x.to(x.dtype).contiguous(), grad_y.to(x.dtype).contiguous()
    return grad_x, grad_y, row_sums, column_sums


def solve_reference(
    x: Tensor,
    y: Tensor | None,
    metric: int,
    a: Tensor,
    b: Tensor,
    reg: Tensor,
    penalty: Tensor,
    f: Tensor,
    g: Tensor,
    p: Tensor,
    q: Tensor,
) -> tuple[Tensor, Tensor]:
    e = exponentials(costs(x, y, metric), reg, f, g)
    plan = a.unsqueeze(2) * b.unsqueeze(1) * e
    rows, columns = plan.sum(2), plan.sum(1)
    soft = (1 + reg.unsqueeze(1) / penalty).unsqueeze(-1)
    mass = rows.sum(1, keepdim=True)
    # Where both marginals hold, (1, -1) is in the null space.
    singular = penalty.isinf().all(1, keepdim=True) & (mass > 0)

    def half(difference: Tensor) -> Tensor:
        return torch.where(singular, difference / (2 * mass), 0.0)

    shift = half(p.sum(1, keepdim=True) - q.sum(1, keepdim=True))
    asked = torch.cat([p - shift * rows, q + shift * columns], 1)
    sums = torch.cat([rows, columns], 1)
    scale = torch.where(sums > 0, sums, math.inf).rsqrt()
    n = rows.shape[1]
    coupled = scale[:, :n].unsqueeze(2) * plan * scale[:, n:].unsqueeze(1)
    diagonal = torch.cat([soft[:, 0].expand_as(rows), soft[:, 1].expand_as(columns)], 1) * (
        sums > 0
    )
    upper = torch.cat([torch.diag_embed(diagonal[:, :n]), coupled], 2)
    lower = torch.cat([coupled.mT, torch.diag_embed(diagonal[:, n:])], 2)
    matrix = torch.cat([upper, lower], 1)
    bad = ~matrix.isfinite().all(2).all(1).view(-1, 1)
    inverse = torch.linalg.pinv(
        torch.where(bad.unsqueeze(2), 0.0, matrix), rtol=1e-13, hermitian=True
    )
    solution = scale * (inverse @ (scale * asked).unsqueeze(2)).squeeze(2)
    solution = torch.where(bad, math.nan, solution)
    u, v = solution[:, :n], solution[:, n:]
    # Points without mass follow the others.
    mean_v = (b.unsqueeze(1) * e * v.unsqueeze(1)).sum(2)
    mean_u = (a.unsqueeze(2) * e * u.unsqueeze(2)).sum(1)
    u = _of_massless(u, a, p, mean_v, soft[:, 0], factor(f, penalty[:, :1]))
    v = _of_massless(v, b, q, mean_u, soft[:, 1], factor(g, penalty[:, 1:]))
    moved = half((rows * u).nansum(1, keepdim=True) - (columns * v).nansum(1, keepdim=True))
    return (u - moved).contiguous(), (v + moved).contiguous()


def _of_massless(
    z: Tensor, masses: Tensor, asked: Tensor, mean: Tensor, soft: Tensor, factor: Tensor
) -> Tensor:
    followed = torch.where(asked == 0, -mean / (soft * factor), math.nan)
    return torch.where(masses == 0, followed, z)
