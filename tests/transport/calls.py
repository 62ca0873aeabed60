"""Calls of the operators of transport at small solutions, and what each operator promises."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from fusee._op import Op
from fusee.transport.solver import solver
from fusee.transport.transport_plan import transport_plan, transport_plan_gradient
from torch import Tensor

from tests.harness.layouts import LAYOUTS
from tests.harness.spec import Maker

HELD = (math.inf, math.inf)


def problem_of(
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


def problems() -> Iterator[tuple[Any, ...]]:
    for metric in range(5):
        yield problem_of(metric)
        yield problem_of(metric, torch.float32, (0.5, math.inf), massless=True)
    yield problem_of(0, penalty=(1.0, 0.2), forbidden=True)
    yield problem_of(0, massless=True, forbidden=True)


def solved(problem: tuple[Any, ...]) -> tuple[Tensor, ...]:
    return solver(*problem, None, 1e-14, 500)


def call_of(op: Op, problem: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a call at the solution."""
    if op is solver:
        return (*problem, None, 1e-14, 500)
    *shared, penalty = problem
    f, g = solved(problem)[1:3]
    if op is transport_plan:
        return (*shared, f, g)
    make = Maker(torch.float64, seed=4)
    # Points without mass have no equation of their own.
    p, q = make.normal(*f.shape) * (shared[3] > 0), make.normal(*g.shape) * (shared[4] > 0)
    if op is transport_plan_gradient:
        return (*shared, f, g, p, q)
    return (*shared, penalty, f, g, p, q)


def outputs_of(output: Any) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def check_kernel(op: Op) -> None:
    """Every engine has its own, and no reference serves in their place."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fusee::{op.name}", "CPU")


def check_reference(op: Op) -> None:
    """The engine's results are those of the reference, from any strides."""
    for problem in problems():
        args = call_of(op, problem)
        expected = outputs_of(op.reference(*args))
        for layout in (None, "transposed", "padded"):
            change = LAYOUTS[layout] if layout else lambda t: t
            spread = [change(arg) if isinstance(arg, Tensor) else arg for arg in args]
            actual = outputs_of(op.overload(*spread))
            # Iterations, stages and the last digits of the error are each one's own.
            for a, e in list(zip(actual, expected, strict=True))[: 3 if op is solver else None]:
                assert a.dtype == e.dtype
                assert a.is_contiguous()
                tol = 1e-6 if a.dtype == torch.float32 else 1e-11
                torch.testing.assert_close(a, e, rtol=tol, atol=tol)
