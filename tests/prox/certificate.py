"""The Fenchel-Young certificate of optimality, in extended precision.

With g the gradient of the quadratic term that the penalty has to balance, S(x) + S*(g) - <x, g> is never
negative, and zero for the solution alone. No solver is needed, and S and S* are sorted sums.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

Exact = np.longdouble


def exact(values: Any) -> Any:
    if isinstance(values, Tensor):
        values = values.detach().double().numpy()
    return np.asarray(values, dtype=Exact)


def envelope(z: Any, k: float) -> Any:
    """S_k by the index rule: the only number of groups that are free for which the knee lies between."""
    z = np.sort(z)[::-1]
    if np.count_nonzero(z) <= k:
        return (z * z).sum() / 2
    tails = np.cumsum(z[::-1])[::-1]
    for free in range(int(np.ceil(k))):
        knee = tails[free] / (Exact(k) - free)
        if (free == 0 or z[free - 1] >= knee) and z[free] < knee:
            break
    # Where rounding hid it, two neighbours give the same value.
    return ((z[:free] ** 2).sum() + tails[free] ** 2 / (Exact(k) - free)) / 2


def conjugate(y: Any, k: float) -> Any:
    """Half the squares of the k largest; of a real k the next one in part."""
    squares = np.sort(y * y)[::-1]
    whole = int(k)
    value = squares[:whole].sum()
    if whole < len(squares):
        value += (Exact(k) - whole) * squares[whole]
    return value / 2


def gap(
    v: Tensor,
    x: Tensor,
    k: float,
    lam: float,
    weights: Tensor | None = None,
    metric: Tensor | None = None,
    debiased: bool = False,
) -> tuple[float, float]:
    """The gap of (groups, elements), and the size of what it is the difference of."""
    v, x = exact(v), exact(x)
    d = np.ones(len(v), Exact) if weights is None else exact(weights)
    H = np.ones_like(v) if metric is None else exact(metric).reshape(len(v), -1)
    h = H - Exact(lam) * d[:, None] if debiased else H
    g = (H * v - h * x) / Exact(lam)
    value = envelope(np.sqrt(d * (x * x).sum(1)), k)
    dual = conjugate(np.sqrt((g * g).sum(1) / d), k)
    return float(value + dual - (x * g).sum()), float(value + dual)


def values(kind: str, generator: torch.Generator, *shape: int) -> Tensor:
    """Elements at random, of several kinds."""
    drawn = torch.randn(shape, dtype=torch.float64, generator=generator)
    if kind == "ties":
        return drawn.round()
    if kind == "equal":
        return torch.ones_like(drawn)
    if kind == "zeros":
        keep = torch.rand((shape[0], 1), generator=generator) < 0.5
        return drawn * keep
    if kind == "binades":
        return drawn * torch.rand((shape[0], 1), generator=generator).double().mul(-60).exp2()
    if kind == "two scales":
        return drawn * torch.where(torch.rand((shape[0], 1), generator=generator) < 0.5, 1.0, 1e-4)
    return drawn


KINDS = ("normal", "ties", "equal", "zeros", "binades", "two scales")
