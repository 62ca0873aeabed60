"""Annealed Newton's method for entropic transport, dense and in plain torch operators."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusee.transport.plans import charge, costs, exponentials, factor

STAGES = 48
STAGE_COLUMNS = (
    "reg",
    "sinkhorn_iterations",
    "newton_steps",
    "cg_iterations",
    "kept_entries",
    "refused_steps",
    "error",
)


def solver_reference(
    x: Tensor,
    y: Tensor | None,
    metric: int,
    a: Tensor,
    b: Tensor,
    reg: Tensor,
    penalty: Tensor,
    g_init: Tensor | None,
    tol: float,
    max_iter: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    cost = costs(x, y, metric)
    if g_init is None:
        g_init = torch.zeros_like(b)
    batch = len(cost)
    f, g = a.new_full(a.shape, math.nan), b.new_full(b.shape, math.nan)
    n_iter = torch.zeros(batch, dtype=torch.int64, device=x.device)
    stages = a.new_zeros(batch, STAGES, len(STAGE_COLUMNS))
    for i in range(batch):
        problem = _Problem(cost[i], a[i], b[i], penalty[i], float(reg[i]))
        if cost[i].numel() == 0:
            f[i], g[i] = f[i].where(a[i] > 0, 0.0), g[i].where(b[i] > 0, 0.0)
        elif problem.has_solution():
            report = stages[i]
            g[i], n_iter[i] = problem.solve(g_init[i], tol, max_iter, report)
            f[i], g[i] = problem.potentials(g[i])
    plan = a.unsqueeze(2) * b.unsqueeze(1) * exponentials(cost, reg, f, g)
    rho_a, rho_b = penalty[:, :1], penalty[:, 1:]
    mass = plan.sum((1, 2)) - a.sum(1) * b.sum(1)
    value = (a * charge(f, rho_a)).sum(1) + (b * charge(g, rho_b)).sum(1) - reg * mass
    error = (plan.sum(2) - a * factor(f, rho_a)).abs().sum(1)
    error = error + (plan.sum(1) - b * factor(g, rho_b)).abs().sum(1)
    return value, f, g, error, n_iter, stages


class _Point:
    """Everything at one g: the rows' potentials follow from it, and the objective is concave in it."""

    def __init__(self, problem: _Problem, g: Tensor, reg: float) -> None:
        p = problem
        self.g = g
        exponent = (g - p.cost) / reg + p.b.log()
        f = -p.damping(0, reg) * reg * exponent.logsumexp(1)
        self.f = torch.where(f.isinf(), 0.0, f)
        row_mass = p.a * factor(self.f, p.penalty[0])
        self.plan = row_mass.unsqueeze(1) * exponent.softmax(1).nan_to_num(0.0)
        self.row_mass, self.column_mass = row_mass, self.plan.sum(0)
        self.target = p.b * factor(g, p.penalty[1])
        self.gradient = self.target - self.column_mass
        self.error = float(self.gradient.abs().sum())
        dual = (p.a * charge(self.f, p.penalty[0])).sum() + (p.b * charge(g, p.penalty[1])).sum()
        self.objective = float(dual - reg * row_mass.sum())


