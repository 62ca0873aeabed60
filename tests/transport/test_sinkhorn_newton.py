"""``fusee.sinkhorn_newton`` over families of problems: the error that is asked for, or a warning."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import fusee
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

from tests.transport.families import FAMILIES, REGIMES, Problem
from tests.transport.oracle import plan_of

TOL = 1e-9
EMULATED = fusee.engine("cpu") == "emulated"


def _solve(problem: Problem, reg: float, **options: Any) -> fusee.TransportResult:
    """The result; it is finite, and there is a warning if and only if it is said not to be one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = fusee.sinkhorn_newton(problem.M, problem.a, problem.b, reg=reg, **options)
    told = [w for w in caught if w.category is RuntimeWarning]
    assert len(told) == (0 if bool(result.converged) else 1)
    for tensor in (*result.potentials, result.value, result.marginal_error, result.stages):
        assert bool(tensor.isfinite().all())
    return result


def _masses(problem: Problem) -> tuple[Tensor, Tensor]:
    n, m = problem.M.shape
    ones = problem.M.new_ones
    a = ones(n) / n if problem.a is None else problem.a
    return a, ones(m) / m if problem.b is None else problem.b


def _error(problem: Problem, reg: float, result: fusee.TransportResult) -> float:
    """The error of the plan of these potentials, made here."""
    a, b = _masses(problem)
    P = plan_of(problem.M, a, b, reg, *result.potentials)
    return float((P.sum(1) - a).abs().sum() + (P.sum(0) - b).abs().sum())


def _check(problem: Problem, reg: float) -> None:
    result = _solve(problem, reg, tol=TOL)
    assert bool(result.converged), result
    assert _error(problem, reg, result) <= 1.01 * TOL


