"""What is special to boxes in layers: exact zeros, points, NaN, and gradients that are not asked for."""

from __future__ import annotations

import fusee
import pytest
import torch
import torch.nn.functional as F

from tests.bounds.layers import only_row, random_box

NAN, INF = torch.nan, torch.inf


def test_weights_of_zero_have_the_centers_gradient_alone() -> None:
    """The clamped form of the rules counts it twice: |W| has the derivative zero at zero."""
    center, radius = (part.double() for part in random_box(6, 5))
    weight = torch.zeros(4, 5).double().requires_grad_()
    out_center, out_radius = fusee.interval_linear(center, radius, weight)
    grad = torch.randn(6, 4).double()
    (ours,) = torch.autograd.grad([out_center, out_radius], weight, [grad, torch.ones_like(grad)])
    torch.testing.assert_close(ours, grad.T @ center)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("wanted", range(16))
def test_gradients_that_are_not_asked_for_are_empty(relu: bool, wanted: int) -> None:
    grads, given, weight = random_box(5, 7), random_box(5, 6), torch.randn(7, 6)
    outputs = fusee.interval_linear(*given, weight, relu=True) if relu else (None, None)
    arguments = (*grads, *given, weight, *outputs)
    every = torch.ops.fusee.interval_linear_backward(*arguments, 15, False)
    some = torch.ops.fusee.interval_linear_backward(*arguments, wanted, False)
    for i, (one, other) in enumerate(zip(some, every, strict=True)):
        assert torch.equal(one, other) if wanted >> i & 1 else one.shape == (0,)


@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("relu", [False, True])
def test_rows_are_alone(rows: int, relu: bool) -> None:
    """NaN stays in its row: of a center in the centers, of a radius in both."""
    given, weight = random_box(rows, 33), torch.randn(21, 33)
    bad = rows // 2
    expected = fusee.interval_linear(*given, weight, relu=relu)
    for part in (0, 1):
        changed = [tensor.clone() for tensor in given]
        changed[part][bad, 17] = NAN
        made = fusee.interval_linear(changed[0], changed[1], weight, relu=relu)
        only_row(made[0], bad, expected[0])
        if part == 1 or relu:
            only_row(made[1], bad, expected[1])
        else:
            assert torch.equal(made[1], expected[1])


@pytest.mark.parametrize("value", [-1.0, INF, NAN, -INF])
@pytest.mark.parametrize("sound", [False, True])
def test_what_is_no_radius_makes_its_row_nan(value: float, sound: bool) -> None:
    """Below the checks, which see no values on CUDA and under compile."""
    center, radius = random_box(5, 6)
    weight = torch.randn(4, 6)
    expected = torch.ops.fusee.interval_linear(center, radius, weight, None, False, sound, False)
    target = torch.zeros(5, dtype=torch.int64)
    margins = torch.ops.fusee.interval_margins(center, radius, weight, None, target, sound)
    radius[3, 2] = value
    made = torch.ops.fusee.interval_linear(center, radius, weight, None, False, sound, False)
    for one, other in zip(made, expected, strict=True):
        only_row(one, 3, other)
    only_row(
        torch.ops.fusee.interval_margins(center, radius, weight, None, target, sound), 3, margins
    )


def test_points_go_where_the_layer_takes_them() -> None:
    x, weight, bias = torch.randn(3, 4, 9), torch.randn(5, 9), torch.randn(5)
    center, radius = fusee.interval_linear(x, torch.zeros_like(x), weight, bias)
    torch.testing.assert_close(center, F.linear(x, weight, bias), atol=1e-5, rtol=1e-5)
    assert bool((radius == 0).all())


def test_each_end_is_reached() -> None:
    center, radius = (part.double() for part in random_box(1, 9))
    weight = torch.randn(5, 9).double()
    lower, upper = fusee.lower_upper(*fusee.interval_linear(center, radius, weight))
    for j in range(5):
        corner = center + weight[j].sign() * radius
        torch.testing.assert_close((corner @ weight.T)[0, j], upper[0, j])
        torch.testing.assert_close(((2 * center - corner) @ weight.T)[0, j], lower[0, j])


def test_bad_ends() -> None:
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="lower must not be above upper, but is at 2 elements"):
        fusee.center_radius(x, torch.tensor([1.0, -1.0, -2.0]))
    with pytest.raises(ValueError, match="lower and upper must be finite"):
        fusee.center_radius(x, torch.tensor([1.0, INF, 2.0]))
    with pytest.raises(ValueError, match="upper must have the shape"):
        fusee.center_radius(x, x[:1])
    with pytest.raises(TypeError, match="lower must be a Tensor"):
        fusee.center_radius(0.0, x)
    with pytest.raises(ValueError, match="radius must be finite and not negative"):
        fusee.lower_upper(x, x - 1)
    with pytest.raises(TypeError, match="radius must have the dtype"):
        fusee.lower_upper(x, x.double())
    nan = torch.tensor([NAN, 0.0, 1.0])
    for made in (
        fusee.center_radius(nan, nan),
        fusee.lower_upper(nan, x),
        fusee.lower_upper(x, nan),
    ):
        assert all(torch.equal(part.isnan(), nan.isnan()) for part in made)


def test_ends_and_boxes_are_each_others_inverse() -> None:
    lower = torch.randn(50).double().requires_grad_()
    upper = (lower.detach() + torch.rand(50).double()).requires_grad_()
    again = fusee.lower_upper(*fusee.center_radius(lower, upper))
    torch.testing.assert_close(again, (lower, upper))
    assert torch.autograd.gradcheck(fusee.center_radius, (lower, upper))
    assert torch.autograd.gradcheck(
        lambda *ends: fusee.lower_upper(*fusee.center_radius(*ends, sound=True), sound=True),
        (lower, upper),
    )


@pytest.mark.tracing
def test_compiled_code_makes_bad_rows_nan() -> None:
    """It sees no values."""
    center, radius = random_box(4, 3)
    weight, target = torch.randn(2, 3), torch.tensor([0, 1, 0, 1])
    radius[1, 0] = -1.0
    functions = {
        "linear": lambda: torch.stack(fusee.interval_linear(center, radius, weight, relu=True)),
        "relu": lambda: torch.stack(fusee.interval_relu(center, radius))[:, :, :1],
        "margins": lambda: fusee.interval_margins(center, radius, weight, None, target)[None],
        "ends": lambda: torch.stack(fusee.lower_upper(center, radius))[:, :, :1],
    }
    for function in functions.values():
        made = torch.compile(function, fullgraph=True, backend="aot_eager")()
        assert torch.equal(made.isnan().all(-1), (torch.arange(4) == 1).expand(made.shape[:2]))
