"""The warm-up penalty: against the formula, written plainly, and where it could be no number."""

from __future__ import annotations

import math
from typing import Any

import fusee
import pytest
import torch
from torch import Tensor

from tests.bounds.networks import three_networks


def boxes(*shapes: tuple[int, ...], scale: float = 0.5) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(shape).double(), scale * torch.rand(shape).double()) for shape in shapes]


def plain(first: float, layers: list[tuple[Tensor, Tensor]], tolerance: float) -> float:
    """The formula over lists of numbers."""
    total = 0.0
    for center, radius in layers:
        values = list(zip(center.flatten().tolist(), radius.flatten().tolist(), strict=True))
        mean_radius = sum(r for _, r in values) / len(values)
        total += max(0.0, tolerance - first / mean_radius) / tolerance
        mean = sum(c for c, _ in values) / len(values)
        active = [c for c, r in values if c - r > 0]
        inactive = [c for c, r in values if c + r < 0]
        if not active and not inactive:
            continue
        for one, other in (
            (sum(active), -sum(inactive)),
            (sum((c - mean) ** 2 for c in active), sum((c - mean) ** 2 for c in inactive)),
        ):
            ratio = min(one, other) / max(one, other)
            total += max(0.0, tolerance - ratio) / tolerance
    return total / len(layers)


@pytest.mark.parametrize("tolerance", [0.5, 0.1, 1.0])
@pytest.mark.parametrize("scale", [0.01, 0.5, 3.0])
def test_against_the_formula(tolerance: float, scale: float) -> None:
    torch.manual_seed(0)
    layers = boxes((4, 7), (4, 3, 5, 5), scale=scale)
    layers = [(center + 0.4, radius) for center, radius in layers]
    radius = torch.full((4, 6), 0.1, dtype=torch.float64)
    value = fusee.interval_warmup_penalty(radius, layers, tolerance)
    assert value.item() == pytest.approx(plain(0.1, layers, tolerance), rel=1e-12)


def test_of_a_network() -> None:
    for model, shape in three_networks().values():
        net = fusee.nn.IntervalModel(model.double())
        x = torch.rand(6, *shape, dtype=torch.float64)
        made = net.propagate(x - 0.1, x + 0.1, before_relu=True)
        value = fusee.interval_warmup_penalty(torch.full_like(x, 0.1), made.before_relu)
        detached = [(center.detach(), radius.detach()) for center, radius in made.before_relu]
        assert value.item() == pytest.approx(plain(0.1, detached, 0.5), rel=1e-9)
        value.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert grads and all(bool(grad.isfinite().all()) for grad in grads)


def test_zero_where_nothing_is_wrong() -> None:
    """Boxes no wider than before, and as much on one side as on the other."""
    center = torch.tensor([[2.0, -2.0], [1.0, -1.0]])
    assert fusee.interval_warmup_penalty(torch.tensor(0.5), [(center, 0.5 + 0 * center)]) == 0


def of(center: list[float], radius: list[float], first: float = 0.1) -> tuple[float, Tensor]:
    """The penalty of one layer, and its gradient in the center and the radius."""
    leaves = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (center, radius)]
    start = torch.tensor(first, dtype=torch.float64)
    value = fusee.interval_warmup_penalty(start, [(leaves[0], leaves[1])])
    grads = torch.autograd.grad(value, leaves)
    assert all(bool(grad.isfinite().all()) for grad in grads)
    return value.item(), torch.stack(grads)


def test_special_layers() -> None:
    value, grad = of([1.0, -1.0], [0.0, 0.0])  # points: no first term
    assert value == 0 and not grad.any()
    value, grad = of([1.0, -1.0], [0.0, 0.0], first=0.0)  # the same with an input of points
    assert value == 0
    value, grad = of([0.1, -0.1], [0.2, 0.2])  # all units unstable: the first term alone
    assert value == 0 and not grad.any()
    value, grad = of([1.0, 2.0], [0.1, 0.1])  # all active: the largest second and third term
    assert value == pytest.approx(2.0) and not grad.any()
    value, grad = of([-1.0, -2.0], [0.1, 0.1])
    assert value == pytest.approx(2.0) and not grad.any()
    value, grad = of([0.0, 0.0], [1.7e308, 1.7e308])  # boxes that have exploded
    assert value == pytest.approx(1.0)
    value, grad = of([1e200, -1e200], [1.0, 1.0])  # squares that overflow
    assert value == pytest.approx(0.8)


def test_nan_stays() -> None:
    center = torch.tensor([math.nan, 1.0])
    value = fusee.interval_warmup_penalty(
        torch.tensor(0.1), [(center, torch.tensor([math.nan, 1.0]))]
    )
    assert value.isnan()


def test_gradients() -> None:
    torch.manual_seed(1)
    center, around = boxes((5, 6), scale=0.6)[0]
    start = torch.tensor([0.05, 0.1], dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (start, center + 0.5, around)]
    leaves = [t.detach().requires_grad_() for t in leaves]

    def penalty(radius: Tensor, center: Tensor, around: Tensor) -> Tensor:
        return fusee.interval_warmup_penalty(radius, [(center, around)])

    assert 0.5 < penalty(*leaves).item() < 3
    assert torch.autograd.gradcheck(penalty, leaves)


def test_half_types_are_summed_in_float32() -> None:
    torch.manual_seed(2)
    layers = [(center.bfloat16(), radius.bfloat16()) for center, radius in boxes((40, 70))]
    value = fusee.interval_warmup_penalty(torch.tensor(0.1, dtype=torch.bfloat16), layers)
    assert value.dtype == torch.float32
    exact = [(center.double(), radius.double()) for center, radius in layers]
    first = torch.tensor(0.1, dtype=torch.bfloat16).item()
    assert value.item() == pytest.approx(plain(first, exact, 0.5), rel=1e-5)


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "radius must be a Tensor, got float", (0.1, [(X, X)])),
        (ValueError, "radius must have elements", (X[:0], [(X, X)])),
        (ValueError, "before_relu must have a layer", (X, [])),
        (TypeError, "center must be a Tensor", (X, [(1.0, X)])),
        (ValueError, "radius must have the shape of center", (X, [(X, X[0])])),
        (TypeError, "radius must have the dtype of center", (X, [(X, X.double())])),
        (ValueError, "a box must have elements", (X, [(X[:0], X[:0])])),
        (ValueError, "tolerance must be in", (X, [(X, X)], 1.5)),
        (ValueError, "tolerance must be positive", (X, [(X, X)], 0)),
        (TypeError, "tolerance must be a number", (X, [(X, X)], "0.5")),
    ],
)
def test_errors(error: type[Exception], match: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(error, match=match):
        fusee.interval_warmup_penalty(*arguments)
