"""What people use, or would write, instead of our solver of transport and of its operators.

A solver takes costs M (n, m), masses a and b, reg, and a tolerance of its own kind, and returns the
plan. Tolerances mean different things, so `Reaching` gives each solver the loosest with which it gets
where all are to get.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.harness import Absent

ERROR = 1e-9
"""The L1 error of both marginals together that everyone is to reach, in each problem of a batch."""
TOLERANCES = (1e-9, 1e-10, 1e-11)
Solver = Callable[..., Tensor]


def marginal_error(plan: Tensor, a: Tensor, b: Tensor) -> float:
    """The L1 error of both marginals together; of a batch the largest. NaN where the plan has one."""
    return ((plan.sum(-1) - a).abs().sum(-1) + (plan.sum(-2) - b).abs().sum(-1)).max().item()


class Reaching:
    """A solver with the loosest tolerance that brings it to `ERROR`; absent if none does."""

    def __init__(self, solver: Solver) -> None:
        self._solver = solver
        self._tolerance = 0.0

    def __call__(self, M: Tensor, a: Tensor, b: Tensor, reg: float) -> Tensor:
        if not self._tolerance:
            for tolerance in TOLERANCES:
                error = marginal_error(self._solver(M, a, b, reg, tolerance), a, b)
                if error <= ERROR:
                    self._tolerance = tolerance
                    break
                if not error <= tolerance * sum(M.shape[-2:]) ** 0.5:  # it gave up
                    raise Absent(f"does not reach {ERROR:.0e}: marginal error {error:.1e}")
            else:
                raise Absent(f"does not reach {ERROR:.0e}: marginal error {error:.1e}")
        return self._solver(M, a, b, reg, self._tolerance)


def scaling(M: Tensor, a: Tensor, b: Tensor, reg: float, tolerance: float) -> Tensor:
    """Sinkhorn's iteration on exp(-M / reg), as short as it gets; each half-step is a product."""
    kernel = torch.exp(-M / reg)
    transposed = kernel.T.contiguous()
    v = torch.ones_like(b)
    for _ in range(50_000):
        u = a / (kernel @ v)
        sums = transposed @ u
        error = (v * sums - b).abs().sum()
        if not error > tolerance:
            break
        v = b / sums
    return u[:, None] * kernel * v


def regot(name: str) -> Solver:
    """One of RegOT's solvers; its tolerance is of the gradient's Euclidean norm."""
    import regot as package

    function = getattr(package, f"sinkhorn_{name}")

    def solve(M: Tensor, a: Tensor, b: Tensor, reg: float, tolerance: float) -> Tensor:
        arrays = np.asfortranarray(M.cpu().numpy()), a.cpu().numpy(), b.cpu().numpy()
        result = function(*arrays, reg, tol=tolerance, max_iter=1000)
        return torch.as_tensor(np.array(result.plan), device=M.device)

    return solve


def pot_sinkhorn(M: Tensor, a: Tensor, b: Tensor, reg: float, tolerance: float) -> Tensor:
    """POT's `ot.sinkhorn`, of one problem or of each of a batch."""
    import ot

    if M.dim() == 3:
        each = zip(M, a, b, strict=True)
        return torch.stack([pot_sinkhorn(*problem, reg, tolerance) for problem in each])
    arrays = a.cpu().numpy(), b.cpu().numpy(), M.cpu().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its result is judged by its error
        plan = ot.sinkhorn(*arrays, reg, stopThr=tolerance, numItermax=100_000, warn=False)
    return torch.as_tensor(plan, device=M.device)


def pot_batch(M: Tensor, a: Tensor, b: Tensor, reg: float, tolerance: float) -> Tensor:
    """POT's batched solver, with torch, in the scaling form."""
    from ot.batch import solve_batch

    return solve_batch(M, reg, a, b, max_iter=100_000, tol=tolerance, method="sinkhorn").plan


def ott_sinkhorn() -> Solver:
    """OTT-JAX's Sinkhorn, compiled, in float64, one thread; a batch by `jax.vmap`."""
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ.setdefault("XLA_FLAGS", flags)  # read when JAX starts
    import jax
    from ott.geometry.geometry import Geometry
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear.sinkhorn import Sinkhorn

    jax.config.update("jax_enable_x64", True)

    def one(M: Any, a: Any, b: Any, reg: float, tolerance: float) -> Any:
        problem = LinearProblem(Geometry(cost_matrix=M, epsilon=reg), a=a, b=b)
        solver = Sinkhorn(threshold=tolerance, max_iterations=100_000)
        return solver(problem).matrix

    single = jax.jit(one, static_argnums=(3, 4))
    batch = jax.jit(jax.vmap(one, (0, 0, 0, None, None)), static_argnums=(3, 4))

    def solve(M: Tensor, a: Tensor, b: Tensor, reg: float, tolerance: float) -> Tensor:
        arrays = M.cpu().numpy(), a.cpu().numpy(), b.cpu().numpy()
        plan = (batch if M.dim() == 3 else single)(*arrays, reg, tolerance)
        return torch.as_tensor(np.array(plan), device=M.device)

    return solve


def eager_plan(M: Tensor, a: Tensor, b: Tensor, reg: float, f: Tensor, g: Tensor) -> Tensor:
    """The plan by its formula."""
    return a[:, None] * b * torch.exp((f[:, None] + g - M) / reg)


def eager_gradient(
    M: Tensor, a: Tensor, b: Tensor, reg: float, f: Tensor, g: Tensor, left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """P (left + right) and the weighted sums of P / a and P / b, by their formulas."""
    e = torch.exp((f[:, None] + g - M) / reg)
    weight = a[:, None] * b * e * (left[:, None] + right)
    return weight, e @ (b * right), (a * left) @ e


def dense_solve(
    M: Tensor, a: Tensor, b: Tensor, reg: float, f: Tensor, g: Tensor, p: Tensor, q: Tensor
) -> tuple[Tensor, Tensor]:
    """[[D1, P], [P', D2]] (u; v) = (p; q) by Cholesky of the Schur complement, the last v being zero."""
    plan = eager_plan(M, a, b, reg, f, g)
    rows, columns = plan.sum(1), plan.sum(0)
    scaled = plan[:, :-1] / rows[:, None]
    schur = torch.diag(columns[:-1]) - plan[:, :-1].T @ scaled
    factor = torch.linalg.cholesky(schur)
    v = torch.cholesky_solve((q[:-1] - scaled.T @ p)[:, None], factor)[:, 0]
    v = torch.cat([v, v.new_zeros(1)])
    return (p - plan @ v) / rows, v
