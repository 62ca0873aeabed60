"""Entropic transport by Sinkhorn's iteration and Newton's method on all potentials at once.

The last two Newton steps are taken with gradients: about a solution, each step doubles the order to
which its derivatives are right.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def costs_of(X_a: Tensor, X_b: Tensor, metric: str) -> Tensor:
    """The costs between points, with derivative zero where they coincide."""
    if metric == "dot":
        return -torch.einsum("...id,...jd->...ij", X_a, X_b)
    difference = X_a.unsqueeze(-2) - X_b.unsqueeze(-3)
    if metric == "cityblock":
        return difference.abs().sum(-1)
    squared = (difference * difference).sum(-1)
    if metric == "sqeuclidean":
        return squared
    apart = squared > 0
    return torch.where(apart, torch.where(apart, squared, 1.0).sqrt(), 0.0)


def weights_of(unbalanced: Any) -> tuple[float, float]:
    if unbalanced is None:
        return math.inf, math.inf
    return unbalanced if isinstance(unbalanced, tuple) else (unbalanced, unbalanced)


def normalised(masses: Tensor | None, count: int, like: Tensor) -> Tensor:
    """Masses of sum one, in the dtype of ``like``."""
    if masses is None:
        return torch.full((count,), 1 / max(count, 1), dtype=like.dtype, device=like.device)
    masses = masses.to(like.dtype)
    return masses / masses.sum(-1, keepdim=True)


def _factor(z: Tensor, weight: float) -> Tensor:
    return torch.ones_like(z) if weight == math.inf else (-z / weight).exp()


def _finite(z: Tensor) -> Tensor:
    return torch.where(z.isfinite(), z, 0.0)


def sinkhorn(
    M: Tensor, a: Tensor, b: Tensor, reg: Any, weights: tuple[float, float], iterations: int
) -> Pair:
    """Sinkhorn's iteration in the log domain."""
    eps = torch.as_tensor(reg, dtype=M.dtype, device=M.device)[..., None]
    log_a, log_b = a.log(), b.log()
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    if M.numel() == 0:
        return f + M.sum(-1) + a, g + M.sum(-2) + b
    for _ in range(iterations):
        rows = ((g.unsqueeze(-2) - M) / eps[..., None] + log_b.unsqueeze(-2)).logsumexp(-1)
        f = _finite(-eps * rows / (1 + eps / weights[0]))
        columns = ((f.unsqueeze(-1) - M) / eps[..., None] + log_a.unsqueeze(-1)).logsumexp(-2)
        g = _finite(-eps * columns / (1 + eps / weights[1]))
    return f, g


def _newton_step(
    M: Tensor, a: Tensor, b: Tensor, reg: Any, weights: tuple[float, float], f: Tensor, g: Tensor
) -> Pair:
    eps = torch.as_tensor(reg, dtype=M.dtype, device=M.device)[..., None]
    e = _exponent(M, reg, f, g).exp()
    in_row, in_column = b.unsqueeze(-2) * e, a.unsqueeze(-1) * e
    factors = _factor(f, weights[0]), _factor(g, weights[1])
    sums = in_row.sum(-1), in_column.sum(-2)
    # Points without partners keep a potential of zero.
    alone = [torch.where(s == 0, 1.0, 0.0) for s in sums]
    diagonals = [
        s + none + eps / weight * factor * (1 - none)
        for s, weight, factor, none in zip(sums, weights, factors, alone, strict=True)
    ]
    residual = torch.cat([(factors[i] - sums[i]) * (1 - alone[i]) for i in (0, 1)], -1)
    upper = torch.cat([torch.diag_embed(diagonals[0]), in_row], -1)
    lower = torch.cat([in_column.transpose(-2, -1), torch.diag_embed(diagonals[1])], -1)
    jacobian = torch.cat([upper, lower], -2)
    if weights == (math.inf, math.inf):
        # A constant may go from f to g, so that their means are equal.
        means = torch.cat([a.expand_as(f), -b.expand_as(g)], -1)
        sides = torch.cat([torch.ones_like(f), -torch.ones_like(g)], -1)
        jacobian = jacobian + sides.unsqueeze(-1) * means.unsqueeze(-2)
        gap = (means * torch.cat([f, g], -1)).sum(-1, keepdim=True)
        residual = residual - sides * gap / eps
    step = eps * torch.linalg.solve(jacobian, residual.unsqueeze(-1)).squeeze(-1)
    return f + step[..., : f.shape[-1]], g + step[..., f.shape[-1] :]


def potentials_oracle(
    M: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    reg: Any,
    unbalanced: Any = None,
    iterations: int = 100,
    **options: Any,
) -> Pair:
    """f and g for masses that are normalised here."""
    a, b = normalised(a, M.shape[-2], M), normalised(b, M.shape[-1], M)
    a, b = a.expand(M.shape[:-1]), b.expand(*M.shape[:-2], M.shape[-1])
    weights = weights_of(unbalanced)
    fixed = (M.detach(), a.detach(), b.detach(), reg, weights)
    f, g = sinkhorn(*fixed, iterations)
    for _ in range(8):
        f, g = _newton_step(*fixed, f, g)
    f, g = f.detach(), g.detach()
    for _ in range(2):
        f, g = _newton_step(M, a, b, reg, weights, f, g)
    return f, g


def _exponent(M: Tensor, reg: Any, f: Tensor, g: Tensor) -> Tensor:
    eps = torch.as_tensor(reg, dtype=M.dtype, device=M.device)[..., None, None]
    return (f.unsqueeze(-1) - M + g.unsqueeze(-2)) / eps


def plan_of(M: Tensor, a: Tensor, b: Tensor, reg: Any, f: Tensor, g: Tensor) -> Tensor:
    return a.unsqueeze(-1) * b.unsqueeze(-2) * _exponent(M, reg, f, g).exp()


def value_of(
    M: Tensor, a: Tensor, b: Tensor, reg: Any, unbalanced: Any, f: Tensor, g: Tensor
) -> Tensor:
    """What is minimised, term by term, of the plan of these potentials."""
    eps = torch.as_tensor(reg, dtype=M.dtype, device=M.device)
    z = _exponent(M, reg, f, g)
    plan = plan_of(M, a, b, reg, f, g)
    value = (plan * torch.where(M.isfinite(), M + eps[..., None, None] * (z - 1), 0.0)).sum(
        (-2, -1)
    )
    value = value + eps * a.sum(-1) * b.sum(-1)
    of_mass = (b.unsqueeze(-2) * z.exp()).sum(-1), (a.unsqueeze(-1) * z.exp()).sum(-2)
    for weight, ratio, masses in zip(weights_of(unbalanced), of_mass, (a, b), strict=True):
        if weight != math.inf:
            value = value + weight * (masses * (ratio.xlogy(ratio) - ratio + 1)).sum(-1)
    return value


def plan_oracle(
    M: Tensor, a: Tensor | None = None, b: Tensor | None = None, *, reg: Any, **options: Any
) -> Tensor:
    f, g = potentials_oracle(M, a, b, reg=reg, **options)
    a, b = normalised(a, M.shape[-2], M), normalised(b, M.shape[-1], M)
    return plan_of(M, a, b, reg, f, g)


def value_oracle(
    M: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    reg: Any,
    unbalanced: Any = None,
    **options: Any,
) -> Tensor:
    f, g = potentials_oracle(M, a, b, reg=reg, unbalanced=unbalanced, **options)
    a, b = normalised(a, M.shape[-2], M), normalised(b, M.shape[-1], M)
    return value_of(M, a, b, reg, unbalanced, f, g)
