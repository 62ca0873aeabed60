"""The system of implicit derivatives: its kernel against the reference, and that the solution holds."""

from __future__ import annotations

import math

import pytest
import torch
from fusee.transport.transport_plan import transport_plan
from fusee.transport.transport_solve import transport_solve

from tests.transport.calls import HELD, call_of, check_kernel, check_reference, problem_of


def test_kernel_and_reference() -> None:
    check_kernel(transport_solve)
    check_reference(transport_solve)


@pytest.mark.parametrize("penalty", [HELD, (0.7, 2.0), (math.inf, 0.3)])
def test_solution_of_the_system(penalty: tuple[float, float]) -> None:
    """It holds; where both marginals do, up to what the null space takes, with equal means."""
    problem = problem_of(0, penalty=penalty)
    *shared, weights, f, g, p, q = call_of(transport_solve, problem)
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
    problem = problem_of(0, massless=True)
    *rest, p, q = call_of(transport_solve, problem)
    u, v = transport_solve(*rest, p, q)
    assert bool(u.isfinite().all() and v.isfinite().all())
    p[0, 3] = 1.0
    asking, same = transport_solve(*rest, p, q)
    assert bool(asking[0, 3].isnan())
    assert int(asking.isnan().sum()) == 1 and bool(same.isfinite().all())
