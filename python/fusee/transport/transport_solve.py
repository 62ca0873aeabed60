"""The linear system behind implicit derivatives of entropic transport."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fusee._op import Op
from fusee.transport.batches import sharding_of_problems, vmap_of_problems
from fusee.transport.plans import costs, exponentials, factor


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


def _solve_fake(
    x: Tensor, y: Tensor | None, metric: int, a: Tensor, b: Tensor, *others: Tensor
) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape), b.new_empty(b.shape)


def _no_derivative(*args: Any) -> Any:
    raise NotImplementedError(
        "sinkhorn_newton: potentials and plans have first derivatives, the value has first ones and, "
        "through reverse mode, second ones; this asks for one more"
    )


transport_solve = Op(
    "transport_solve",
    fake=_solve_fake,
    reference=solve_reference,
    vmap=vmap_of_problems("transport_solve"),
    sharding=sharding_of_problems(2),
    differentiable=((0, 1, 3, 4, 7, 8, 9, 10), (0, 1)),
    saved=(),
    backward=_no_derivative,
    jvp=_no_derivative,
)
