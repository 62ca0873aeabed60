"""The operator in a metric that differs within groups: by certificate, gradients, degenerate cases."""

from __future__ import annotations

import math
from typing import Any

import fusee
import pytest
import torch
from fusee.prox.metric import (
    _Groups,
    _search,
    check_metric_of_table,
    prox_in_metric,
    prox_in_metric_of_table,
)
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.harness.measure import same_bits
from tests.harness.spec import ALL_DTYPES
from tests.prox.certificate import KINDS, gap, values
from tests.prox.tables import coupled

prox = fusee.prox_group_envelope
CASES = 60


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("debiased", [False, True])
def test_certificate(kind: str, debiased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for case in range(CASES):
        m, size = 1 + case % 23, 2 + case % 4
        v = values(kind, generator, m, size)
        d = 10 ** (4 * torch.rand(m, dtype=torch.float64, generator=generator) - 2)
        H = 10 ** (4 * torch.rand(m, size, dtype=torch.float64, generator=generator) - 2)
        lam = 10 ** (4 * torch.rand((), generator=generator).item() - 2)
        if debiased:
            lam = (0.02 + 0.93 * lam / (1 + lam)) / float((d[:, None] / H).max())
        k = (0.3, 1.0, 1.7, m / 2, float(m), m + 2.5)[case % 6]
        x = prox(v, k, lam, weights=d, metric=H, debiased=debiased)
        difference, size_ = gap(v, x, k, lam, d, H, debiased)
        assert difference >= -1e-14 * size_
        assert lam * difference <= 1e-13 * float((H * v * v).sum()), f"{case=}"


def hard(kind: str, generator: torch.Generator, m: int, size: int) -> tuple[torch.Tensor, ...]:
    """v, H and weights on which the search is slow, or rounds badly."""

    def decades(low: float, high: float, *shape: int) -> torch.Tensor:
        drawn = torch.rand(shape, dtype=torch.float64, generator=generator)
        return 10 ** (low + (high - low) * drawn)

    v = torch.randn(m, size, dtype=torch.float64, generator=generator)
    H, d = decades(-2, 2, m, size), torch.ones(m, dtype=torch.float64)
    if kind == "metric":
        H = decades(-6, 6, m, size)
    elif kind == "metric and gradient":  # H v has as many decades, and is not ordered as H
        H = decades(-6, 6, m, size)
        v = v / H * decades(-6, 6, m, size)
    elif kind == "weights":
        d = decades(-3, 3, m)
    elif kind == "two scales":
        v[: m // 2] *= 1e-4
    elif kind == "ties":
        v, H = v[:1].expand(m, size), decades(-6, 6, 1, size).expand(m, size)
    return v.clone(), H.clone(), d


HARD = ("metric", "metric and gradient", "weights", "two scales", "ties")


@pytest.mark.parametrize("kind", HARD)
def test_certificate_of_hard_inputs(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for case in range(40):
        m, size = (2, 5, 23)[case % 3], (2, 7, 40)[case // 3 % 3]
        v, H, d = hard(kind, generator, m, size)
        k = (0.3, 1.0, 1.7, m / 2, m - 0.5)[case % 5]
        lam = 10 ** (9 * torch.rand((), dtype=torch.float64, generator=generator).item() - 6)
        x = prox(v, k, lam, weights=d, metric=H)
        difference, scale = gap(v, x, k, lam, d, H)
        assert difference >= -1e-14 * scale
        assert lam * difference <= 1e-13 * float((H * v * v).sum()), f"{case=}"


@pytest.mark.parametrize("kind", HARD)
def test_steps_of_hard_inputs(kind: str) -> None:
    """The search needs few steps, which CUDA takes whatever they find."""
    generator = torch.Generator().manual_seed(0)
    calls: list[int] = []

    class Counted(_Groups):
        def curve(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            calls[-1] += 1
            return super().curve(u)

    for case in range(40):
        m, size = (2, 5, 23)[case % 3], (2, 7, 40)[case // 3 % 3]
        v, H, d = hard(kind, generator, m, size)
        k = (0.3, 1.0, 1.7, m / 2, m - 0.5)[case % 5]
        lam = 10 ** (9 * torch.rand((), dtype=torch.float64, generator=generator).item() - 6)
        calls.append(-2)  # the ends
        groups = Counted((H * v)[None, None], H[None, None], lam * d[None], d[None], d[None] > 0)
        _search(groups, torch.tensor([k], dtype=torch.float64))
    assert 1 <= max(calls) <= 16


@pytest.mark.parametrize("debiased", [False, True])
def test_equal_within_groups(debiased: bool) -> None:
    """Where the metric is the same within each group, it is that of the groups."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(3, 11, 4, dtype=torch.float64, generator=generator)
    H = 0.5 + torch.rand(11, dtype=torch.float64, generator=generator)
    d = torch.rand(11, dtype=torch.float64, generator=generator)
    d[3] = 0
    whole = H[:, None].expand(3, 11, 4)
    for lam in (0.0, 1e-6, 0.3, 2.0, math.inf):
        for k in (0.0, 0.4, 3, 7.5, 20.0):
            options = {"dim": 1, "weights": d, "debiased": debiased}
            actual = prox(v, k, lam, metric=whole, **options)
            expected = prox(v, k, lam, metric=H, **options)
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
            assert torch.equal(actual != 0, expected != 0)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("k", [0.6, 2.0, 3.5, 9.0])
def test_gradients(k: float, debiased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(6, 3, dtype=torch.float64, generator=generator)
    H = 0.5 + torch.rand(6, 3, dtype=torch.float64, generator=generator)
    d = 0.5 + torch.rand(6, dtype=torch.float64, generator=generator)
    numbers = torch.tensor(k, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (v, *numbers)]

    def function(*args: torch.Tensor) -> torch.Tensor:
        return prox(*args, weights=d, metric=H, debiased=debiased)

    assert gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, leaves)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_dtypes_and_kept_groups(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(9, 5, generator=generator).to(dtype)
    H = (1 + torch.rand(9, 5, generator=generator)).to(dtype)
    x = prox(v, 4, 0.4, metric=H, debiased=True)
    assert x.dtype == dtype
    exact = prox(v.double(), 4, 0.4, metric=H.double(), debiased=True)
    torch.testing.assert_close(x.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-9)
    assert int((x == v).all(1).sum()) >= 1
    assert same_bits(prox(v, 4, 0.0, metric=H), v)
    assert torch.equal(prox(v, 0, 0.5, metric=H), torch.zeros_like(v))
    assert torch.equal(prox(v, 4, math.inf, metric=H), torch.zeros_like(v))


def test_projection() -> None:
    """The largest groups in the metric, from lam max(d / H) = 1 on."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(8, 3, generator=generator)
    H = 0.5 + torch.rand(8, 3, generator=generator)
    kept = (H * v * v).sum(1).argsort(descending=True)[:3]
    x = prox(v, 3.5, 2.0, metric=H, debiased=True)
    assert torch.equal(x, torch.zeros_like(v).index_copy(0, kept, v[kept]))


@pytest.mark.parametrize("factor", [2.0**500, 2.0**-500, 2.0**60, 2.0**-60])
def test_extremes(factor: float) -> None:
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(8, 3, dtype=torch.float64, generator=generator)
    H = 0.5 + torch.rand(8, 3, dtype=torch.float64, generator=generator)
    expected = prox(v, 3, 0.5, metric=H) * factor
    torch.testing.assert_close(prox(v * factor, 3, 0.5, metric=H), expected, rtol=1e-12, atol=0)


def test_layouts_and_batches() -> None:
    """Dimensions in any order, and ``vmap``."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(4, 3, 2, 5, dtype=torch.float64, generator=generator)
    H = 0.5 + torch.rand(4, 3, 2, 5, dtype=torch.float64, generator=generator)
    actual = prox(v, 2.5, 0.3, dim=(0, 2), metric=H)
    moved = [t.permute(0, 2, 1, 3).reshape(8, 15) for t in (v, H)]
    expected = prox(moved[0], 2.5, 0.3, metric=moved[1])
    expected = expected.reshape(4, 2, 3, 5).permute(0, 2, 1, 3)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-15)
    k = torch.tensor([0.5, 1.0, 2.0, 3.0])
    batched = torch.func.vmap(lambda v, k, H: prox(v, k, 0.3, metric=H))(v, k, H)
    each = [prox(v[i], k[i], 0.3, metric=H[i]) for i in range(4)]
    torch.testing.assert_close(batched, torch.stack(each), rtol=1e-13, atol=1e-15)
    for shape in ((0, 3), (4, 0)):
        assert prox(v.new_ones(shape), 2, 0.5, metric=v.new_ones(shape)).shape == shape


# --- groups of a table ------------------------------------------------------------------------------


def of_table(
    tensors: list[torch.Tensor], metric: list[torch.Tensor], table: fusee.GroupTable, form: int = 0
) -> tuple[torch.Tensor, ...]:
    k, lam = (torch.tensor([x], dtype=torch.float64) for x in (1.5, 0.3))
    d = 0.5 + torch.arange(table.groups, dtype=torch.float64)
    return prox_in_metric_of_table(tensors, metric, table, d, k, lam, form)


@pytest.mark.parametrize("form", [0, 1, 2])
def test_table_of_rows(form: int) -> None:
    """A table of the rows of a tensor, and of a part of its rows in no order."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(5, 6, dtype=torch.float64, generator=generator)
    H = 2 + torch.rand(5, 6, dtype=torch.float64, generator=generator)
    weights = torch.tensor([0.5, 1.5, 2.5], dtype=torch.float64)
    rows = torch.tensor([3, 0, 4])
    ids = torch.full((5, 6), -1)
    ids[rows] = torch.arange(3)[:, None]
    moved = of_table([v], [H], fusee.GroupTable([ids]), form)[0]
    if form == 2:
        keys = weights * (H[rows] * v[rows].square()).sum(1)
        kept = torch.arange(3) == keys.argmax()
        expected = torch.where(kept[:, None], v[rows], 0.0)
    else:
        expected = prox(v[rows], 1.5, 0.3, weights=weights, metric=H[rows], debiased=bool(form))
    torch.testing.assert_close(moved[rows], expected, rtol=1e-12, atol=1e-14)
    assert same_bits(moved[[1, 2]], v[[1, 2]])


def test_table_of_groups_of_several_tensors() -> None:
    """Of unequal sizes: the certificate, derivatives, dtypes, and the elements in no group."""
    table, tensors = coupled()
    generator = torch.Generator().manual_seed(0)
    metric = [0.2 + torch.rand(t.shape, dtype=t.dtype, generator=generator) for t in tensors]
    moved = of_table(tensors, metric, table)
    ids = torch.cat([t.reshape(-1) for t in table.ids])
    flat = [torch.cat([t.reshape(-1) for t in ts]) for ts in (tensors, moved, metric)]
    assert same_bits(flat[1][ids < 0], flat[0][ids < 0])
    size = int(table.sizes.max())
    rows = [torch.zeros(table.groups, size, dtype=torch.float64) for _ in range(3)]
    rows[2] += 1
    for group in range(table.groups):
        for row, values_ in zip(rows, flat, strict=True):
            row[group, : table.sizes[group]] = values_[ids == group]
    d = 0.5 + torch.arange(table.groups, dtype=torch.float64)
    difference, scale = gap(rows[0], rows[1], 1.5, 0.3, d, rows[2])
    assert abs(difference) <= 1e-13 * scale

    leaves = [t.clone().requires_grad_() for t in tensors]
    assert gradcheck(lambda *ts: of_table(list(ts), metric, table), leaves)
    half = [t.bfloat16() for t in tensors]
    for x, exact in zip(
        of_table(half, metric, table),
        of_table([t.double() for t in half], metric, table),
        strict=True,
    ):
        assert torch.equal(x, exact.bfloat16())


@pytest.mark.parametrize("form", [0, 1, 2])
@pytest.mark.parametrize("sorted_", [False, True])
def test_table_of_one_large_group_and_many_small(form: int, sorted_: bool) -> None:
    """The results of groups filled up to one size, and no tensor of that size."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([500, *[1, 2] * 100])
    groups = len(sizes)
    ids = torch.arange(groups).repeat_interleave(sizes)
    if not sorted_:
        ids = ids[torch.randperm(len(ids), generator=generator)]
        ids[(ids == 0).nonzero()[::90]] = -1
    table = fusee.GroupTable([ids], groups)
    v = torch.randn(len(ids), dtype=torch.float64, generator=generator)
    H = 0.5 + torch.rand(len(ids), dtype=torch.float64, generator=generator)
    k, lam = (torch.tensor([x], dtype=torch.float64) for x in (20.5, 0.3))

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            largest.extend(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor))
            return result

    largest: list[int] = []
    with Largest():
        moved = prox_in_metric_of_table([v], [H], table, None, k, lam, form)[0]
    assert max(largest) <= len(ids) + groups
    rows, of_rows = torch.zeros(groups, 500, dtype=v.dtype), torch.ones(groups, 500, dtype=v.dtype)
    for group in range(groups):
        rows[group, : int((ids == group).sum())] = v[ids == group]
        of_rows[group, : int((ids == group).sum())] = H[ids == group]
    expected = prox_in_metric(rows[None, None], of_rows[None, None], None, k, lam, form)[0, 0]
    for group in range(groups):
        inside = ids == group
        row = expected[group, : int(inside.sum())]
        torch.testing.assert_close(moved[inside], row, rtol=1e-12, atol=1e-14)
    assert same_bits(moved[ids < 0], v[ids < 0])


def test_transforms_of_table() -> None:
    """Forward mode, second order, and a batch of problems."""
    table, tensors = coupled()
    generator = torch.Generator().manual_seed(0)
    tensors = [t + 0.3 for t in tensors]
    metric = [0.5 + torch.rand(t.shape, dtype=t.dtype, generator=generator) for t in tensors]
    leaves = [t.clone().requires_grad_() for t in tensors]

    def function(*ts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return of_table(list(ts), metric, table)

    assert gradcheck(function, leaves, check_forward_ad=True)
    assert gradgradcheck(function, leaves)
    batch = [torch.stack([t, 2 * t.flip(0)]) for t in tensors]
    actual = torch.func.vmap(function)(*batch)
    for item in range(2):
        each = function(*(t[item] for t in batch))
        for x, y in zip(actual, each, strict=True):
            torch.testing.assert_close(x[item], y, rtol=1e-13, atol=1e-15)


def test_metric_of_table() -> None:
    table, tensors = coupled()
    good = [torch.ones_like(t) for t in tensors]
    assert all(map(torch.equal, check_metric_of_table(good, table), good))
    with pytest.raises(ValueError, match="metric must have the shapes"):
        check_metric_of_table(good[:2], table)
    with pytest.raises(TypeError, match=r"metric\[1\] must have dtype"):
        check_metric_of_table([good[0], good[1].long(), good[2]], table)
    with pytest.raises(ValueError, match=r"metric\[0\] must be positive and finite, got -1"):
        check_metric_of_table([-good[0], *good[1:]], table)


@pytest.mark.parametrize("value", [1e-50, 1e50])
def test_metric_is_checked_as_it_is_used(value: float) -> None:
    """What is positive and finite in float64 but not in float32."""
    v = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    H = torch.ones(3, 4, dtype=torch.float64)
    H[1, 2] = value
    for leaf in (v, v.clone().requires_grad_()):
        with pytest.raises(ValueError, match="metric must be positive and finite in"):
            prox(leaf, 1, 0.5, metric=H)
    assert prox(v.double(), 1, 0.5, metric=H).isfinite().all()
