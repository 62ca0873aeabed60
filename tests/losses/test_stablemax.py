"""StableMax and its logarithm: the mathematics, the traps of eager code, the extremes."""

from __future__ import annotations

import math
from typing import Any

import fusee
import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.harness.measure import same_bits, ulps
from tests.harness.spec import ALL_DTYPES
from tests.losses.record_stablemax import symlog

HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


def exact(values: list[float]) -> list[mpmath.mpf]:
    """StableMax of a row, in fifty digits."""
    with mpmath.workdps(50):
        s = [1 + mpmath.mpf(x) if x >= 0 else 1 / (1 - mpmath.mpf(x)) for x in values]
        total = mpmath.fsum(s)
        return [term / total for term in s]


def gradient(function: Any, input: Tensor, grad: Tensor) -> Tensor:
    leaf = input.detach().requires_grad_()
    (result,) = torch.autograd.grad(function(leaf), leaf, grad)
    return result


# --- the mathematics ------------------------------------------------------------------------------


def test_against_fifty_digits() -> None:
    """Each element is right to a few units of its own last place, over the whole range of
    float32."""
    row = [0.0, -0.0, 1.0, -1.0, 1e-30, -1e-30, 1e-45, 3e38, -3e38, 1e10, -1e10, 0.5, 7.25]
    output = fusee.stablemax(torch.tensor(row))
    single = [float(x) for x in torch.tensor(row)]
    for value, wanted in zip(output.tolist(), exact(single), strict=True):
        spacing = max(float(wanted) * torch.finfo(torch.float32).eps, 1.5e-45)
        assert abs(value - float(wanted)) <= 4 * spacing


def test_logarithm_against_fifty_digits() -> None:
    row = [0.0, 1.0, -1.0, 3e38, -3e38, 1e10, -1e10, 0.5]
    output = fusee.log_stablemax(torch.tensor(row))
    single = [float(x) for x in torch.tensor(row)]
    for value, wanted in zip(output.tolist(), map(mpmath.log, exact(single)), strict=True):
        assert value == pytest.approx(float(wanted), rel=4e-7, abs=4e-7)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_softmax_of_symlog(dtype: torch.dtype) -> None:
    """StableMax(x) = softmax(symlog(x)), and the logarithm likewise."""
    x = torch.randn(5, 40, dtype=dtype) * 3
    double = symlog(x.double())
    assert ulps(fusee.stablemax(x), double.softmax(-1).to(dtype)) <= 8
    assert ulps(fusee.log_stablemax(x), double.log_softmax(-1).to(dtype)) <= 8


def test_properties() -> None:
    """The largest stays the largest, it is uniform at zero, and s(-x) = 1 / s(x)."""
    x = torch.randn(50, 17) * 10
    assert torch.equal(fusee.stablemax(x).argmax(-1), x.argmax(-1))
    assert torch.equal(fusee.log_stablemax(x).argmax(-1), x.argmax(-1))
    uniform = fusee.stablemax(torch.zeros(3, 8))
    assert torch.equal(uniform, torch.full((3, 8), 0.125))
    pair = torch.stack([x, torch.zeros_like(x)], -1)
    there, back = fusee.stablemax(pair), fusee.stablemax(-pair)
    odds = (there[..., 0] / there[..., 1]) * (back[..., 0] / back[..., 1])
    torch.testing.assert_close(odds, torch.ones_like(odds))


def test_not_shift_invariant() -> None:
    """Unlike softmax, a constant added to a row changes the result."""
    x = torch.tensor([1.0, 2.0, -1.0])
    assert (fusee.stablemax(x) - fusee.stablemax(x + 1)).abs().max() > 0.01


def test_heavy_tails() -> None:
    """A finite mask keeps its mass: 1e5 entries of -1e4 weigh as much as ten zeros."""
    x = torch.full((100_001,), -1e4)
    x[0] = 0.0
    assert fusee.stablemax(x)[0].item() == pytest.approx(1 / (1 + 1e5 / 10001), rel=1e-5)


# --- traps of eager code (spec 1.5) ---------------------------------------------------------------


@pytest.mark.parametrize("function", [fusee.stablemax, fusee.log_stablemax])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("value", [1.0, 0.0, -0.0, -1.0])
def test_gradient_at_the_kinks(function: Any, dtype: torch.dtype, value: float) -> None:
    """At x = 1 eager code gives NaN, and at x = 0 its one-line form gives zero."""
    x = torch.tensor([[value, 0.5, -0.25, value]], dtype=dtype)
    grad = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=dtype)
    actual = gradient(function, x, grad)
    double = x.double()
    near = gradient(function, double, grad.double())
    assert bool(actual.isfinite().all())
    assert actual[0, 0] != 0
    torch.testing.assert_close(actual.double(), near, rtol=2e-2, atol=1e-3)
    step = torch.zeros_like(double)
    step[0, 0] = 1e-6
    slope = (function(double + step) - function(double - step))[0, 0] / 2e-6
    assert near[0, 0].item() == pytest.approx(slope.item(), rel=1e-5)