class _Problem:
    def __init__(self, cost: Tensor, a: Tensor, b: Tensor, penalty: Tensor, reg: float) -> None:
        self.cost, self.a, self.b, self.penalty, self.reg = cost, a, b, penalty, reg
        finite = cost[cost < math.inf]
        self.range = float(finite.max() - finite.min()) if finite.numel() else 0.0

    def damping(self, side: int, reg: float) -> float:
        return 1 / (1 + reg / float(self.penalty[side]))

    def has_solution(self) -> bool:
        """Whether all numbers are such and every point with mass can go to or come from another."""
        numbers = self.range < math.inf and (self.a.sum() + self.b.sum()).isfinite()
        finite = self.cost < math.inf
        rows = (finite & (self.b > 0)).any(1) | (self.a == 0)
        columns = (finite & (self.a > 0).unsqueeze(1)).any(0) | (self.b == 0)
        return bool(numbers and rows.all() and columns.all()) and 0 < self.reg < math.inf

    def solve(self, g: Tensor, tol: float, max_iter: int, report: Tensor) -> tuple[Tensor, int]:
        """Halves the regularisation from stage to stage; each begins where the last one ended."""
        mass = max(float(self.a.sum()), float(self.b.sum())) or 1.0
        ratio = self.range / 40 / self.reg
        stages = math.ceil(math.log2(ratio)) if ratio > 1 else 0
        if _Point(self, self.centred(g), self.reg).error <= 1e-2 * mass:
            stages = 0  # g is a good beginning as it is
        n_iter = 0
        for stage in range(min(stages, STAGES - 1), -1, -1):
            reg = self.reg * 2**stage
            goal = (tol if stage == 0 else 1e-2) * mass
            row = report[min(stages, STAGES - 1) - stage]
            g, n_iter = self.run_stage(self.centred(g), reg, goal, n_iter, max_iter, row)
        return g, n_iter

    def centred(self, g: Tensor) -> Tensor:
        """Without the constant, which means nothing, but digits, where both marginals hold."""
        mass = self.b.sum()
        if bool(self.penalty.isinf().all()) and float(mass) > 0:
            return g - (self.b * g).sum() / mass
        return g

    def run_stage(
        self, g: Tensor, reg: float, goal: float, n_iter: int, max_iter: int, report: Tensor
    ) -> tuple[Tensor, int]:
        at = best = _Point(self, g, reg)
        sinkhorn, ridge, since = 2, 0.0, 0
        counts = [0, 0, 0]
        while (at.error > goal or sinkhorn == 2) and n_iter < max_iter and since < 100:
            n_iter += 1
            if sinkhorn > 0:
                counts[0] += 1
                sinkhorn -= 1
                at = _Point(self, self.columns_of(at, reg), reg)
            else:
                counts[1] += 1
                after, step = self.newton(at, reg, ridge)
                if after is None:
                    counts[2] += 1
                    ridge, sinkhorn = max(16 * ridge, 1e-2), 2
                else:
                    at = after
                    ridge = max(4 * ridge, 1e-3) if step < 1 else ridge / 4 if ridge > 1e-4 else 0.0
            since += 1
            if at.error < best.error:
                since = 0 if at.error < 0.5 * best.error else since
                best = at
        numbers = (reg, counts[0], counts[1], 0, self.cost.numel(), counts[2], best.error)
        report.copy_(report.new_tensor(numbers))
        return best.g, n_iter

    def columns_of(self, at: _Point, reg: float) -> Tensor:
        """A step of Sinkhorn's iteration."""
        log_sum = ((at.f.unsqueeze(1) - self.cost) / reg + self.a.log().unsqueeze(1)).logsumexp(0)
        g = -self.damping(1, reg) * reg * log_sum
        return torch.where(g.isinf(), 0.0, g)

    def newton(self, at: _Point, reg: float, ridge: float) -> tuple[_Point | None, float]:
        """The point after a step, and how long that was; none if no length would do."""
        share = torch.where(at.row_mass > 0, self.damping(0, reg) / at.row_mass, 0.0)
        diagonal = at.column_mass + at.target * (reg / float(self.penalty[1]))
        matrix = torch.diag(diagonal * (1 + ridge)) - at.plan.mT @ (share.unsqueeze(1) * at.plan)
        scale = torch.where(diagonal > 0, diagonal, math.inf).rsqrt()
        scaled = scale.unsqueeze(1) * matrix * scale
        inverse = torch.linalg.pinv(scaled, rtol=1e-14, hermitian=True)
        direction = reg * scale * (inverse @ (scale * at.gradient))
        slope = float(direction @ at.gradient)
        step = 1.0
        while step > 2e-3 and slope > 0:
            to = _Point(self, at.g + step * direction, reg)
            grows = to.objective >= at.objective + 1e-4 * step * slope
            # Near the solution the objective has no digits left.
            if grows or (at.error < 1e-7 * float(self.b.sum()) and to.error < at.error):
                return to, step
            step *= 0.25
        return None, step

    def potentials(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides, of points without mass too, with equal means where a constant is free."""
        at = _Point(self, g, self.reg)
        g = torch.where(self.b == 0, self.columns_of(at, self.reg), g)
        mass = self.a.sum()
        if bool(self.penalty.isinf().all()) and float(mass) > 0:
            shift = ((self.a * at.f).sum() - (self.b * g).sum()) / (2 * mass)
            return at.f - shift, g + shift
        return at.f, g
