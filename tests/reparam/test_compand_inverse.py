"""The inverse of the weight compander: there and back over the range, its ends, its program."""

from __future__ import annotations

import math

import fusee
import mpmath
import pytest
import torch
from torch import Tensor

from tests.harness.measure import relative_error, same_bits, ulps
from tests.harness.spec import ALL_DTYPES
from tests.reparam.curves import KINDS, LIMITS


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


def spread_over_the_range(kind: str, a: float, dtype: torch.dtype) -> Tensor:
    """From a thousandth of the limit to nearly all of it, as near as half types can tell."""
    nearly = 0.98 if dtype in (torch.bfloat16, torch.float16) else 0.999
    most = nearly * LIMITS.get(kind, 3.0) * a
    sizes = torch.logspace(math.log10(most) - 3, math.log10(most), 200, dtype=torch.float64)
    return torch.cat([sizes, -sizes, torch.zeros(1)]).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (1.7, 0.3), (0.05, 2.0)])
def test_there_and_back(kind: str, dtype: torch.dtype, a: float, b: float) -> None:
    """The curve of the inverse is what was given, to a few units of the last place of each weight."""
    w = spread_over_the_range(kind, a, dtype)
    v = fusee.compand_inverse(w, a, b, kind)
    assert v.dtype == dtype and v.shape == w.shape
    again = fusee.compand(v, a, b, kind)
    steep = max(1.0, b) if kind == "powerprop" else 1.0
    worst = 8 * steep * torch.finfo(dtype).eps
    normal = (w == 0) | (v.abs() >= torch.finfo(dtype).smallest_normal)  # others have fewer digits
    assert normal.sum() > 200
    torch.testing.assert_close(again[normal], w[normal], rtol=worst, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_back_and_there(kind: str) -> None:
    """Weights that are not saturated are found again; in float64 nearly saturated ones too."""
    v = torch.linspace(-2, 2, 101)
    w = fusee.compand(v, 1.7, 0.6, kind)
    again = fusee.compand_inverse(w, 1.7, 0.6, kind)
    torch.testing.assert_close(again, v, rtol=1e-5 if kind != "tanh" else 1e-3, atol=1e-6)
    double = fusee.compand(v.double() * 10, 1.7, 1.0, kind)
    if kind != "tanh":
        again = fusee.compand_inverse(double, 1.7, 1.0, kind)
        torch.testing.assert_close(again, v.double() * 10, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounded_once(kind: str, dtype: torch.dtype) -> None:
    """What float64 gives, rounded."""
    w = spread_over_the_range(kind, 1.5, dtype)
    a, b = 1.5, 0.75
    expected = fusee.compand_inverse(w.double(), a, b, kind).to(dtype)
    assert same_bits(fusee.compand_inverse(w, a, b, kind), expected)


def test_ill_conditioned_near_the_limit() -> None:
    """The figures of the documentation: at 99.9 % of a pi / 2, v is 637 b, and the slope 2.5e-6."""
    w = torch.tensor([0.9, 0.99, 0.999], dtype=torch.float64) * math.pi / 2
    v = fusee.compand_inverse(w, 1.0, 1.0).requires_grad_()
    torch.testing.assert_close(v, torch.tensor([6.314, 63.66, 636.6]).double(), rtol=1e-3, atol=0)
    (slope,) = torch.autograd.grad(fusee.compand(v, 1.0, 1.0).sum(), v)
    torch.testing.assert_close(
        slope, torch.tensor([2.45e-2, 2.47e-4, 2.47e-6]).double(), rtol=1e-2, atol=0
    )


@pytest.mark.parametrize("kind", LIMITS)
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_ends_of_the_range(kind: str, dtype: torch.dtype) -> None:
    """The largest number inside has a finite inverse; what float64 has for the limit raises."""
    limit = torch.tensor(LIMITS[kind], dtype=torch.float64)
    inside = limit.to(dtype)
    with mpmath.workdps(30):
        exact = mpmath.pi / 2 if kind == "arctan" else mpmath.mpf(1)
        while mpmath.mpf(inside.double().item()) >= exact or inside.double() == limit:
            inside = torch.nextafter(inside, torch.zeros_like(inside))
    v = fusee.compand_inverse(torch.stack([inside, -inside]), 1.0, 0.5, kind)
    assert v.isfinite().all() or dtype == torch.float16
    assert v[0] > 0 and v[1] == -v[0]
    outside = torch.nextafter(inside, torch.full_like(inside, 9.0))
    with pytest.raises(ValueError, match="output must be inside"):
        fusee.compand_inverse(outside, 1.0, 0.5, kind)


def test_the_message_names_the_weight() -> None:
    w = torch.tensor([[0.5, 0.25], [-3.5, 0.0]])
    with pytest.raises(ValueError, match=r"\(-1 a, 1 a\), the range of 'tanh', got -3.5"):
        fusee.compand_inverse(w, 2.0, 1.0, "tanh")
    with pytest.raises(ValueError, match=r"got 0\.5"):
        fusee.compand_inverse(w[:1], torch.tensor([0.4]), 1.0, "softsign")


def test_results_of_the_curve_are_in_its_range() -> None:
    """Saturated weights of arctan, which never leaves its interval in float32, may be inverted."""
    v = torch.tensor([1e3, -1e6, 1e30])
    for a in (0.3, 1.0, 1.7, 123.4):
        w = fusee.compand(v, a, 0.5)
        again = fusee.compand(fusee.compand_inverse(w, a, 0.5), a, 0.5)
        assert ulps(again, w) <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_infinity_where_the_range_has_no_end(kind: str) -> None:
    w = torch.tensor([math.inf, -math.inf])
    if kind in LIMITS:
        with pytest.raises(ValueError, match="output must be inside"):
            fusee.compand_inverse(w, 1.0, 0.5, kind)
    else:
        assert torch.equal(fusee.compand_inverse(w, 1.0, 0.5, kind), w)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_inverse_function(kind: str) -> None:
    """dv / dw = 1 / (dw / dv), and the gradients in a and b from the implicit function."""
    v = torch.linspace(0.2, 1.5, 9, dtype=torch.float64)
    a, b = (torch.tensor([x], dtype=torch.float64).requires_grad_() for x in (1.7, 0.6))
    there = v.clone().requires_grad_()
    w = fusee.compand(there, a, b, kind)
    for place in range(9):
        forward = torch.autograd.grad(w[place], (there, a, b), retain_graph=True)
        leaf = w.detach()[place : place + 1].requires_grad_()
        backward = torch.autograd.grad(fusee.compand_inverse(leaf, a, b, kind), (leaf, a, b))
        slope = forward[0][place]
        assert relative_error(backward[0], 1 / slope.reshape(1)) <= 1e-11
        for one, other in zip(backward[1:], forward[1:], strict=True):
            assert relative_error(one, -other / slope) <= 1e-11


@pytest.mark.tracing
@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool) -> None:
    """Every kind exports, to a program of torch's operators."""

    class Module(torch.nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.kind = kind

        def forward(self, w: Tensor, a: Tensor) -> Tensor:
            return fusee.compand_inverse(w, a, 0.5, self.kind)

    w, a = torch.rand(4, 3) - 0.5, torch.ones(4)
    for kind in KINDS:
        program = torch.export.export(Module(kind), (w, a), strict=strict)
        assert ulps(program.module()(w, a), Module(kind)(w, a)) <= 2
