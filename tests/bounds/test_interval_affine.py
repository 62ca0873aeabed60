"""What is special to boxes times numbers of their channels, and through ReLU."""

from __future__ import annotations

import fusee
import pytest
import torch

from tests.bounds.layers import random_box


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


@pytest.mark.parametrize("wanted", range(16))
def test_gradients_of_channels_that_are_not_asked_for_are_empty(wanted: int) -> None:
    grads, given, scale = random_box(3, 4, 5), random_box(3, 4, 5), torch.randn(4)
    arguments = (*grads, *given, scale, None, None)
    every = torch.ops.fusee.interval_affine_backward(*arguments, 15)
    some = torch.ops.fusee.interval_affine_backward(*arguments, wanted)
    for i, (one, other) in enumerate(zip(some, every, strict=True)):
        assert torch.equal(one, other) if wanted >> i & 1 else one.shape == (0,)


@pytest.mark.parametrize("shape", [(6, 5), (2, 5, 3), (2, 5, 3, 4)])
def test_memory_order_is_kept(shape: tuple[int, ...]) -> None:
    """Channels last stay so, and make no difference."""
    given = random_box(*shape)
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
