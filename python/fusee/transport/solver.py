"""The operator of the solver, and the derivatives of what it returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusee._op import Op, push_forward
from fusee.transport.batches import sharding_of_problems, vmap_of_problems
from fusee.transport.plans import charge, costs, exponentials, factor
from fusee.transport.reference_solver import STAGE_COLUMNS, STAGES, solver_reference
from fusee.transport.transport_plan import transport_plan_gradient
from fusee.transport.transport_solve import transport_solve


def _solver_fake(
    x: Tensor, y: Tensor | None, metric: int, a: Tensor, b: Tensor, reg: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    n_iter = reg.new_empty(reg.shape, dtype=torch.int64)
    stages = reg.new_empty((*reg.shape, STAGES, len(STAGE_COLUMNS)))
    vectors = (reg.new_empty(reg.shape), a.new_empty(a.shape), b.new_empty(b.shape))
    return *vectors, reg.new_empty(reg.shape), n_iter, stages


def _balanced_mass(a: Tensor, penalty: Tensor) -> Tensor:
    """Twice the mass of problems whose potentials have a free constant, elsewhere infinity."""
    twice = 2 * a.sum(1, keepdim=True)
    free = penalty.isinf().all(1, keepdim=True) & (twice > 0)
    return torch.where(free, twice, torch.inf)


def _solver_backward(
    ctx: Any,
    args: Any,
    saved: Any,
    of_value: Tensor | None,
    of_f: Tensor | None,
    of_g: Tensor | None,
) -> Any:
    x, y, metric, a, b, reg, penalty, *_ = args
    f, g = saved
    problem, at = (x, y, metric, a, b, reg), (f, g)
    rho_a, rho_b, reg1 = penalty[:, :1], penalty[:, 1:], reg.unsqueeze(1)
    value = torch.zeros_like(reg1) if of_value is None else of_value.unsqueeze(1)
    # The value as the least over plans: its derivative in the masses for a fixed plan and potentials.
    factor_b = factor(g, rho_b)
    grad_a = value * (charge(f, rho_a) - reg1 * (factor(f, rho_a) - b.sum(1, keepdim=True)))
    grad_b = value * (charge(g, rho_b) - reg1 * (factor_b - a.sum(1, keepdim=True)))
    left, right = value.expand(f.shape), torch.zeros_like(g)
    implicit = of_f is not None or of_g is not None
    if implicit:
        of_f = torch.zeros_like(f) if of_f is None else of_f
        of_g = torch.zeros_like(g) if of_g is None else of_g
        u, v = transport_solve(*problem, penalty, *at, of_f, of_g)
        # NaN of a point without mass, which asks for what it has not, is NaN for all, and not lost.
        spread = 0 * (u.sum(1, keepdim=True) + v.sum(1, keepdim=True))
        left, right = left + (u + spread), v + spread
        # The constant between f and g is set by the masses.
        moved = (of_f.sum(1, keepdim=True) - of_g.sum(1, keepdim=True)) / _balanced_mass(a, penalty)
        grad_a, grad_b = grad_a - moved * f, grad_b + moved * g
    grad_x = grad_y = None
    if implicit or any(ctx.needs_input_grad[:2]):
        grad_x, grad_y, rows, columns = transport_plan_gradient(*problem, *at, left, right)
        if implicit:
            grad_a = grad_a - reg1 * rows
            grad_b = grad_b - reg1 * (columns - value * factor_b)
    grad_y = None if y is None else grad_y
    return grad_x, grad_y, None, grad_a, grad_b, None, None, None, None, None


def _solver_jvp(args: Any, saved: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
    x, y, metric, a, b, reg, penalty, *_ = args
    f, g = saved
    d_x, d_y, d_a, d_b = tangents
    rho_a, rho_b, reg1 = penalty[:, :1], penalty[:, 1:], reg.unsqueeze(1)
    d_a = torch.zeros_like(a) if d_a is None else d_a
    d_b = torch.zeros_like(b) if d_b is None else d_b
    points = [x] if y is None else [x, y]
    moves = [d_x] if y is None else [d_x, d_y]
    cost = costs(x, y, metric)

    def of_points(x: Tensor, y: Tensor | None = None) -> tuple[Tensor]:
        return (costs(x, y, metric),)

    (d_cost,) = push_forward(of_points, points, moves)
    # The equations of both sides' marginals, for a unit of mass, along the tangents.
    e = exponentials(cost, reg, f, g)
    rows = (e * (b.unsqueeze(1) * d_cost - reg.view(-1, 1, 1) * d_b.unsqueeze(1))).sum(2)
    columns = (e * (a.unsqueeze(2) * d_cost - reg.view(-1, 1, 1) * d_a.unsqueeze(2))).sum(1)
    d_f, d_g = transport_solve(x, y, metric, a, b, reg, penalty, f, g, a * rows, b * columns)
    factor_a, factor_b = factor(f, rho_a), factor(g, rho_b)
    # Points without mass ask for something too, and nobody for them.
    d_f = d_f + torch.where(a == 0, rows / ((1 + reg1 / rho_a) * factor_a), 0.0)
    d_g = d_g + torch.where(b == 0, columns / ((1 + reg1 / rho_b) * factor_b), 0.0)
    moved = (d_a * f).sum(1, keepdim=True) - (d_b * g).sum(1, keepdim=True)
    moved = moved / _balanced_mass(a, penalty)
    d_value = (a * (e * b.unsqueeze(1) * d_cost).sum(2)).sum(1)
    for d, potential, weight, mass in (
        (d_a, f, rho_a, b.sum(1, keepdim=True)),
        (d_b, g, rho_b, a.sum(1, keepdim=True)),
    ):
        envelope = charge(potential, weight) - reg1 * (factor(potential, weight) - mass)
        d_value = d_value + (d * envelope).sum(1)
    return d_value, d_f - moved, d_g + moved


solver = Op(
    "sinkhorn_newton",
    fake=_solver_fake,
    reference=solver_reference,
    vmap=vmap_of_problems("sinkhorn_newton"),
    sharding=sharding_of_problems(6),
    differentiable=((0, 1, 3, 4), (0, 1, 2)),
    saved=(1, 2),
    backward=_solver_backward,
    jvp=_solver_jvp,
)
