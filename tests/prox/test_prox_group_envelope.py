"""The operator is optimal, by certificate; limits, identities, extremes."""

from __future__ import annotations

import math
from typing import Any

import fusee
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from tests.harness.measure import same_bits
from tests.harness.spec import ALL_DTYPES
from tests.prox.certificate import KINDS, gap, values

prox = fusee.prox_group_envelope
CASES = 20 if fusee.engine() == "emulated" else 250


def _cases(kind: str, seed: int = 0) -> Any:
    """Groups at random, with a k from near zero to past their number, and a lam over six decades."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    for case in range(CASES):
        m, size = int(uniform(1, 41)), int(uniform(1, 5))
        v = values(kind, generator, m, size)
        k = (0.3, 1.0, 1.7, m / 2, float(m // 2 + 1), float(m), m + 2.5)[case % 7]
        d = 10 ** (6 * torch.rand(m, dtype=torch.float64, generator=generator) - 3)
        yield v, k, 10 ** uniform(-3, 3), d


def _certify(v: Tensor, x: Tensor, k: float, lam: float, **others: Any) -> None:
    """The gap of the whole problem, for lam of any size, relative to its objective at zero; and relative
    to its own terms where lam does not magnify the rounding of x."""
    difference, size = gap(v, x, k, lam, **others)
    assert difference >= -1e-14 * size
    H = others.get("metric")
    H = 1.0 if H is None else H.reshape(len(v), -1)
    assert lam * difference <= 1e-13 * float((H * v * v).sum())
    weights = others.get("weights")
    if lam * (1.0 if weights is None else float(weights.min())) >= 0.1:
        assert difference <= 1e-13 * size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_certificate(kind: str, weighted: bool) -> None:
    for v, k, lam, d in _cases(kind):
        weights = d if weighted else None
        _certify(v, prox(v, k, lam, weights=weights), k, lam, weights=weights)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("debiased", [False, True])
def test_certificate_in_a_metric(kind: str, debiased: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    for v, k, lam, d in _cases(kind, seed=1):
        H = 10 ** (4 * torch.rand(len(v), dtype=torch.float64, generator=generator) - 2)
        if debiased:
            lam = (0.02 + 0.93 * lam / (1 + lam)) / float((d / H).max())
        x = prox(v, k, lam, weights=d, metric=H, debiased=debiased)
        _certify(v, x, k, lam, weights=d, metric=H, debiased=debiased)


@pytest.mark.parametrize("kind", KINDS)
def test_debiased_from_the_envelope(kind: str) -> None:
    """Without weights the debiased operator is the other at a scaled point."""
    for v, k, lam, _ in _cases(kind):
        lam = lam / (1 + lam)
        actual = prox(v, k, lam, debiased=True)
        expected = prox(v / (1 - lam), k, lam / (1 - lam))
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
        _certify(v, actual, k, lam, debiased=True)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_kept_groups_are_unchanged(dtype: torch.dtype, weighted: bool) -> None:
    """Bit for bit, and as many as floor(k) at least where the rest is zero."""
    for v, k, lam, d in _cases("normal"):
        v = v.to(dtype)
        weights = (0.5 + 0.5 * d / d.max()).to(dtype) if weighted else None
        lam = 0.99 * lam / (1 + lam)
        x = prox(v, k, lam, weights=weights, debiased=True)
        numbers = [torch.tensor([number], dtype=torch.float64) for number in (k, lam)]
        of_d = torch.ones_like(d) if weights is None else weights.double()
        folded = v.double()[None, None]
        _, norms, roots = torch.ops.fusee.prox_group_envelope(folded, of_d, None, *numbers, 1)
        scale = 1 - lam * roots[0, 0] * of_d.sqrt() / norms[0]
        kept = scale > 1.001 * (1 - lam * of_d)
        assert same_bits(x[kept], v[kept]), f"{k=} {lam=}"
        assert int((x != 0).any(1).sum()) >= min(int(k), int((v != 0).any(1).sum()))


def test_limits_of_the_debiased_form() -> None:
    """From the identity to the projection onto the largest groups."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(50, 3, dtype=torch.float64, generator=generator)
    largest = v.norm(dim=1).argsort(descending=True)[:7]
    top = torch.zeros_like(v).index_copy(0, largest, v[largest])
    assert same_bits(prox(v, 7, 0.0, debiased=True), v)
    torch.testing.assert_close(prox(v, 7, 1e-12, debiased=True), v, rtol=0, atol=1e-10)
    for lam in (1 - 1e-7, 1.0, 1.5, math.inf):
        assert torch.equal(prox(v, 7, lam, debiased=True), top), lam
        assert torch.equal(prox(v, 7.9, max(lam, 1.0), debiased=True), top)


