"""The weight compander over the whole line: accuracy, range, half types; layouts; drawn at random."""

from __future__ import annotations

import math
from typing import Any

import fusee
import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.harness.measure import same_bits, ulps
from tests.harness.spec import ALL_DTYPES
from tests.reparam.curves import KINDS, LIMITS, exact, float32_ulps, oracle, whole_line

EMULATED = fusee.engine() == "emulated"
COUNT = 1 << (13 if EMULATED else 20)
BEST = ("arctan", "tanh", "softsign", "asinh")
"""The kinds within 2.5 units of the last place; the others are within 4."""
FAR, NEAR = 2.0**60, 2.0**-60
PAIRS = [(1.0, 1.0), (1.7, 0.3), (0.3, 1.7), (1e3, 1e-3), (1e-3, 1e3)]
PAIRS += [(FAR, NEAR), (NEAR, FAR), (FAR, FAR), (NEAR, NEAR)]
POWERS = [(1.0, 0.5), (1.3, 2.0), (0.7, 2.5), (1.0, 5.0), (3.0, 40.0), (1e-3, 0.01)]


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


def single(number: float) -> float:
    """The number as float32 has it."""
    return float(np.float32(number))


def halves(dtype: torch.dtype) -> Tensor:
    """Every number of a half type, infinities and NaN too."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


# --- accuracy -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "a", "b"),
    [(kind, *pair) for kind in KINDS for pair in PAIRS]
    + [("powerprop", *pair) for pair in POWERS]
    + [("mu_law", a, mu) for a in (1.0, 0.02) for mu in (15.0, 255.0)],
)
def test_accuracy_over_the_whole_line(kind: str, a: float, b: float) -> None:
    """Every element within the units of its own last place that the documentation states."""
    a, b = single(a), single(b)
    centre = {"powerprop": 1.0, "mu_law": a / b}.get(kind, b)
    v = whole_line(COUNT, centre)
    error = float32_ulps(fusee.compand(v, a, b, kind), exact(v, a, b, kind))
    worst = int(error.argmax())
    assert error[worst] <= (2.5 if kind in BEST else 4.0), f"v = {v[worst].item()!r}"


@pytest.mark.parametrize("kind", KINDS)
def test_accuracy_with_parameters_at_random(kind: str) -> None:
    """Parameters of channels, of every exponent between 2^-60 and 2^60."""
    channels, each = (64, 64) if EMULATED else (512, 1024)
    draw = np.random.default_rng(1)
    a, b = np.exp2(draw.uniform(-60, 60, (2, channels, 1))).astype(np.float32)
    if kind == "powerprop":
        b = np.exp2(draw.uniform(-8, 6, (channels, 1))).astype(np.float32)
    v = whole_line(channels * each)[: channels * each].reshape(channels, each)
    parameters = [torch.from_numpy(p[:, 0]) for p in (a, b)]
    actual = fusee.compand(v, *parameters, kind)
    assert float32_ulps(actual, exact(v, a, b, kind)).max() <= (2.5 if kind in BEST else 4.0)


@pytest.mark.parametrize("kind", KINDS)
def test_float64_against_fifty_digits(kind: str) -> None:
    curves: dict[str, Any] = {
        "arctan": lambda n, a, b: a * mpmath.atan(n / b),
        "tanh": lambda n, a, b: a * mpmath.tanh(n / b),
        "softsign": lambda n, a, b: a * n / (b + n),
        "asinh": lambda n, a, b: a * mpmath.asinh(n / b),
        "symlog": lambda n, a, b: a * mpmath.log1p(n / b),
        "mu_law": lambda n, a, b: a * mpmath.log1p(b * n / a) / mpmath.log1p(b),
        "powerprop": lambda n, a, b: a * n**b,
    }
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(200, dtype=torch.float64, generator=generator)
    v *= torch.exp2(torch.linspace(-40, 40, 200, dtype=torch.float64))
    for a, b in ((1.0, 1.0), (1.7, 0.3), (0.02, 4.0)):
        for value, w in zip(v.tolist(), fusee.compand(v, a, b, kind).tolist(), strict=True):
            with mpmath.workdps(50):
                wanted = math.copysign(1, value) * curves[kind](
                    *map(mpmath.mpf, (abs(value), a, b))
                )
                assert abs(w - wanted) <= 8 * math.ulp(float(wanted)), (value, a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (1.7, 0.3), (0.02, 2.5)])
def test_halves_are_rounded_once(dtype: torch.dtype, kind: str, a: float, b: float) -> None:
    """Every number of a half type gives what float32 gives, rounded."""
    v = halves(dtype)
    actual = fusee.compand(v, a, b, kind)
    expected = fusee.compand(v.float(), a, b, kind).to(dtype)
    assert same_bits(actual.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(actual.isnan(), v.isnan())


@pytest.mark.parametrize("kind", KINDS)
def test_infinity_and_nan(kind: str) -> None:
    """The limits of the curve at its ends, in every dtype; NaN stays where it is."""
    ends = {kind: 2.5 * limit for kind, limit in LIMITS.items()}
    for dtype in ALL_DTYPES:
        v = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0], dtype=dtype)
        w = fusee.compand(v, 2.5, 0.5, kind)
        end = torch.tensor(ends.get(kind, math.inf), dtype=dtype)
        step = torch.finfo(dtype).eps * float(end) if kind in LIMITS else 0.0
        assert w[0] == end or end - step <= w[0] <= end
        assert w[1] == -w[0]
        assert torch.equal(w.isnan(), v.isnan())
        assert w[3] == 0 and w[4] == 0


# --- range ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LIMITS)
def test_range_is_never_exceeded_in_float32(kind: str) -> None:
    """Not by a last place, for any ``a``: the products are exact enough in float64 to tell."""
    channels = 1 << (11 if EMULATED else 18)
    draw = np.random.default_rng(2)
    a = torch.from_numpy(np.exp2(draw.uniform(-60, 60, channels)).astype(np.float32))
    top = torch.finfo(torch.float32).max
    v = torch.tensor([math.inf, -math.inf, top, -top, 1e30, 1e12, 3e7, 1e4]).repeat(channels, 1)
    w = fusee.compand(v, a, 1.0, kind)
    assert bool((w.double().abs() <= a.double()[:, None] * LIMITS[kind]).all())


@pytest.mark.parametrize("kind", LIMITS)
def test_range_is_never_exceeded_in_float64(kind: str) -> None:
    draw = np.random.default_rng(3)
    a = np.exp2(draw.uniform(-60, 60, 2000))
    top = torch.finfo(torch.float64).max
    v = torch.tensor([math.inf, -top, 1e30, 1e17], dtype=torch.float64).repeat(len(a), 1)
    largest = fusee.compand(v, torch.from_numpy(a), 1.0, kind).abs().amax(1)
    with mpmath.workdps(50):
        limit = mpmath.pi / 2 if kind == "arctan" else mpmath.mpf(1)
        for each, w in zip(a.tolist(), largest.tolist(), strict=True):
            assert mpmath.mpf(w) <= mpmath.mpf(each) * limit


@pytest.mark.parametrize("mu", [0.5, 15.0, 255.0])
def test_mu_law_maps_its_interval_onto_itself(mu: float) -> None:
    """Where ``|v| <= a``, so is ``|w|``, and the ends stay where they are."""
    draw = np.random.default_rng(4)
    a = torch.from_numpy(np.exp2(draw.uniform(-20, 20, 4000)).astype(np.float32))
    v = a[:, None] * torch.tensor([1.0, -1.0, 1 - 2.0**-24, 1 - 2.0**-23, 0.5])
    w = fusee.compand(v, a, mu, "mu_law")
    assert bool((w.abs() <= a[:, None]).all())
    torch.testing.assert_close(w[:, 0], a, rtol=5e-7, atol=0)


def test_numbers_of_the_specification() -> None:
    """The slope at zero, the fixed points beyond which weights shrink, the identity of powers of one."""
    a = torch.tensor([1.05, 1.1, 1.25, 1.5, 2.0, 3.0], dtype=torch.float64)
    fixed = torch.tensor([0.395, 0.569, 0.949, 1.451, 2.331, 3.973], dtype=torch.float64)
    w = fusee.compand(fixed, a, 1.0)
    torch.testing.assert_close(w, fixed, rtol=1e-3, atol=0)
    assert bool((fusee.compand(fixed * 0.9, a, 1.0) > fixed * 0.9).all())
    assert bool((fusee.compand(fixed * 1.1, a, 1.0) < fixed * 1.1).all())
    slopes = {"mu_law": 15 / math.log(16), "powerprop": 0.0}
    for kind in KINDS:
        v = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(fusee.compand(v, 2.0, 15.0, kind), v)
        assert slope.item() == pytest.approx(slopes.get(kind, 2 / 15), rel=1e-12)
    v = torch.randn(100)
    assert torch.equal(fusee.compand(v, 1.0, 1.0, "powerprop"), v)


# --- parameters and layouts -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_ways_to_give_the_parameters(dtype: torch.dtype, kind: str) -> None:
    """A number, a tensor of any floating dtype, one for each channel: the same bits."""
    v = torch.randn(5, 7, dtype=dtype)
    expected = fusee.compand(v, 1.5, 0.75, kind)
    for other in ALL_DTYPES:
        a, b = torch.tensor(1.5, dtype=other), torch.tensor([0.75], dtype=other)
        assert same_bits(fusee.compand(v, a, b, kind), expected)
        assert same_bits(fusee.compand(v, a.expand(5), 0.75, kind), expected)
        assert same_bits(fusee.compand(v, 1.5, b.expand(5), kind), expected)
    assert same_bits(fusee.compand(v, torch.nn.Parameter(torch.tensor(1.5)), 0.75, kind), expected)


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("value", [1e-50, 1e50])
def test_parameters_that_float32_cannot_hold(name: str, value: float) -> None:
    """They would become zero or infinite in the dtype of the computation, and all weights NaN."""
    v, given = torch.randn(4), {"a": 1.0, "b": 1.0}
    for parameter in (value, torch.tensor(value, dtype=torch.float64)):
        with pytest.raises(ValueError, match=f"{name} must be positive and finite"):
            fusee.compand(v, **{**given, name: parameter})
        assert fusee.compand(v.double(), **{**given, name: parameter}).isfinite().all()


LAYOUTS = {
    "contiguous": lambda t: t.clone(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "channels innermost": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "reversed": lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_are_kept(layout: str, channels: bool, dtype: torch.dtype) -> None:
    """Dense results and gradients have the strides of the weights, and the same bits as contiguous
    ones: each channel its own parameters, wherever it lies."""
    plain = torch.randn(6, 4, 3, 5, dtype=dtype)
    grad = torch.rand(6, 4, 3, 5, dtype=dtype).copysign(plain)  # so that sums do not cancel
    a = torch.linspace(0.5, 2.0, 6) if channels else torch.tensor([1.5])
    b = torch.linspace(2.0, 0.5, 6) if channels else torch.tensor([0.5])
    results = []
    for v in (plain, LAYOUTS[layout](plain)):
        leaves = [t.detach().requires_grad_() for t in (v, a, b)]
        w = fusee.compand(*leaves, "asinh")
        grads = torch.autograd.grad(w, leaves, grad)
        assert w.stride() == v.stride() == grads[0].stride()
        results.append((w, *grads))
    for one, other in zip(*results, strict=True):
        assert ulps(other, one) <= 8
    for place in (0, 1):
        assert same_bits(results[1][place].contiguous(), results[0][place])


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_gaps_and_repeats(dim: int) -> None:
    """Views with gaps, of one element repeated, and of odd offsets."""
    wide = torch.randn(8, 10, 12)
    a = torch.linspace(0.5, 2.0, 8)
    for v in (
        wide[:, 1::2, 3:],
        wide.narrow(dim, 0, 1).expand(8, 10, 12),
        wide[:, :, 5],
        wide[:, 2, 1:],
    ):
        assert same_bits(fusee.compand(v, a, 0.5), fusee.compand(v.contiguous(), a, 0.5))


def test_memory_for_backward() -> None:
    """The weights and the parameters are kept, and nothing else."""
    v = torch.randn(64, 100, requires_grad=True)
    a = torch.ones(64, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert fusee.compand(v, a, 0.5).requires_grad
    kept.pop(v.untyped_storage().data_ptr(), None)
    assert sum(kept.values()) <= 2 * 4 * 64


# --- drawn at random ------------------------------------------------------------------------------

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
POSITIVE = st.floats(2.0**-20, 2.0**20, width=32)


@settings(max_examples=60, deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=40), POSITIVE, POSITIVE, st.sampled_from(KINDS[:-1]))
def test_any_weights(values: list[float], a: float, b: float, kind: str) -> None:
    """Any finite weights: odd, in order, and where they should be."""
    v = torch.tensor(values)
    w = fusee.compand(v, a, b, kind)
    assert float32_ulps(w, exact(v, a, b, kind)).max() <= (2.5 if kind in BEST else 4.0)
    assert torch.equal(fusee.compand(-v, a, b, kind), -w)
    ordered = w[v.argsort()].double()
    assert bool((ordered.diff() >= -1e-6 * ordered[1:].abs()).all())


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 6), max_size=4),
    data=st.data(),
    dtype=st.sampled_from(ALL_DTYPES),
    kind=st.sampled_from(KINDS),
)
def test_any_shape(shape: list[int], data: st.DataObject, dtype: torch.dtype, kind: str) -> None:
    """Any shape, order of dimensions in memory, step between elements, and shape of parameters."""
    order = data.draw(st.permutations(range(len(shape))))
    step = data.draw(st.integers(1, 2))
    stored = torch.randn([shape[i] for i in order] + [step], dtype=dtype)[..., 0]
    v = stored.permute([order.index(i) for i in range(len(shape))])
    channels = shape[0] if shape else 1
    sizes = [data.draw(st.sampled_from(((), (1,), (channels,)))) for _ in range(2)]
    a, b = (torch.rand(size, dtype=dtype) + 0.5 for size in sizes)
    actual = fusee.compand(v, a, b, kind)
    expected = oracle(v.double(), a.double(), b.double(), kind)
    assert actual.shape == v.shape and actual.dtype == dtype
    assert ulps(actual, expected.to(dtype), 1e-3) <= 8
