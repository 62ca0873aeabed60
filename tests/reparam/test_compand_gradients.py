"""Gradients of the weight compander: over the whole line, at zero and infinity, and of sums."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import fusee
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.harness.measure import relative_error
from tests.harness.spec import ALL_DTYPES
from tests.reparam.curves import KINDS, oracle, whole_line

EMULATED = fusee.engine() == "emulated"
PAIRS = [(1.0, 1.0), (1.7, 0.3), (0.02, 0.5), (1e3, 1e-3), (1e-3, 1e3)]


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


def gradients(
    v: Tensor, a: Tensor, b: Tensor, kind: str, sent: Tensor, function: Any = fusee.compand
) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in (v, a, b)]
    return torch.autograd.grad(function(*leaves, kind), leaves, sent)


def one(number: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor([number], dtype=dtype)


# --- the gradient in the weights ------------------------------------------------------------------


def slope(n: Any, a: float, b: float, kind: str) -> Any:
    """The derivative in float64, for n >= 0; infinity included."""
    t = n / b
    with np.errstate(all="ignore"):
        slopes: dict[str, Callable[[], Any]] = {
            "arctan": lambda: a / b / (1 + t * t),
            "tanh": lambda: a / b / np.cosh(np.minimum(t, 300)) ** 2,
            "softsign": lambda: a / b / (1 + t) ** 2,
            "asinh": lambda: a / b / np.hypot(1, t),
            "symlog": lambda: a / b / (1 + t),
            "mu_law": lambda: b / np.log1p(b) / (1 + b * n / a),
            "powerprop": lambda: a * b * np.power(n, b - 1),
        }
        return slopes[kind]()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_input_gradient_over_the_whole_line(kind: str, a: float, b: float) -> None:
    """Each element right to 1e-6 of itself however far out, until its ratio to the slope at zero is
    subnormal; powers to 4e-6, which is what rounding the exponent b - 1 takes from the largest."""
    a, b = float(np.float32(a)), float(np.float32(min(b, 5.0) if kind == "powerprop" else b))
    v = whole_line(1 << (12 if EMULATED else 18), a / b if kind == "mu_law" else b)
    actual = gradients(v, one(a), one(b), kind, torch.ones_like(v))[0].double().numpy()
    assert not np.isnan(actual).any()
    wanted = slope(np.abs(v.numpy().astype(np.float64)), a, b, kind)
    top = 2.0**127
    compared = (wanted < top) | (actual < top)  # the others have overflowed, or nearly
    if kind == "powerprop":
        with np.errstate(over="ignore", divide="ignore"):
            compared &= np.abs(v.numpy().astype(np.float64)) ** (b - 1) < top
    actual, wanted = actual[compared].clip(max=2 * top), wanted[compared].clip(max=2 * top)
    at_zero = 1.0 if kind == "powerprop" else float(slope(np.float64(0), a, b, kind))
    relative = 4e-6 if kind == "powerprop" else 1e-6
    excess = np.abs(actual - wanted) / (relative * wanted + 2.0**-126 * max(1.0, at_zero))
    worst = int(excess.argmax())
    where = v[torch.from_numpy(compared)][worst].item()
    assert excess[worst] <= 1, f"v = {where!r}: {actual[worst]!r}, not {wanted[worst]!r}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_gradients_at_infinity_and_at_the_largest_numbers(kind: str, dtype: torch.dtype) -> None:
    """A saturated weight has gradient zero; nothing becomes NaN."""
    top = torch.finfo(dtype).max
    for value in (math.inf, -math.inf, top, -top):
        v, sent = torch.tensor([value], dtype=dtype), torch.ones(1, dtype=dtype)
        of_input, of_a, of_b = gradients(v, one(1.5), one(0.5), kind, sent)
        assert not any(t.isnan().any() for t in (of_input, of_a, of_b))
        if math.isinf(value):
            assert of_input == 0
        limit = {"arctan": math.pi / 2, "tanh": 1.0, "softsign": 1.0}.get(kind)
        if limit is not None:
            assert of_a.item() == pytest.approx(math.copysign(limit, value), rel=1e-2)
            assert abs(of_b.item()) <= 1e-3


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_powers_at_zero(dtype: torch.dtype) -> None:
    """The eager form gives NaN where 1 < b < 2; the derivative there is zero."""
    for zero in (0.0, -0.0):
        v, sent = torch.tensor([zero, 1.0], dtype=dtype), torch.ones(2, dtype=dtype)
        for b, expected in ((1.5, 0.0), (1.01, 0.0), (2.0, 0.0), (5.0, 0.0), (1.0, 3.0)):
            of_input, of_a, of_b = gradients(v, one(3.0), one(b), "powerprop", sent)
            assert of_input[0] == expected
            assert of_a == 1 and of_b == 0
        of_input, of_a, of_b = gradients(v, one(3.0), one(0.5), "powerprop", sent)
        assert of_input[0] == math.inf
        assert of_a == 1 and of_b == 0


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_at_zero_are_those_from_above(kind: str) -> None:
    """Eager code with ``sign`` and ``abs`` has derivative zero there: zero weights never move."""
    b = 1.0 if kind == "powerprop" else 0.5
    for zero in (0.0, -0.0):
        of_input, of_a, of_b = gradients(
            torch.tensor([zero]), one(1.5), one(b), kind, torch.ones(1)
        )
        wanted = {"mu_law": b / math.log1p(b), "powerprop": 1.5}.get(kind, 3.0)
        assert of_input.item() == pytest.approx(wanted, rel=1e-6)
        assert of_a == 0 and of_b == 0


@pytest.mark.parametrize("kind", KINDS)
def test_subnormal_weights(kind: str) -> None:
    v = torch.tensor([1e-45, -1e-45, 1e-40, 1.1e-38])
    actual = gradients(v, one(1.5), one(1.0), kind, torch.ones(4))[0]
    wanted = 1 / math.log(2) if kind == "mu_law" else 1.5
    torch.testing.assert_close(actual, torch.full((4,), wanted), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_reaches_the_gradients_of_its_channel(kind: str) -> None:
    v, a, b = torch.rand(3, 40), torch.full((3,), 1.5), torch.full((3,), 0.5)
    v[1, 7] = math.nan
    of_input, of_a, of_b = gradients(v, a, b, kind, torch.ones(3, 40))
    assert torch.equal(of_input.isnan(), v.isnan())
    for each in (of_a, of_b):
        assert each.isnan().tolist() == [False, True, False]


# --- sums -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1 << 20,), (8, 1 << 17), (1 << 14, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_many_elements(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The gradients of a and b of a million weights, to 1e-6: a plain sum in float32 is not."""
    if EMULATED:
        shape = tuple(max(8, size >> 4) if size > 64 else size for size in shape)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(shape, generator=generator).to(dtype)
    sent = torch.rand(shape, generator=generator).to(dtype).copysign(v)
    for channels in (1, shape[0]):
        a = torch.linspace(2.0, 4.0, channels)
        b = torch.linspace(0.5, 1.5, channels) * (10 if kind == "mu_law" else 1)
        _, *actual = gradients(v, a, b, kind, sent)
        double = [t.double() for t in (v, a, b, sent)]
        _, *expected = gradients(*double[:3], kind, double[3], oracle)
        for name, one_, other in zip("ab", actual, expected, strict=True):
            assert one_.dtype == torch.float32
            assert relative_error(one_, other) <= 1e-6, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_where_weights_are_small(kind: str, dtype: torch.dtype) -> None:
    """Weights far below b, or a, where the curves are nearly straight."""
    generator = torch.Generator().manual_seed(0)
    v = (torch.randn(1000, generator=generator, dtype=torch.float64) * 1e-3).to(dtype)
    sent = torch.rand(1000, generator=generator, dtype=dtype).copysign(v)
    a, b = one(1.0, dtype), one(0.5, dtype)
    _, *actual = gradients(v, a, b, kind, sent)
    double = [t.double() for t in (v, a, b, sent)]
    _, *expected = gradients(*double[:3], kind, double[3], oracle)
    # The gradient in a of mu_law is the difference of two sums, a thousandth of each.
    bound = {"mu_law": 3e4}.get(kind, 16) * torch.finfo(dtype).eps
    for name, each, other in zip("ab", actual, expected, strict=True):
        assert relative_error(each, other) <= bound, name


