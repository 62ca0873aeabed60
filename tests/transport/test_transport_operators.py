"""The operators beneath: kernels against the references that ship, and what each promises."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fusee._op import Op
from fusee.transport.solver import solver
from fusee.transport.transport_plan import transport_plan, transport_plan_gradient
from fusee.transport.transport_solve import transport_solve
from torch import Tensor

from tests.harness.layouts import LAYOUTS
from tests.harness.spec import Maker

HELD = (math.inf, math.inf)
OPS = (solver, transport_plan, transport_plan_gradient, transport_solve)


def _problem(
    metric: int,
    dtype: torch.dtype = torch.float64,
    penalty: tuple[float, float] = HELD,
    *,
    massless: bool = False,
    forbidden: bool = False,
) -> tuple[Any, ...]:
    """Two problems: x, y, metric, a, b, reg and penalty."""
    make = Maker(dtype, seed=metric)
    n, m = 7, 5
    x = make.uniform(2, n, m if metric == 0 else 3)
    y = None if metric == 0 else make.uniform(2, m, 3)
    if forbidden:
        x[:, 1, 2] = x[:, 4, 0] = math.inf
    a, b = (make.uniform(2, count, low=0.5, dtype=torch.float64) for count in (n, m))
    if massless:
        a[:, 3], b[0, 1] = 0, 0
    a, b = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
    reg = torch.tensor([0.3, 0.05], dtype=torch.float64)
    return x, y, metric, a, b, reg, torch.tensor([penalty] * 2, dtype=torch.float64)


def _problems() -> Iterator[tuple[Any, ...]]:
    for metric in range(5):
        yield _problem(metric)
        yield _problem(metric, torch.float32, (0.5, math.inf), massless=True)
    yield _problem(0, penalty=(1.0, 0.2), forbidden=True)
    yield _problem(0, massless=True, forbidden=True)


def _solved(problem: tuple[Any, ...]) -> tuple[Tensor, ...]:
    return solver(*problem, None, 1e-14, 500)


def _calls(op: Op, problem: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a call at the solution."""
    if op is solver:
        return (*problem, None, 1e-14, 500)
    *shared, penalty = problem
    f, g = _solved(problem)[1:3]
    if op is transport_plan:
        return (*shared, f, g)
    make = Maker(torch.float64, seed=4)
    # Points without mass have no equation of their own.
    p, q = make.normal(*f.shape) * (shared[3] > 0), make.normal(*g.shape) * (shared[4] > 0)
    if op is transport_plan_gradient:
        return (*shared, f, g, p, q)
    return (*shared, penalty, f, g, p, q)


def _outputs(output: Any) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_kernels(op: Op) -> None:
    """Every engine has its own, and no reference serves in their place."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fusee::{op.name}", "CPU")


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_references(op: Op) -> None:
    """The engine's results are those of the reference, from any strides."""
    for problem in _problems():
        args = _calls(op, problem)
        expected = _outputs(op.reference(*args))
        for layout in (None, "transposed", "padded"):
            change = LAYOUTS[layout] if layout else lambda t: t
            spread = [change(arg) if isinstance(arg, Tensor) else arg for arg in args]
            actual = _outputs(op.overload(*spread))
            # Iterations, stages and the last digits of the error are each one's own.
            for a, e in list(zip(actual, expected, strict=True))[: 3 if op is solver else None]:
                assert a.dtype == e.dtype
                assert a.is_contiguous()
                tol = 1e-6 if a.dtype == torch.float32 else 1e-11
                torch.testing.assert_close(a, e, rtol=tol, atol=tol)


@pytest.mark.parametrize("penalty", [HELD, (0.7, 2.0), (math.inf, 0.3)])
def test_solution_of_the_system(penalty: tuple[float, float]) -> None:
    """It holds; where both marginals do, up to what the null space takes, with equal means."""
    problem = _problem(0, penalty=penalty)
    *shared, weights, f, g, p, q = _calls(transport_solve, problem)
    u, v = transport_solve(*shared, weights, f, g, p, q)
    P = transport_plan(*shared, f, g)
    rows, columns = P.sum(2), P.sum(1)
    soft = 1 + shared[5][:, None] / weights
    left = soft[:, :1] * rows * u + (P @ v[..., None]).squeeze(-1)
    right = soft[:, 1:] * columns * v + (P.mT @ u[..., None]).squeeze(-1)
    if penalty == HELD:
        excess = ((p.sum(1) - q.sum(1)) / 2)[:, None]
        p, q = p - excess * rows, q + excess * columns
        torch.testing.assert_close((rows * u).sum(1), (columns * v).sum(1), rtol=0, atol=1e-12)
    torch.testing.assert_close(left, p, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(right, q, rtol=1e-11, atol=1e-12)


def test_system_of_points_without_mass() -> None:
    """One that asks for nothing follows the others; one that asks for something is NaN alone."""
    problem = _problem(0, massless=True)
    *rest, p, q = _calls(transport_solve, problem)
    u, v = transport_solve(*rest, p, q)
    assert bool(u.isfinite().all() and v.isfinite().all())
    p[0, 3] = 1.0
    asking, same = transport_solve(*rest, p, q)
    assert bool(asking[0, 3].isnan())
    assert int(asking.isnan().sum()) == 1 and bool(same.isfinite().all())


@pytest.mark.parametrize("place", ["x", "a", "b", "reg"])
def test_nan_stays_in_its_problem(place: str) -> None:
    problem = list(_problem(0))
    expected = _solved(tuple(problem))
    at = {"x": 0, "a": 3, "b": 4, "reg": 5}[place]
    problem[at] = problem[at].clone()
    problem[at].view(2, -1)[1, -1] = math.nan
    value, f, g, error, *_ = _solved(tuple(problem))
    for actual, wanted in zip((value, f, g, error), expected, strict=False):
        assert bool(actual[1].isnan().all())
        assert torch.equal(actual[0], wanted[0])


def test_stages() -> None:
    """The regularisation falls to its own, the counts add up, and the last error is the one returned."""
    x, y, metric, a, b, _, penalty = _problem(0)
    reg = torch.tensor([1e-3, 1e-4], dtype=torch.float64)
    _, _, _, error, n_iter, stages = solver(x, y, metric, a, b, reg, penalty, None, 1e-12, 500)
    for i in range(2):
        rows = stages[i][stages[i, :, 0] > 0]
        assert len(rows) > 3 and bool((stages[i, len(rows) :] == 0).all())
        assert bool((rows[1:, 0] < rows[:-1, 0]).all())
        assert rows[-1, 0] == reg[i]
        assert int(rows[:, 1:3].sum()) == int(n_iter[i])
        assert float(error[i]) <= 1.1e-12 and float(rows[-1, 6]) <= 1e-12
