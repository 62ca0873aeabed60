"""Derivatives of ``fusee.sinkhorn_newton`` beyond the harness: masses as they are given, points, larger
problems, and what has none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import fusee
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from tests.harness.spec import Maker
from tests.transport.oracle import costs_of, plan_oracle, potentials_oracle, value_oracle

OPTIONS: dict[str, Any] = {"tol": 1e-13}
METRICS = ("sqeuclidean", "euclidean", "cityblock", "dot")


def _make(seed: int = 0) -> Maker:
    return Maker(torch.float64, seed=seed)


def _normal(masses: Tensor) -> Tensor:
    return masses / masses.sum(-1, keepdim=True)


def _masses(*counts: int) -> list[Tensor]:
    make = _make(7)
    return [_normal(make.uniform(count, low=0.5)).requires_grad_() for count in counts]


def _gradients(output: Tensor, leaves: list[Tensor], weight: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad((output * weight).sum(), leaves, retain_graph=True))


def _solve(*leaves: Tensor, **options: Any) -> fusee.TransportResult:
    """With masses that are normalised here, as the oracle's."""
    *points, a, b = leaves
    of_points = fusee.sinkhorn_newton if len(points) == 1 else fusee.sinkhorn_newton_samples
    return of_points(*points, _normal(a), _normal(b), **options, **OPTIONS)


