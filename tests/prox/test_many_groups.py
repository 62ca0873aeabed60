"""Problems of so many groups that on CUDA all blocks search for their root together."""

from __future__ import annotations

import math
from typing import Any

import fusee
import pytest
import torch
from torch import Tensor

from tests.harness.measure import same_bits
from tests.prox.certificate import KINDS, gap, values
from tests.test_counters import Counters

GROUPS = 16384 + 100
"""A few more than one block searches alone."""
FORMS: list[tuple[float, dict[str, bool]]] = [
    (0.5, {}),
    (0.5, {"debiased": True}),
    (2.0, {"debiased": True}),  # the projection
]


def _make(*shape: int, dtype: torch.dtype = torch.float64, kind: str = "normal") -> Tensor:
    return values(kind, torch.Generator().manual_seed(0), *shape).to(dtype)


def _one_and_many(function: Any, x: Tensor) -> tuple[Any, Any]:
    """The results of one problem by all blocks, and of the same in a batch, by a block each."""
    leaf = x.clone().requires_grad_()
    one = function(leaf)
    batch = x.expand(4, *x.shape).clone().requires_grad_()
    many = torch.func.vmap(function)(batch)
    cotangent = torch.linspace(-1, 2, one.numel(), dtype=x.dtype).reshape(one.shape)
    one.backward(cotangent)
    many.backward(cotangent.expand(many.shape))
    return (one.detach(), leaf.grad), (many.detach()[3], batch.grad[3])  # type: ignore[index]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(GROUPS,), (GROUPS, 3)])
@pytest.mark.parametrize(("lam", "form"), FORMS)
def test_prox_as_in_a_batch(
    dtype: torch.dtype, shape: tuple[int, ...], lam: float, form: dict[str, bool]
) -> None:
    x = _make(*shape, dtype=dtype)
    d = torch.linspace(0.5, 1, GROUPS, dtype=dtype)

    def function(v: Tensor) -> Tensor:
        return fusee.prox_group_envelope(v, 700.5, lam, dim=0, weights=d, **form)

    for actual, expected in zip(*_one_and_many(function, x), strict=True):
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("debiased", [False, True])
def test_value_as_in_a_batch(dtype: torch.dtype, debiased: bool) -> None:
    def function(v: Tensor) -> Tensor:
        return fusee.group_envelope(v, 3000, debiased=debiased)

    for actual, expected in zip(*_one_and_many(function, _make(GROUPS, dtype=dtype)), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_certificate(kind: str) -> None:
    v = _make(GROUPS, 1, kind=kind)
    for k in (0.5, 2000.0):
        difference, size = gap(v, fusee.prox_group_envelope(v, k, 0.5), k, 0.5)
        assert -1e-13 * size <= difference <= 1e-12 * size


def test_same_bits_whatever_the_order_of_blocks() -> None:
    """Every emulated launch has a schedule of its own; forward and backward."""
    x = _make(GROUPS, dtype=torch.float32)
    runs = []
    for _ in range(3):
        leaves = [x.clone(), torch.tensor(500.5), torch.tensor(0.5)]
        for leaf in leaves:
            leaf.requires_grad_()
        result = fusee.prox_group_envelope(*leaves)
        result.square().sum().backward()
        runs.append([result.detach(), *(leaf.grad for leaf in leaves)])
    for run in runs[1:]:
        for actual, expected in zip(run, runs[0], strict=True):
            assert actual is not None
            assert expected is not None
            assert same_bits(actual, expected)


def test_problems_one_after_the_other() -> None:
    """Few problems of yet more groups, each by all blocks; the parts of columns."""
    x = _make(2, 2, 2 * GROUPS, dtype=torch.float32)
    numbers = [torch.tensor(pair, dtype=torch.float64) for pair in ((900.0, 40.0), (0.5, 0.25))]
    together = torch.func.vmap(lambda v, k, lam: fusee.prox_group_envelope(v, k, lam, dim=1))
    expected = [
        fusee.prox_group_envelope(v, k.item(), lam.item(), dim=1)
        for v, k, lam in zip(x, *numbers, strict=True)
    ]
    assert same_bits(together(x, *numbers), torch.stack(expected))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite(value: float) -> None:
    x = _make(GROUPS, dtype=torch.float32)
    x[GROUPS // 2] = value
    result = fusee.prox_group_envelope(x, 10, 0.5)
    if value == math.inf:
        assert result[GROUPS // 2] == value
        x[GROUPS // 2] = result[GROUPS // 2] = 0
        torch.testing.assert_close(result, fusee.prox_group_envelope(x, 9, 0.5))
    else:
        assert bool(result.isnan().all())
        assert math.isnan(fusee.group_envelope(x, 10).item())


@pytest.mark.parametrize("lam", [0.5, 2.0])
@pytest.mark.parametrize(
    "shapes",
    [
        [(5, 3), (GROUPS, 70), (7, 2)],
        [(2 * GROUPS, 2), (2 * GROUPS + 9, 1), (3, 2)],
        [(5, 3), (GROUPS, 1), (GROUPS + 7, 1)],  # by a block each
    ],
)
def test_in_place(shapes: list[tuple[int, int]], lam: float) -> None:
    """Scopes of many groups and of few, summed by rows and by columns."""
    tensors = [_make(*shape) for shape in shapes]
    expected = [fusee.prox_group_envelope(x, 3.5, lam, dim=0, debiased=True) for x in tensors]
    left = fusee.optim.prox_group_envelope_(tensors, 3.5, lam, debiased=True)
    for x, y, count in zip(tensors, expected, left.tolist(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
        assert count == int((y != 0).any(1).sum())


def test_in_place_in_one_scope() -> None:
    tensors = [_make(9000, 2, kind=kind) for kind in ("normal", "two scales")]
    expected = fusee.prox_group_envelope(torch.cat(tensors), 600, 0.5, dim=0)
    fusee.optim.prox_group_envelope_(tensors, 600, 0.5, scope="all")
    torch.testing.assert_close(torch.cat(tensors), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.emulated_only
def test_all_blocks_work() -> None:
    if fusee.engine("cpu") != "emulated":
        pytest.skip("needs FUSEE_ENGINE=emulated")
    counters = Counters()
    for groups, blocks in ((GROUPS - 100, 1), (GROUPS, 16)):
        counters.reset()
        fusee.group_envelope(torch.ones(groups), 3)
        assert [kernel["blocks"] for kernel in counters.read()["kernels"]] == [blocks]