@pytest.mark.parametrize(("dtype", "classes"), [(torch.float16, 70_000), (torch.bfloat16, 131_072)])
def test_row_sums_do_not_overflow(dtype: torch.dtype, classes: int) -> None:
    """float16 cannot hold 65505 ones, and bfloat16 cannot count beyond 256."""
    x = torch.zeros(2, classes, dtype=dtype)
    output = fusee.log_stablemax(x)
    torch.testing.assert_close(output, torch.full_like(output, -math.log(classes)))
    p = fusee.stablemax(x)
    torch.testing.assert_close(p, torch.full_like(p, 1 / classes))


def test_memory_for_backward() -> None:
    """Beside the input, 8 bytes a row are kept."""
    x = torch.randn(64, 100, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = fusee.stablemax(x)
    assert output.requires_grad
    kept.pop(x.untyped_storage().data_ptr(), None)
    assert sum(kept.values()) <= 16 * 64


# --- extremes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_largest_numbers(dtype: torch.dtype) -> None:
    """Rows of the largest finite numbers have finite results that sum to one, and finite
    gradients."""
    top = torch.finfo(dtype).max
    x = torch.tensor([[top, top, 0.0], [top, -top, 1.0], [-top, -top, -top]], dtype=dtype)
    p = fusee.stablemax(x)
    torch.testing.assert_close(p.double().sum(-1), torch.ones(3).double(), rtol=1e-2, atol=1e-2)
    log = fusee.log_stablemax(x)
    assert bool(log.isfinite().all())
    torch.testing.assert_close(log.double().exp(), p.double(), rtol=1e-1, atol=1e-2)
    for function in (fusee.stablemax, fusee.log_stablemax):
        assert bool(gradient(function, x, torch.ones_like(x)).isfinite().all())


def test_subnormal_numbers() -> None:
    x = torch.tensor([1e-40, -1e-40, 0.0])
    torch.testing.assert_close(fusee.stablemax(x), torch.full((3,), 1 / 3))


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_minus_infinity_is_a_mask(dtype: torch.dtype) -> None:
    """A class at -inf has probability zero and gradient zero, and the others are as without it."""
    x = torch.tensor([[1.0, -math.inf, -2.0, 0.5]], dtype=dtype)
    kept = x[:, [0, 2, 3]]
    for function in (fusee.stablemax, fusee.log_stablemax):
        assert ulps(function(x)[:, [0, 2, 3]], function(kept)) <= 1
    assert fusee.stablemax(x)[0, 1] == 0
    assert fusee.log_stablemax(x)[0, 1] == -math.inf
    grad = gradient(fusee.stablemax, x, torch.ones_like(x).cumsum(-1))
    assert grad[0, 1] == 0
    assert bool(grad.isfinite().all())


def test_infinity() -> None:
    """All mass goes to +inf, or NaN says that nothing is known; all -inf is NaN."""
    p = fusee.stablemax(torch.tensor([math.inf, 1.0, -1.0]))
    assert bool(((p == torch.tensor([1.0, 0, 0])) | p.isnan()).all())
    assert bool(fusee.stablemax(torch.tensor([math.inf, math.inf]))[0].isnan())
    assert bool(fusee.stablemax(torch.full((3,), -math.inf)).isnan().all())


# --- as a neighbour of torch ----------------------------------------------------------------------


def test_dtype_argument() -> None:
    """``dtype`` casts the input first, as in softmax."""
    x = torch.randn(3, 5, dtype=torch.bfloat16, requires_grad=True)
    output = fusee.stablemax(x, -1, torch.float32)
    assert same_bits(output, fusee.stablemax(x.float()))
    output.square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("module", "function"),
    [(fusee.nn.StableMax, fusee.stablemax), (fusee.nn.LogStableMax, fusee.log_stablemax)],
)
def test_modules(module: Any, function: Any) -> None:
    x = torch.randn(2, 5, 3)
    made = module(dim=1)
    assert torch.equal(made(x), function(x, 1))
    assert repr(made) == f"{module.__name__}(dim=1)"
    assert not made.state_dict()
    assert torch.equal(module()(x), function(x))
    assert torch.jit.trace is not None and torch.equal(torch.nn.Sequential(made)(x), made(x))


# --- drawn at random ------------------------------------------------------------------------------

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=60, deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=40))
def test_any_row(row: list[float]) -> None:
    """Any finite float32 row: positive or underflowed, at most one, summing to one, in order."""
    x = torch.tensor(row)
    p = fusee.stablemax(x)
    assert bool(((p >= 0) & (p <= 1)).all())
    assert abs(p.double().sum().item() - 1) <= 4e-7 * max(1, math.sqrt(len(row)))
    order = x.argsort()
    assert bool((p[order].diff() >= 0).all())
    assert bool((fusee.log_stablemax(x) <= 0).all())


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    data=st.data(),
    dtype=st.sampled_from(ALL_DTYPES),
)
def test_any_shape(shape: list[int], data: st.DataObject, dtype: torch.dtype) -> None:
    """Any shape, dimension, and order of dimensions in memory."""
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    order = data.draw(st.permutations(range(len(shape))))
    x = torch.randn(shape, dtype=dtype)
    stored = x.permute(order).contiguous().permute([order.index(i) for i in range(len(shape))])
    for function in (fusee.stablemax, fusee.log_stablemax):
        assert ulps(function(stored, dim), function(x, dim), 1.0) <= 4