@pytest.mark.parametrize("unbalanced", [None, 0.5, (0.5, math.inf)])
def test_masses_as_given(unbalanced: Any) -> None:
    """Finite differences in a alone and in b alone: b is scaled to the mass of a where both hold, and of
    any sum elsewhere."""
    M = _make().uniform(4, 3)
    a, b = _masses(4, 3)

    def solved(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        result = fusee.sinkhorn_newton(M, a, b, reg=0.2, unbalanced=unbalanced, **OPTIONS)
        return result.value, *result.potentials, result.plan, result.value_linear

    assert gradcheck(solved, (a, b), check_forward_ad=True)
    if unbalanced is None:
        value, _, _, plan, _ = solved(a, b)
        for output in (value, plan.square().sum()):
            (of_b,) = torch.autograd.grad(output, b, retain_graph=True)
            assert abs(float(of_b @ b.detach())) < 1e-12  # a factor of b changes nothing


@pytest.mark.parametrize("metric", METRICS)
def test_points(metric: str) -> None:
    """Potentials and plans of points against the oracle's, some of which coincide."""
    make = _make(3)
    x, y = make.normal(5, 2), make.normal(4, 2)
    y[1] = x[2]
    y[2, 0] = x[0, 0]
    leaves = [x.requires_grad_(), y.requires_grad_(), *_masses(5, 4)]
    result = _solve(*leaves, metric=metric, reg=0.7)
    M = costs_of(*leaves[:2], metric)
    expected = potentials_oracle(M, *leaves[2:], reg=0.7)
    plan = plan_oracle(M, *leaves[2:], reg=0.7)
    linear = (plan * M).sum()
    pairs = [*zip(result.potentials, expected, strict=True), (result.plan, plan)]
    for actual, wanted in [*pairs, (result.value_linear, linear)]:
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-12)
        weight = _make(1).normal(*actual.shape)
        both = (_gradients(out, leaves, weight) for out in (actual, wanted))
        for g, e in zip(*both, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("metric", METRICS)
def test_points_and_their_costs_have_one_gradient(metric: str) -> None:
    """The value's gradient in the points, and the same through a matrix of costs."""
    make = _make(5)
    x, y = make.normal(2, 23, 3).requires_grad_(), make.normal(2, 31, 3).requires_grad_()
    reg = torch.tensor([0.3, 3.0])
    points = fusee.sinkhorn_newton_samples(x, y, metric=metric, reg=reg, unbalanced=2.0, **OPTIONS)
    costs = fusee.sinkhorn_newton(costs_of(x, y, metric), reg=reg, unbalanced=2.0, **OPTIONS)
    weight = torch.tensor([1.0, -2.0])
    gradients = [_gradients(r.value, [x, y], weight) for r in (points, costs)]
    for g, e in zip(*gradients, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reg", [0.1, 0.01])
@pytest.mark.parametrize("unbalanced", [None, 1.0])
def test_larger_problems(reg: float, unbalanced: Any) -> None:
    """Potentials and plans of some thousands of pairs, at which the plan is sparse."""
    M = _make(2).uniform(50, 40).requires_grad_()
    leaves = [M, *_masses(50, 40)]
    options = {"reg": reg, "unbalanced": unbalanced}
    result = _solve(*leaves, **options)
    oracles = potentials_oracle(*leaves, **options, iterations=1000)
    plan = plan_oracle(*leaves, **options, iterations=1000)
    pairs = (*zip(result.potentials, oracles, strict=True), (result.plan, plan))
    for actual, wanted in pairs:
        weight = _make(1).normal(*actual.shape)
        both = (_gradients(out, leaves, weight) for out in (actual, wanted))
        for g, e in zip(*both, strict=True):
            assert float((g - e).norm() / e.norm()) < 1e-8


@pytest.mark.parametrize("unbalanced", [None, 0.5])
def test_points_without_mass(unbalanced: Any) -> None:
    """The value and the plan have their derivatives there, in the masses from one side. A potential has
    none in reverse mode, which is NaN and not zero."""
    M = _make(4).uniform(4, 5).requires_grad_()
    a = torch.tensor([0.3, 0.0, 0.5, 0.2], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([0.2, 0.2, 0.3, 0.3, 0.0], dtype=torch.float64, requires_grad=True)
    leaves, options = [M, a, b], {"reg": 0.2, "unbalanced": unbalanced}
    result = _solve(M, a, b, **options)
    for actual, oracle in ((result.value, value_oracle), (result.plan, plan_oracle)):
        weight = _make(1).normal(*actual.shape)
        both = (_gradients(out, leaves, weight) for out in (actual, oracle(*leaves, **options)))
        for g, e in zip(*both, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-11)
    f, g = result.potentials
    for potential in (f[1], g[4]):
        assert bool(torch.autograd.grad(potential, M, retain_graph=True)[0].isnan().any())

    def potentials(*leaves: Tensor) -> Tensor:
        return torch.cat(_solve(*leaves, **options).potentials)

    def expected(*leaves: Tensor) -> Tensor:
        return torch.cat(potentials_oracle(*leaves, **options))

    primals = tuple(leaf.detach() for leaf in leaves)
    tangents = tuple(_make(9 + i).normal(*leaf.shape) for i, leaf in enumerate(leaves))
    forward = [torch.func.jvp(f, primals, tangents)[1] for f in (potentials, expected)]
    torch.testing.assert_close(*forward, rtol=1e-9, atol=1e-11)


def test_forbidden_pairs() -> None:
    """They have no gradient, and disturb no other."""
    M = _make(6).uniform(4, 4)
    M[0, 1] = M[2, 3] = M[3, 0] = math.inf
    leaves = [M.requires_grad_(), *_masses(4, 4)]
    result = _solve(*leaves, reg=0.2)
    pairs = [(result.value, value_oracle(*leaves, reg=0.2))]
    pairs += zip(result.potentials, potentials_oracle(*leaves, reg=0.2), strict=True)
    pairs.append((result.plan, plan_oracle(*leaves, reg=0.2)))
    for actual, wanted in pairs:
        weight = _make(1).normal(*actual.shape)
        given, expected = (_gradients(out, leaves, weight) for out in (actual, wanted))
        assert bool((given[0][M.isinf()] == 0).all())
        for g, e in zip(given, expected, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-11)


def _second(output: Tensor, leaf: Tensor) -> None:
    (first,) = torch.autograd.grad(output, leaf, create_graph=True)
    (again,) = torch.autograd.grad(first.square().sum(), leaf, create_graph=True)
    torch.autograd.grad(again.square().sum(), leaf)


def test_orders_that_there_are_not() -> None:
    """They raise, in reverse and forward mode, and are never zeros."""
    M = _make().uniform(3, 4).requires_grad_()

    def solve(M: Tensor) -> fusee.TransportResult:
        return fusee.sinkhorn_newton(M, reg=0.3)

    outputs: list[Callable[[Tensor], Tensor]] = [
        lambda M: solve(M).value,
        lambda M: solve(M).potentials[0][0],
        lambda M: solve(M).plan.square().sum(),
    ]
    for output in outputs:
        with pytest.raises(
            NotImplementedError, match="first derivatives, the value has first ones"
        ):
            _second(output(M), M)
    for output in outputs[1:]:
        with pytest.raises(
            NotImplementedError, match="first derivatives, the value has first ones"
        ):
            torch.func.hessian(output)(M.detach())


def test_one_matrix_for_a_batch() -> None:
    """An expanded matrix gets the sum of the problems' gradients."""
    M = _make().uniform(5, 4).requires_grad_()
    reg = torch.tensor([0.1, 0.5])
    together = fusee.sinkhorn_newton(M.expand(2, 5, 4), reg=reg).value.sum()
    alone = sum(fusee.sinkhorn_newton(M, reg=r).value for r in reg)
    torch.testing.assert_close(*(torch.autograd.grad(v, M)[0] for v in (together, alone)))


def test_gradient_of_a_value_takes_no_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """The envelope theorem: nothing is solved in its backward pass."""
    from fusee.transport import solver

    monkeypatch.setattr(solver, "transport_solve", None)
    leaves = [_make().uniform(3, 4).requires_grad_(), *_masses(3, 4)]
    value = fusee.sinkhorn_newton(*leaves, reg=0.3).value
    assert all(bool((grad != 0).any()) for grad in torch.autograd.grad(value, leaves))
