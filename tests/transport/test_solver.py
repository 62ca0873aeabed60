"""The operator of the solver: its kernel against the reference, and what it says of its stages."""

from __future__ import annotations

import math

import pytest
import torch
from fusee.transport.solver import solver

from tests.transport.calls import check_kernel, check_reference, problem_of, solved


def test_kernel_and_reference() -> None:
    check_kernel(solver)
    check_reference(solver)


@pytest.mark.parametrize("place", ["x", "a", "b", "reg"])
def test_nan_stays_in_its_problem(place: str) -> None:
    problem = list(problem_of(0))
    expected = solved(tuple(problem))
    at = {"x": 0, "a": 3, "b": 4, "reg": 5}[place]
    problem[at] = problem[at].clone()
    problem[at].view(2, -1)[1, -1] = math.nan
    value, f, g, error, *_ = solved(tuple(problem))
    for actual, wanted in zip((value, f, g, error), expected, strict=False):
        assert bool(actual[1].isnan().all())
        assert torch.equal(actual[0], wanted[0])


def test_stages() -> None:
    """The regularisation falls to its own, the counts add up, and the last error is the one returned."""
    x, y, metric, a, b, _, penalty = problem_of(0)
    reg = torch.tensor([1e-3, 1e-4], dtype=torch.float64)
    _, _, _, error, n_iter, stages = solver(x, y, metric, a, b, reg, penalty, None, 1e-12, 500)
    for i in range(2):
        rows = stages[i][stages[i, :, 0] > 0]
        assert len(rows) > 3 and bool((stages[i, len(rows) :] == 0).all())
        assert bool((rows[1:, 0] < rows[:-1, 0]).all())
        assert rows[-1, 0] == reg[i]
        assert int(rows[:, 1:3].sum()) == int(n_iter[i])
        assert float(error[i]) <= 1.1e-12 and float(rows[-1, 6]) <= 1e-12
