"""Small boxes: inside the large one, about the point, to the bit."""

from __future__ import annotations

from typing import Any

import fusee
import pytest
import torch


def example(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Boxes of all sizes, some of no radius, and points inside, at the ends and outside."""
    torch.manual_seed(0)
    lower = torch.randn(4000, dtype=torch.float64)
    width = torch.rand(4000, dtype=torch.float64) * 10.0 ** torch.randint(-9, 4, (4000,))
    width[::7] = 0
    lower, upper = lower.to(dtype), (lower + width).to(dtype)
    share = torch.rand(4000, dtype=torch.float64) * 1.6 - 0.3
    points = (lower + share * (upper - lower)).to(dtype)
    points[1::5], points[2::5] = lower[1::5], upper[2::5]
    return lower, upper, points


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ratio", [0.0, 1e-3, 0.1, 0.4, 0.75, 1.0])
def test_inside_and_about_the_point(dtype: torch.dtype, ratio: float) -> None:
    lower, upper, points = example(dtype)
    low, high = fusee.small_boxes(lower, upper, points, ratio)
    assert low.dtype == high.dtype == dtype
    assert bool((lower <= low).all()) and bool((high <= upper).all())
    inside = points.clamp(lower, upper)
    assert bool((low <= inside).all()) and bool((inside <= high).all())


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.4, 0.9, 1.0])
def test_against_the_formula(ratio: float) -> None:
    lower, upper, points = example(torch.float64)
    tau = ratio * (upper - lower) / 2
    center = torch.minimum(torch.maximum(points, lower + tau), upper - tau)
    low, high = fusee.small_boxes(lower, upper, points, ratio)
    torch.testing.assert_close(low, center - tau, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(high, center + tau, rtol=1e-12, atol=1e-12)


def test_the_whole_box_and_a_point() -> None:
    lower, upper, points = example(torch.float32)
    low, high = fusee.small_boxes(lower, upper, points, 1)
    assert torch.equal(low, lower) and torch.equal(high, upper)
    low, high = fusee.small_boxes(lower, upper, points, 0)
    inside = points.clamp(lower, upper)
    # Off by the rounding of the ends.
    unit = 2**-22 * torch.maximum(lower.abs(), upper.abs())
    assert bool(((high - inside).abs() <= unit).all() and ((low - inside).abs() <= unit).all())


def test_no_gradient() -> None:
    lower = torch.zeros(3, requires_grad=True)
    low, high = fusee.small_boxes(lower, lower + 1, torch.rand(3).requires_grad_(), 0.5)
    assert not low.requires_grad and not high.requires_grad


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "lower must be a Tensor, got float", (0.0, X, X, 0.5)),
        (ValueError, "upper must have the shape of lower", (X, X[0], X, 0.5)),
        (ValueError, "points must have the shape of lower", (X, X, X[0], 0.5)),
        (TypeError, "points must have the dtype of lower", (X, X, X.double(), 0.5)),
        (ValueError, "lower must not be above upper", (X + 1, X, X, 0.5)),
        (ValueError, "lower and upper must be finite", (X, X + torch.inf, X, 0.5)),
        (ValueError, r"ratio must be in \[0, 1\], got 1.5", (X, X, X, 1.5)),
        (ValueError, "ratio must be in", (X, X, X, float("nan"))),
        (TypeError, "ratio must be a number, got NoneType", (X, X, X, None)),
    ],
)
def test_errors(error: type[Exception], match: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(error, match=match):
        fusee.small_boxes(*arguments)