def test_projection_of_ties_takes_the_first() -> None:
    v = torch.tensor([1.0, -2.0, 2.0, 2.0, -2.0, 0.5])
    expected = torch.tensor([0.0, -2.0, 2.0, 0.0, 0.0, 0.0])
    assert torch.equal(prox(v, 2, 1.0, debiased=True), expected)
    everything = prox(v, 9, 1.0, debiased=True)
    assert torch.equal(everything, v)
    assert torch.equal(prox(v, 0.5, 1.0, debiased=True), torch.zeros(6))


def test_projection_by_weights_and_metric() -> None:
    """The debiased form projects from lam max(d / H) = 1 on, by sqrt(d H) n."""
    v, d = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([0.25, 1.0, 1.5])
    H = torch.tensor([1.0, 0.5, 4.0])
    kept = (d * H).sqrt() * v
    expected = torch.where(kept == kept.max(), v, 0.0)
    assert torch.equal(prox(v, 1, 0.5, weights=d, metric=H, debiased=True), expected)
    below = prox(v, 1, 0.45, weights=d, metric=H, debiased=True)
    assert int((below != 0).sum()) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_homogeneous(kind: str) -> None:
    """Powers of two change no bit but the exponent."""
    for v, k, lam, d in _cases(kind):
        for factor in (2.0**40, 2.0**-40):
            scaled = prox(factor * v, k, lam, weights=d)
            torch.testing.assert_close(
                scaled, factor * prox(v, k, lam, weights=d), rtol=1e-14, atol=0
            )


def test_moreau() -> None:
    """v less the result is lam times a subgradient, the operator of the conjugate: |x|^2 + |v - x|^2 is
    never more than |v|^2, and the operator does not expand distances."""
    for v, k, lam, d in _cases("normal"):
        w = v.roll(1, 0) * 0.7
        x, y = prox(v, k, lam, weights=d), prox(w, k, lam, weights=d)
        assert float(((x - y) * ((v - x) - (w - y))).sum()) >= -1e-13 * float((v * v).sum())