def test_parameters_of_another_dtype() -> None:
    """Half weights with float32 parameters, as mixed precision has them: their gradients are float32,
    not rounded to the half type; float64 parameters get float64 gradients."""
    v = torch.randn(500, generator=torch.Generator().manual_seed(0)).bfloat16()
    sent = v.sign()
    for dtype in (torch.float32, torch.float64):
        of_input, of_a, of_b = gradients(v, one(1.5, dtype), one(0.5, dtype), "tanh", sent)
        assert (of_input.dtype, of_a.dtype, of_b.dtype) == (torch.bfloat16, dtype, dtype)
        expected = gradients(
            v.double(), one(1.5).double(), one(0.5).double(), "tanh", sent.double(), oracle
        )
        assert relative_error(of_a, expected[1]) <= 1e-6
        assert relative_error(of_b, expected[2]) <= 1e-6


def test_one_parameter_for_both() -> None:
    """A tensor that is a and b at once gets the sum of both gradients."""
    v, c = torch.randn(30).double(), one(1.5, torch.float64).requires_grad_()
    (both,) = torch.autograd.grad(fusee.compand(v, c, c, "asinh").sum(), c)
    _, of_a, of_b = gradients(v, c, c, "asinh", torch.ones_like(v))
    torch.testing.assert_close(both, of_a + of_b)
