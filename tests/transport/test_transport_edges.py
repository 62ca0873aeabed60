"""Where rounding, scale or padding would show: what a review of the solver found, and what must hold."""

from __future__ import annotations

import math
from typing import Any

import fusee
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.harness.spec import Maker

INF = math.inf


def _make(seed: int = 0) -> Maker:
    return Maker(torch.float64, seed=seed)


@pytest.mark.parametrize("reg", [-1.0, math.nan, 0.0])
@pytest.mark.parametrize("size", [0, 3])
def test_a_bad_reg_among_values_ends(reg: float, size: int, monkeypatch: Any) -> None:
    """Without masses nothing else would end the search."""
    M, zero = torch.rand(size, size), torch.zeros(size)
    with pytest.raises(ValueError, match="reg must be"):
        fusee.sinkhorn_newton(M, zero, zero, reg=torch.tensor(reg))
    # Where values are not read, the problem is NaN and no other is.
    both = torch.vmap(lambda r: fusee.sinkhorn_newton(M, zero, zero, reg=r).value)
    value = both(torch.tensor([reg, 1.0]))
    assert bool(value[0].isnan()) and float(value[1]) == 0.0


@pytest.mark.parametrize("mass", [1e-12, 1e-3, 1e9])
def test_masses_of_any_size(mass: float) -> None:
    """A plan scales with its masses, and so does what counts as an error."""
    M = _make().uniform(12, 12)
    a = torch.full((12,), mass / 12, dtype=torch.float64)
    result = fusee.sinkhorn_newton(M, a, a, reg=0.01)
    assert bool(result.converged) and float(result.marginal_error) <= 1e-9 * mass
    torch.testing.assert_close(
        result.plan / mass, fusee.sinkhorn_newton(M, reg=0.01).plan, rtol=1e-6, atol=1e-10
    )


def test_large_penalties_lose_no_digits() -> None:
    M = _make().uniform(10, 8)
    for pair in ((INF, 1.0), (1.0, INF), (1.0, 1.0)):
        values = [
            float(fusee.sinkhorn_newton(M, reg=0.1, unbalanced=(w[0], w[1]), tol=1e-12).value)
            for w in (tuple(weight * p for p in pair) for weight in (1e8, 1e12, 1e15))
        ]
        balanced = float(fusee.sinkhorn_newton(M, reg=0.1, tol=1e-12).value)
        assert values == pytest.approx([balanced] * 3, abs=1e-8)
        assert values[1:] == pytest.approx([balanced] * 2, abs=1e-11)


def test_huge_costs_in_the_place_of_forbidden_pairs() -> None:
    """The constant between the potentials is of their size at first, and must not stay."""
    M = _make().uniform(20, 20)
    forbidden = _make(1).uniform(20, 20) < 0.3
    huge = fusee.sinkhorn_newton(torch.where(forbidden, 1e12, M), reg=0.01)
    infinite = fusee.sinkhorn_newton(torch.where(forbidden, INF, M), reg=0.01)
    assert bool(huge.converged) and bool(infinite.converged)
    torch.testing.assert_close(huge.plan, infinite.plan, rtol=0, atol=1e-8)


def test_first_potentials_with_a_large_constant() -> None:
    M = _make().uniform(20, 20)
    f, g = fusee.sinkhorn_newton(M, reg=0.01).potentials
    result = fusee.sinkhorn_newton(M, reg=0.01, potentials_init=(f - 1e6, g + 1e6))
    assert bool(result.converged) and int(result.n_iter) <= 4


@pytest.mark.parametrize("pairs", ["forbidden", "to columns without mass"])
def test_padded_rows_leave_derivatives_alone(pairs: str) -> None:
    """A row without mass that can go nowhere, as in a ragged batch, and the problem without it."""
    small = _make().uniform(3, 4).requires_grad_()
    a, b = _make(1).uniform(3, low=0.1), _make(2).uniform(4, low=0.1)
    b = torch.cat([b[:3] / b[:3].sum() * a.sum(), b.new_zeros(1)])
    row = torch.full((1, 4), INF, dtype=torch.float64)
    if pairs != "forbidden":
        row[0, 3] = 0.5
    M = torch.cat([small, row])
    masses = torch.cat([a, a.new_zeros(1)])
    weight = _make(3).normal(3, 4)

    def gradients(M: Tensor, a: Tensor) -> Tensor:
        result = fusee.sinkhorn_newton(M, a, b, reg=0.05)
        out = (result.plan[:3] * weight).sum() + result.value_linear
        return torch.autograd.grad(out, small)[0]

    expected = gradients(small, a)
    assert bool(expected.isfinite().all())
    torch.testing.assert_close(gradients(M, masses), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("reg", [1e-2, 1e-3, 1e-4])
def test_gradients_of_potentials_stay_bounded(reg: float) -> None:
    """Where the plan is a matching, float64 does not know the potentials; nothing may blow up."""
    n = 40
    M = _make().uniform(n, n).requires_grad_()
    f, _ = fusee.sinkhorn_newton(M, reg=reg).potentials
    weight = _make(1).normal(n)
    (grad,) = torch.autograd.grad((f * (weight - weight.mean())).sum(), M)
    assert float(grad.abs().max()) < 1e3
    if reg == 1e-2:  # shifting a row's costs shifts its potential, shifting a column's no f
        torch.testing.assert_close(grad.sum(1), weight - weight.mean(), rtol=0, atol=1e-9)
        torch.testing.assert_close(grad.sum(0), torch.zeros_like(weight), rtol=0, atol=1e-9)


def test_costs_that_change_afterwards() -> None:
    M = torch.rand(5, 4, dtype=torch.float64)
    result = fusee.sinkhorn_newton(M.clone(), reg=0.1)
    plan, changed = result.plan, fusee.sinkhorn_newton(M, reg=0.1)
    M += 1
    for name in ("plan", "value_linear", "marginals", "sparse_plan"):
        with pytest.raises(RuntimeError, match="changed in place after they were solved"):
            getattr(changed, name)
    torch.testing.assert_close(changed.value, result.value)  # which was computed then
    torch.testing.assert_close(result.plan, plan)


def test_sparse_plans_do_not_warn(recwarn: pytest.WarningsRecorder) -> None:
    _ = fusee.sinkhorn_newton(torch.rand(4, 4), reg=0.1).sparse_plan
    assert not recwarn.list


def test_meta_tensors() -> None:
    result = fusee.sinkhorn_newton(torch.empty(3, 4, device="meta"), reg=0.1)
    assert result.plan.shape == (3, 4) and result.value.is_meta


def test_numbers_and_arrays_of_numpy() -> None:
    M = np.random.default_rng(0).random((4, 4))
    result = fusee.sinkhorn_newton(M, reg=np.float32(0.1), max_iter=np.int64(500))
    assert result.converged
    assert fusee.sinkhorn_newton(M, reg=0.1, max_iter=10**30).converged
    for dtype in (object, ">f8", np.longdouble):
        with pytest.raises(TypeError, match="M must have dtype"):
            fusee.sinkhorn_newton(M.astype(dtype), reg=0.1)


def test_memory_of_the_pass_grows_with_the_sides() -> None:
    """More rows than the blocks have at least: the sums are still added in order."""
    x, y = _make().uniform(4500, 1), _make(1).uniform(3, 1)
    many = fusee.sinkhorn_newton_samples(x, y, reg=0.1)
    other = fusee.sinkhorn_newton_samples(y, x, reg=0.1)
    assert bool(many.converged) and bool(other.converged)
    torch.testing.assert_close(many.value, other.value, rtol=1e-9, atol=0)
