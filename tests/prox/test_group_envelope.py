"""The envelope's value against other formulas, its gradient, and its relation to the operator."""

from __future__ import annotations

import math
from itertools import pairwise

import fusee
import pytest
import torch

from tests.harness.spec import ALL_DTYPES
from tests.prox.certificate import KINDS, conjugate, envelope, exact, values

CASES = 20 if fusee.engine() == "emulated" else 200
KS = (0.3, 1.0, 1.7, 3.0, 6.5, 12.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("debiased", [False, True])
def test_value_by_sorting(kind: str, debiased: bool) -> None:
    """The index rule over sorted norms, in extended precision."""
    generator = torch.Generator().manual_seed(0)
    for case in range(CASES):
        x = values(kind, generator, 1 + case % 17, 1 + case % 3)
        d = 10 ** (6 * torch.rand(len(x), dtype=torch.float64, generator=generator) - 3)
        weights = d if case % 2 else torch.ones_like(d)
        z = (exact(weights) * (exact(x) ** 2).sum(1)) ** 0.5
        for k in KS:
            plain = envelope(z, k)
            expected = plain - (z * z).sum() / 2 if debiased else plain
            actual = fusee.group_envelope(x, k, weights=weights, debiased=debiased).item()
            assert abs(actual - float(expected)) <= 1e-14 * float(plain)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_ends(dtype: torch.dtype) -> None:
    """k = 1: half the squared sum of the norms; k the number of groups: ridge."""
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    n = x.double().norm(dim=1)
    for k, expected in ((1, n.sum() ** 2 / 2), (0.5, n.sum() ** 2), (9, (n**2).sum() / 2)):
        actual = fusee.group_envelope(x, k)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected.to(dtype))
    assert fusee.group_envelope(x, 9, debiased=True).item() == 0
    assert fusee.group_envelope(x, 0).item() == math.inf
    assert fusee.group_envelope(torch.zeros_like(x), 0).item() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_debiased_is_zero_for_few_groups(kind: str) -> None:
    """Exactly, and positive otherwise, however small the rest is."""
    generator = torch.Generator().manual_seed(0)
    for case in range(CASES):
        x = values(kind, generator, 12, 2)
        x[torch.randperm(12, generator=generator)[: case % 12]] = 0
        nonzero = int((x != 0).any(1).sum())
        assert fusee.group_envelope(x, max(nonzero, 1), debiased=True).item() == 0
        if nonzero > 1:
            value = fusee.group_envelope(x, nonzero - 1, debiased=True).item()
            assert value > 0
            assert fusee.group_envelope(x, nonzero - 0.5, debiased=True).item() < value


def test_debiased_does_not_cancel() -> None:
    """The large groups are free, and do not drown what the small ones cost."""
    x = torch.tensor([1e8, 1e8, 1e-3, 2e-3], dtype=torch.float64)
    value = fusee.group_envelope(x, 3, debiased=True).item()
    assert value == pytest.approx((3e-3**2 - 5e-6) / 2, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_a_subgradient(kind: str) -> None:
    """S(x) + S*(g) = <x, g>; that in k is half the squared knee, negative."""
    generator = torch.Generator().manual_seed(0)
    for case in range(CASES):
        x = values(kind, generator, 10, 1 + case % 3).requires_grad_()
        d = 10 ** (6 * torch.rand(10, dtype=torch.float64, generator=generator) - 3)
        k = torch.tensor(KS[case % len(KS)], dtype=torch.float64, requires_grad=True)
        value = fusee.group_envelope(x, k, weights=d)
        g, in_k = torch.autograd.grad(value, (x, k))
        y = ((exact(g) ** 2).sum(1) / exact(d)) ** 0.5
        product = (exact(x) * exact(g)).sum()
        assert abs(exact(value) + conjugate(y, k.item()) - product) <= 1e-13 * (product + 1e-300)
        z = d.sqrt() * x.detach().norm(dim=1)
        if in_k:
            knee = (-2 * in_k).sqrt()
            shares = (z / knee).clamp(max=1).sum()
            torch.testing.assert_close(shares, k.detach(), rtol=1e-12, atol=0)
        else:
            assert int((z > 0).sum()) <= k


def test_moreau_envelope() -> None:
    """The gradient of min_x |x - v|^2 / 2 + lam S(x) in v is v less the operator's result."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(15, 3, dtype=torch.float64, generator=generator).requires_grad_()
    for k in (0.7, 3, 8.5):
        for debiased in (False, True):
            x = fusee.prox_group_envelope(v, k, 0.4, debiased=debiased)
            value = (x - v).square().sum() / 2
            value = value + 0.4 * fusee.group_envelope(x, k, debiased=debiased)
            (gradient,) = torch.autograd.grad(value, v)
            torch.testing.assert_close(gradient, (v - x).detach(), rtol=1e-12, atol=1e-12)


def test_more_free_groups_cost_less() -> None:
    x = torch.randn(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    costs = [fusee.group_envelope(x, k / 4).item() for k in range(1, 90)]
    assert all(after <= before for before, after in pairwise(costs))
    assert costs[-1] == pytest.approx(float(x.square().sum()) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes(dtype: torch.dtype) -> None:
    """In float32 the squares of the norms may leave its range."""
    info = torch.finfo(dtype)
    x = torch.tensor([[3.0, 4.0], [0.6, 0.8], [0.0, 1.0]], dtype=dtype)
    for factor in (math.sqrt(info.max) / 64, math.sqrt(info.tiny) * 64):
        factor = 2.0 ** round(math.log2(factor))
        actual = fusee.group_envelope(x * factor, 2).item() / factor**2
        assert actual == pytest.approx(fusee.group_envelope(x, 2).item(), rel=1e-5)
    huge = torch.full((4,), info.max / 4, dtype=dtype).requires_grad_()
    gradient = torch.autograd.grad(fusee.group_envelope(huge, 2), huge)[0]
    assert bool(gradient.isfinite().all())


def test_nan_and_infinity() -> None:
    x = torch.tensor([1.0, math.nan, 2.0])
    assert math.isnan(fusee.group_envelope(x, 1).item())
    x[1] = math.inf
    assert fusee.group_envelope(x, 1).item() == math.inf