def test_theta_is_the_knee_of_the_result() -> None:
    for v, k, lam, d in _cases("normal"):
        folded = v[None, None]
        numbers = [torch.tensor([number], dtype=torch.float64) for number in (k, lam)]
        x, _, roots = torch.ops.fusee.prox_group_envelope(folded, d, None, *numbers, 0)
        knee = torch.ops.fusee.group_envelope(x, d, numbers[0], False)[2]
        nonzero = int((x != 0).any(3).sum())
        if nonzero > k:
            torch.testing.assert_close(knee, roots[:, 0], rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_degenerate_numbers(dtype: torch.dtype) -> None:
    x = torch.tensor([3.0, -2.0, 0.0, 1.0, -0.0], dtype=dtype)
    for k in (-1.0, 0.0, 0.5, 2, 9.0, math.inf):
        assert same_bits(prox(x, k, 0.0), x)
        assert torch.equal(prox(x, k, math.inf), torch.zeros_like(x))
    for k in (-math.inf, -1.0, 0, 0.0):
        assert torch.equal(prox(x, k, 0.5), torch.zeros_like(x))
    for k in (4, 5.0, 1e300, math.inf):
        assert torch.equal(prox(x, k, 1.0), x / 2)
        assert same_bits(prox(x, k, 0.5, debiased=True), x)
    assert torch.equal(prox(torch.zeros_like(x), 2, 0.5), torch.zeros_like(x))


def test_weight_zero_is_copied_through() -> None:
    v, d = torch.tensor([3.0, 0.1, 2.0, 1.0]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    counted = [0, 2, 3]
    for lam in (0.5, math.inf):
        x = prox(v, 1, lam, weights=d)
        assert x[1] == v[1]
        assert torch.equal(x[counted], prox(v[counted], 1, lam))
    x = prox(v, 0, 0.5, weights=d)
    assert torch.equal(x, torch.tensor([0.0, 0.1, 0.0, 0.0]))
    x = prox(v, 1, 2.0, weights=d, debiased=True)
    assert torch.equal(x, torch.tensor([3.0, 0.1, 0.0, 0.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 3])
def test_extremes(dtype: torch.dtype, size: int) -> None:
    """Norms whose squares leave the range of the dtype."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(12, size, dtype=torch.float64, generator=generator)
    expected = prox(v, 4, 0.5)
    info = torch.finfo(dtype)
    for factor in (
        info.max / 64,
        math.sqrt(info.max) * 4,
        math.sqrt(info.tiny) / 4,
        info.tiny * 64,
    ):
        factor = 2.0 ** round(math.log2(factor))
        actual = prox((v * factor).to(dtype), 4, 0.5).double() / factor
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(actual != 0, expected != 0)


def test_infinite_group() -> None:
    """It counts as the largest, and leaves the others their share."""
    v = torch.tensor([math.inf, 2.0, 1.0, 0.5])
    x = prox(v, 2, 0.5)
    assert x[0] == math.inf
    torch.testing.assert_close(x[1:], prox(v[1:], 1, 0.5))


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("lam", [0.5, 2.0])
def test_nan_in_one_group(debiased: bool, lam: float) -> None:
    v = torch.tensor([[1.0, 2.0], [0.5, math.nan], [0.0, 0.0]])
    for metric in (None, torch.ones(3), torch.ones_like(v)):
        assert bool(prox(v, 1, lam, metric=metric, debiased=debiased).isnan().all())


def test_many_problems_in_one_call() -> None:
    """``vmap`` over input, k and lam."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(6, 9, 4, dtype=torch.float64, generator=generator)
    k = torch.tensor([0.5, 1.0, 2.0, 4.5, 9.0, 0.0])
    lam = torch.tensor([0.1, 0.0, 2.0, 0.5, 0.7, 0.2])
    batched = torch.func.vmap(lambda *args: prox(*args, dim=0, weights="size"))(v, k, lam)
    each = [prox(*args, dim=0, weights="size") for args in zip(v, k, lam, strict=True)]
    assert torch.equal(batched, torch.stack(each))


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("k", [0.6, 2.0, 3.5, 9.0])
def test_gradients(k: float, debiased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(6, 3, dtype=torch.float64, generator=generator)
    d, H = 0.5 + torch.rand(2, 6, dtype=torch.float64, generator=generator)
    numbers = torch.tensor(k, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (v, *numbers)]

    def function(*args: Tensor) -> Tensor:
        return prox(*args, weights=d, metric=H, debiased=debiased)

    assert gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, leaves)


@pytest.mark.parametrize("debiased", [False, True])
def test_gradients_at_the_ends(debiased: bool) -> None:
    """lam = 0 is the identity, of zeros too; with k <= 0 nothing moves."""
    v = torch.tensor([1.0, 0.0, -2.0], requires_grad=True)
    (in_v,) = torch.autograd.grad(prox(v, 1, 0.0, debiased=debiased).sum(), v)
    assert torch.equal(in_v, torch.ones(3))
    k = torch.tensor(-1.0, requires_grad=True)
    for gradient in torch.autograd.grad(prox(v, k, 0.5, debiased=debiased).sum(), (v, k)):
        assert not bool(gradient.any())


def test_agrees_with_cvxpy() -> None:
    cvxpy = pytest.importorskip("cvxpy")
    for case, (v, k, lam, d) in enumerate(_cases("normal")):
        if case % 10 or k < 0.5:
            continue
        d = d.pow(0.3)
        x, u = cvxpy.Variable(v.shape), cvxpy.Variable(len(v))
        terms = [float(d[j]) * cvxpy.quad_over_lin(x[j], u[j]) for j in range(len(v))]
        near = cvxpy.sum_squares(x - v.numpy()) / 2
        goal = cvxpy.Minimize(near + lam * sum(terms) / 2)
        cvxpy.Problem(goal, [u <= 1, cvxpy.sum(u) <= k]).solve(solver="CLARABEL")
        actual = prox(v, k, lam, weights=d)
        error = (actual - torch.from_numpy(x.value)).norm() / v.norm()
        assert float(error) < 1e-3


def test_gradient_in_lam_at_zero() -> None:
    """From the right: of a saturated group -d v, of others -theta sqrt(d) v / n."""
    v, k = torch.tensor([3.0, 2.0, -0.5], dtype=torch.float64), 2
    lam = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for twice in (False, True):
        x = prox(v, k, lam)
        (actual,) = torch.autograd.grad(x.sum(), lam, create_graph=twice)
        h = 1e-7
        expected = (prox(v, k, h) - v).sum() / h
        torch.testing.assert_close(actual.detach(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("k", [-1.0, 0.0, 0.5, 2.0, 9.0])
def test_second_derivatives_of_the_projection(k: float) -> None:
    """Zero, not NaN, where nothing or everything is kept, and of zero groups."""
    v = torch.tensor([[3.0, 1.0], [0.0, 0.0], [0.5, 2.0]], dtype=torch.float64)
    v.requires_grad_()
    for lam, form in ((1.0, {"debiased": True}), (None, {})):
        given = (v, k) if lam is None else (v, k, lam)
        function: Any = fusee.project_top_k_groups if lam is None else prox
        (first,) = torch.autograd.grad(
            function(*given, **form).square().sum(), v, create_graph=True
        )
        (second,) = torch.autograd.grad(first.sum(), v)
        assert torch.equal(
            second, 2.0 * (first / (2 * v.detach())).nan_to_num(1.0 if k > 2 else 0.0)
        )


@pytest.mark.parametrize("debiased", [False, True])
def test_derivatives_of_zero_groups(debiased: bool) -> None:
    """Zero to any order where there is a threshold, and finite."""
    v = torch.tensor([[3.0, 1.0], [0.0, 0.0], [0.5, 2.0]], dtype=torch.float64)
    leaves = [v, *(torch.tensor(x, dtype=torch.float64) for x in (1.5, 0.25))]
    for leaf in leaves:
        leaf.requires_grad_()
    first = torch.autograd.grad(
        prox(*leaves, debiased=debiased).square().sum(), leaves, create_graph=True
    )
    assert not bool(first[0][1].any())
    for part in first:
        for second in torch.autograd.grad(part.sum(), leaves, retain_graph=True):
            assert bool(second.isfinite().all())
            assert second.shape != v.shape or not bool(second[1].any())


# --- the ends of the range --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "k", "lam"),
    [
        ([1e-45, 1, 1, 1, 100, 100, 100], 4, 30.0),  # a quotient that underflows
        ([1e-44, 2, 3, 1e20, 1e-20], 2, 3.0),
        ([1e37] * 2048, 5, 0.5),  # sums that overflow
        ([3e38, 3e38, 1e38, 1.0], 2, 0.25),
        ([1e38] * 40, 100, 0.5),
    ],
)
@pytest.mark.parametrize("debiased", [False, True])
def test_ends_of_float32(values: list[float], k: float, lam: float, debiased: bool) -> None:
    lam = lam / 32 if debiased else lam
    x = torch.tensor(values)
    actual = fusee.prox_group_envelope(x, k, lam, debiased=debiased)
    expected = fusee.prox_group_envelope(x.double(), k, lam, debiased=debiased)
    torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=1e-44)


@pytest.mark.parametrize("scale", [2.0**-1060, 2.0**1020])
@pytest.mark.parametrize("debiased", [False, True])
def test_ends_of_float64(scale: float, debiased: bool) -> None:
    """Scaled input, scaled output: by powers of two, which round nothing."""
    x = torch.tensor([3.0, 1.0, 2.5, 2.0, 1.0, 0.5, 3.0, 3.5] * 3, dtype=torch.float64)
    expected = fusee.prox_group_envelope(x, 5.5, 0.25, debiased=debiased)
    actual = fusee.prox_group_envelope(x * scale, 5.5, 0.25, debiased=debiased)
    torch.testing.assert_close(actual / scale, expected, rtol=1e-12, atol=2e-4 if scale < 1 else 0)


def test_without_a_penalty_an_infinite_group_changes_nothing() -> None:
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([math.inf, 1.0, 2.0], dtype=dtype)
        assert torch.equal(fusee.prox_group_envelope(x, 1, 0.0), x)


def test_lam_past_the_range_is_infinite() -> None:
    assert fusee.prox_group_envelope(torch.tensor([3.0, 2.0, 1.0]), 1, 1e39).tolist() == [0, 0, 0]


def test_k_nan_on_devices_that_are_not_waited_for() -> None:
    nan = torch.full((1,), math.nan, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    for count in (3, 30):  # the small selection, and the search
        x = torch.arange(1.0, count + 1).reshape(1, 1, count, 1)
        for form, lam in ((0, one / 2), (1, one / 2), (1, one), (2, one)):
            moved = torch.ops.fusee.prox_group_envelope(x, None, None, nan, lam, form)[0]
            assert bool(moved.isnan().all()), (count, form)


@pytest.mark.parametrize("size", [1e-30, 1e-23, 1.0, 1e20, 1e30])
@pytest.mark.parametrize("debiased", [False, True])
def test_derivatives_of_any_size_agree(size: float, debiased: bool) -> None:
    """Of the kernel, of the reference in forward mode, and of the reference with a graph of its own."""
    x = size * torch.tensor([[1.0, 2.0], [3.0, 1.0], [4.0, 4.0]])

    def of_prox(v: torch.Tensor) -> torch.Tensor:
        return fusee.prox_group_envelope(v, 1, 0.5, debiased=debiased)

    rows = torch.eye(6).reshape(6, 3, 2)
    backward = torch.stack(
        [
            torch.autograd.grad(of_prox(v), v, row)[0]
            for row in rows
            for v in [x.clone().requires_grad_()]
        ]
    )
    forward = torch.stack([torch.func.jvp(of_prox, (x,), (row,))[1] for row in rows])
    graph = torch.stack(
        [
            torch.autograd.grad(of_prox(v), v, row, create_graph=True)[0].detach()
            for row in rows
            for v in [x.clone().requires_grad_()]
        ]
    )
    torch.testing.assert_close(graph, backward, rtol=1e-4, atol=1e-5)
    # The matrix of derivatives is symmetric.
    torch.testing.assert_close(forward, backward, rtol=1e-4, atol=1e-5)