@pytest.mark.parametrize("reg", [1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, reg: float) -> None:
    """From the range of the costs down to a ten-thousandth of it, with n and m unlike."""
    n, m = (25, 20) if EMULATED else (144, 100)
    problem = FAMILIES[family](n, m)
    _check(problem, reg * problem.range)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("family", ["random", "digits, L1", "clouds, 2 dimensions", "circles"])
def test_regimes(family: str, regime: str) -> None:
    for reg in (0.3, 3e-3):
        problem = REGIMES[regime](FAMILIES[family](36, 36))
        _check(problem, reg * problem.range)


@pytest.mark.parametrize("reg", [1.0, 1e-2, 1e-4])
def test_small_problems(reg: float) -> None:
    """Every shape from one point upwards."""
    for n, m in itertools.product((1, 2, 3, 5), repeat=2):
        problem = FAMILIES["random"](n, m)
        _check(problem, reg)


@pytest.mark.threads
def test_thousands_of_points() -> None:
    problem = FAMILIES["clouds, 2 dimensions"](2000, 1500)
    result = _solve(problem, 1e-3 * problem.range)
    assert bool(result.converged)
    assert _error(problem, 1e-3 * problem.range, result) <= 1.01e-9


@pytest.mark.parametrize("weights", [0.01, 1.0, 100.0, (1.0, math.inf), (math.inf, 0.1)])
@pytest.mark.parametrize("family", ["random", "digits, L1", "clouds, 10 dimensions"])
def test_unbalanced(family: str, weights: Any) -> None:
    """The plan's marginals are a exp(-f / weight), which with the plan's form is optimality."""
    problem = FAMILIES[family](36, 30)
    a, b = _masses(problem)
    problem = Problem(problem.M, 2 * a, b if weights == (1.0, math.inf) else 0.5 * b)
    a, b = _masses(problem)
    pair = weights if isinstance(weights, tuple) else (weights, weights)
    for reg in (0.3, 1e-2):
        scaled = tuple(weight * problem.range for weight in pair)
        result = _solve(problem, reg * problem.range, unbalanced=scaled, tol=1e-10)
        assert bool(result.converged)
        f, g = result.potentials
        P = plan_of(problem.M, a, b, reg * problem.range, f, g)
        error = (P.sum(1) - a * (-f / scaled[0]).exp()).abs().sum()
        error = error + (P.sum(0) - b * (-g / scaled[1]).exp()).abs().sum()
        assert float(error) <= 1.01e-10 * max(float(a.sum()), float(b.sum()))


def test_heavier_penalties_approach_the_balanced_problem() -> None:
    problem = FAMILIES["random"](12, 9)
    balanced = _solve(problem, 0.05).plan
    gaps = [
        float((_solve(problem, 0.05, unbalanced=weight).plan - balanced).abs().sum())
        for weight in (1.0, 100.0, 10000.0)
    ]
    assert gaps[1] < 0.05 * gaps[0] and gaps[2] < 0.05 * gaps[1]


@pytest.mark.parametrize("family", ["random", "digits, squared L2", "trees", "circles"])
def test_exact_transport_in_the_limit(family: str) -> None:
    """<C, P> is at least the value of the linear programme, and above it by less than
    reg log(n m)."""
    problem = FAMILIES[family](16, 12)
    a, b = _masses(problem)
    n, m = problem.M.shape
    reg = 1e-4 * problem.range
    sums = torch.cat([torch.eye(n).repeat_interleave(m, 1), torch.eye(m).repeat(1, n)])
    masses = torch.cat([a, b])
    programme = linprog(problem.M.flatten().numpy(), A_eq=sums.numpy(), b_eq=masses.numpy())
    result = _solve(problem, reg)
    slack = float(result.value_linear) - programme.fun
    assert -1e-8 * problem.range <= slack <= reg * math.log(n * m)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reg", [1e-1, 1e-3, 1e-4])
def test_error_in_single_precision(dtype: torch.dtype, reg: float) -> None:
    """The marginal error does not grow as reg falls: the costs alone are stored in less."""
    problem = FAMILIES["digits, L1"](64, 64)
    M = problem.M.to(dtype)
    result = fusee.sinkhorn_newton(M, problem.a, problem.b, reg=reg * problem.range)
    assert bool(result.converged)
    assert result.plan.dtype == torch.float32
    assert float((result.plan.sum(1).double() - problem.a).abs().sum()) < 1e-6


def test_infeasible_support() -> None:
    """Two rows that have one column of half their mass: no plan, which shows in the values alone."""
    M = torch.tensor([[0.0, math.inf, 1.0], [1.0, math.inf, 0.0], [math.inf, 0.0, 1.0]])
    masses = torch.tensor([0.2, 0.2, 0.6]), torch.tensor([0.1, 0.8, 0.1])
    with pytest.warns(RuntimeWarning, match="1 of 1 problems did not converge"):
        result = fusee.sinkhorn_newton(M, *masses, reg=0.1)
    assert not bool(result.converged)
    assert float(result.marginal_error) > 0.1


def test_too_few_iterations() -> None:
    """The warning names the error and the number of iterations; ``converged`` says which problem."""
    easy, hard = torch.zeros(8, 8), FAMILIES["random"](8, 8).M
    M = torch.stack([easy.double(), hard])
    with pytest.warns(RuntimeWarning, match=r"1 of 2 .* after up to 3 iterations, above tol=1e-09"):
        result = fusee.sinkhorn_newton(M, reg=1e-3, max_iter=3)
    assert result.converged.tolist() == [True, False]
    assert result.n_iter[1] == 3


@pytest.mark.parametrize("size", [1, 4])
def test_batches(size: int) -> None:
    """Every problem of a batch has its own regularisation, and the same bits as alone."""
    M = torch.stack([FAMILIES[name](16, 16).M for name in list(FAMILIES)[:size]])
    reg = torch.logspace(-1, -4, size, dtype=torch.float64)
    together = fusee.sinkhorn_newton(M, reg=reg)
    for i in range(size):
        alone = fusee.sinkhorn_newton(M[i], reg=float(reg[i]))
        for a, b in zip(together[i].potentials, alone.potentials, strict=True):
            assert torch.equal(a, b)
        assert together.n_iter[i] == alone.n_iter


def test_one_bad_problem_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where values are not read, a problem with NaN is NaN, and no other."""
    M = torch.stack([FAMILIES["random"](9, 7).M] * 3)
    expected = fusee.sinkhorn_newton(M[0], reg=0.01)
    M[1, 2, 3] = math.nan
    results = torch.func.vmap(lambda M: torch.cat(fusee.sinkhorn_newton(M, reg=0.01).potentials))(M)
    assert bool(results[1].isnan().all())
    for i in (0, 2):
        assert torch.equal(results[i], torch.cat(expected.potentials))


def test_first_potentials() -> None:
    """They lead to the same plan, near it or far away."""
    problem = FAMILIES["random"](40, 30)
    cold = _solve(problem, 0.01, tol=1e-12)
    far = (torch.zeros(40), torch.linspace(-5, 5, 30))
    for first in (cold.potentials, far):
        plan = _solve(problem, 0.01, tol=1e-12, potentials_init=first).plan
        torch.testing.assert_close(plan, cold.plan, rtol=0, atol=1e-11)


def test_first_potentials_save_iterations() -> None:
    problem = FAMILIES["random"](40, 30)
    cold = _solve(problem, 0.01)
    warm = _solve(problem, 0.01, potentials_init=cold.potentials)
    assert int(warm.n_iter) <= int(cold.n_iter) // 2


def test_invariances() -> None:
    """A constant added to a row moves its potential; scales of costs and of masses factor out;
    transposition changes the sides about."""
    problem = FAMILIES["random"](20, 14)
    M, options = problem.M, {"tol": 1e-11}
    plan = fusee.sinkhorn_newton(M, reg=0.02, **options).plan
    shifted = M + torch.linspace(-50, 50, 20)[:, None].double()
    for other, factor in (
        (fusee.sinkhorn_newton(shifted, reg=0.02, **options).plan, 1),
        (fusee.sinkhorn_newton(1e6 * M, reg=2e4, **options).plan, 1),
        (fusee.sinkhorn_newton(M.T, reg=0.02, **options).plan.T, 1),
        (_scaled_masses(M, 1000.0), 1000),
    ):
        torch.testing.assert_close(other, factor * plan, rtol=0, atol=factor * 1e-10)


def _scaled_masses(M: Tensor, mass: float) -> Tensor:
    a, b = (torch.full((count,), mass / count).double() for count in M.shape)
    return fusee.sinkhorn_newton(M, a, b, reg=0.02, tol=1e-8).plan
