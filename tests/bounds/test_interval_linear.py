"""What is special to boxes in layers: exact zeros, points, NaN, and gradients that are not asked for."""

from __future__ import annotations

import fusee
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

NAN, INF = torch.nan, torch.inf


def box(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(shape), torch.rand(shape) + 0.1


def test_weights_of_zero_have_the_centers_gradient_alone() -> None:
    """The clamped form of the rules counts it twice: |W| has the derivative zero at zero."""
    center, radius = (part.double() for part in box(6, 5))
    weight = torch.zeros(4, 5).double().requires_grad_()
    out_center, out_radius = fusee.interval_linear(center, radius, weight)
    grad = torch.randn(6, 4).double()
    (ours,) = torch.autograd.grad([out_center, out_radius], weight, [grad, torch.ones_like(grad)])
    torch.testing.assert_close(ours, grad.T @ center)


def test_relu_tells_the_three_cases_apart() -> None:
    center = torch.tensor([3.0, -3.0, 0.5, 1.0, -1.0, 0.0]).requires_grad_()
    radius = torch.ones(6).requires_grad_()
    with torch.no_grad():
        radius[5] = 0.0
    made = fusee.interval_relu(center, radius)
    torch.testing.assert_close(made[0], torch.tensor([3.0, 0.0, 0.75, 1.0, 0.0, 0.0]))
    torch.testing.assert_close(made[1], torch.tensor([1.0, 0.0, 0.75, 1.0, 0.0, 0.0]))
    assert made[0][2] == made[1][2]
    upstream = torch.full((6,), 2.0), torch.full((6,), 6.0)
    grads = torch.autograd.grad(made, [center, radius], upstream)
    # Positive, negative, across zero; an end at zero has ReLU's own derivative there, none.
    torch.testing.assert_close(grads[0], torch.tensor([2.0, 0.0, 4.0, 4.0, 0.0, 0.0]))
    torch.testing.assert_close(grads[1], torch.tensor([6.0, 0.0, 4.0, 4.0, 0.0, 0.0]))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("wanted", range(16))
def test_gradients_that_are_not_asked_for_are_empty(relu: bool, wanted: int) -> None:
    grads, given, weight = box(5, 7), box(5, 6), torch.randn(7, 6)
    outputs = fusee.interval_linear(*given, weight, relu=True) if relu else (None, None)
    arguments = (*grads, *given, weight, *outputs)
    every = torch.ops.fusee.interval_linear_backward(*arguments, 15, False)
    some = torch.ops.fusee.interval_linear_backward(*arguments, wanted, False)
    for i, (one, other) in enumerate(zip(some, every, strict=True)):
        assert torch.equal(one, other) if wanted >> i & 1 else one.shape == (0,)


@pytest.mark.parametrize("wanted", range(16))
def test_gradients_of_channels_that_are_not_asked_for_are_empty(wanted: int) -> None:
    grads, given, scale = box(3, 4, 5), box(3, 4, 5), torch.randn(4)
    arguments = (*grads, *given, scale, None, None)
    every = torch.ops.fusee.interval_affine_backward(*arguments, 15)
    some = torch.ops.fusee.interval_affine_backward(*arguments, wanted)
    for i, (one, other) in enumerate(zip(some, every, strict=True)):
        assert torch.equal(one, other) if wanted >> i & 1 else one.shape == (0,)


@pytest.mark.parametrize("wanted", range(16))
def test_gradients_of_margins_that_are_not_asked_for_are_empty(wanted: int) -> None:
    given, weight, target = box(5, 6), torch.randn(4, 6), torch.randint(4, (5,))
    arguments = (torch.randn(5, 4), *given, weight, target)
    every = torch.ops.fusee.interval_margins_backward(*arguments, 15)
    some = torch.ops.fusee.interval_margins_backward(*arguments, wanted)
    for i, (one, other) in enumerate(zip(some, every, strict=True)):
        assert torch.equal(one, other) if wanted >> i & 1 else one.shape == (0,)


def only_row(result: Tensor, row: int, expected: Tensor) -> None:
    """The row is NaN, and the others are as they were."""
    bad = torch.zeros_like(result, dtype=torch.bool)
    bad[row] = True
    assert torch.equal(result.isnan(), bad) and torch.equal(result[~bad], expected[~bad])


@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("relu", [False, True])
def test_rows_are_alone(rows: int, relu: bool) -> None:
    """NaN stays in its row: of a center in the centers, of a radius in both."""
    given, weight = box(rows, 33), torch.randn(21, 33)
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
    center, radius = box(5, 6)
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


@pytest.mark.parametrize("value", [-1, 4, 2**40, -(2**40)])
def test_a_target_that_is_no_class_makes_its_row_nan(value: int) -> None:
    given, weight, bias = box(5, 6), torch.randn(4, 6), torch.randn(4)
    target = torch.randint(4, (5,))
    expected = torch.ops.fusee.interval_margins(*given, weight, bias, target, False)
    target[1] = value
    only_row(torch.ops.fusee.interval_margins(*given, weight, bias, target, False), 1, expected)
    grads = torch.ops.fusee.interval_margins_backward(torch.randn(5, 4), *given, weight, target, 3)
    for grad in grads[:2]:
        assert torch.equal(grad.isnan().all(1), torch.arange(5) == 1)


def test_points_go_where_the_layer_takes_them() -> None:
    x, weight, bias = torch.randn(3, 4, 9), torch.randn(5, 9), torch.randn(5)
    center, radius = fusee.interval_linear(x, torch.zeros_like(x), weight, bias)
    torch.testing.assert_close(center, F.linear(x, weight, bias), atol=1e-5, rtol=1e-5)
    assert bool((radius == 0).all())


def test_each_end_is_reached() -> None:
    center, radius = (part.double() for part in box(1, 9))
    weight = torch.randn(5, 9).double()
    lower, upper = fusee.lower_upper(*fusee.interval_linear(center, radius, weight))
    for j in range(5):
        corner = center + weight[j].sign() * radius
        torch.testing.assert_close((corner @ weight.T)[0, j], upper[0, j])
        torch.testing.assert_close(((2 * center - corner) @ weight.T)[0, j], lower[0, j])


@pytest.mark.parametrize("shape", [(6, 5), (2, 5, 3), (2, 5, 3, 4)])
def test_memory_order_is_kept(shape: tuple[int, ...]) -> None:
    """Channels last stay so, and make no difference."""
    given = box(*shape)
    scale, shift = torch.randn(5), torch.randn(5)
    statistics = -shift / scale, torch.ones(5), scale, torch.zeros(5), 0.0
    expected = fusee.interval_batch_norm(*given, *statistics, relu=True)
    last = [part.movedim(1, -1).contiguous().movedim(-1, 1) for part in given]
    for function, reference in (
        (lambda *pair: fusee.interval_batch_norm(*pair, *statistics, relu=True), expected),
        (fusee.interval_relu, fusee.interval_relu(*given)),
    ):
        made = function(*last)
        torch.testing.assert_close(made, reference)
        if len(shape) > 2:
            assert made[0].stride() == last[0].stride() and made[1].stride() == last[0].stride()
    mixed = fusee.interval_batch_norm(last[0], given[1], *statistics, relu=True)
    torch.testing.assert_close(mixed, expected)


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
    center, radius = box(4, 3)
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
