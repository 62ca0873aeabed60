"""What is special to margins: targets that are none, and gradients that are not asked for."""

from __future__ import annotations

import pytest
import torch

from tests.bounds.layers import only_row, random_box


@pytest.mark.parametrize("wanted", range(16))
def test_gradients_of_margins_that_are_not_asked_for_are_empty(wanted: int) -> None:
    given, weight, target = random_box(5, 6), torch.randn(4, 6), torch.randint(4, (5,))
    arguments = (torch.randn(5, 4), *given, weight, target)
    every = torch.ops.fusee.interval_margins_backward(*arguments, 15)
    some = torch.ops.fusee.interval_margins_backward(*arguments, wanted)
    for i, (one, other) in enumerate(zip(some, every, strict=True)):
        assert torch.equal(one, other) if wanted >> i & 1 else one.shape == (0,)


@pytest.mark.parametrize("value", [-1, 4, 2**40, -(2**40)])
def test_a_target_that_is_no_class_makes_its_row_nan(value: int) -> None:
    given, weight, bias = random_box(5, 6), torch.randn(4, 6), torch.randn(4)
    target = torch.randint(4, (5,))
    expected = torch.ops.fusee.interval_margins(*given, weight, bias, target, False)
    target[1] = value
    only_row(torch.ops.fusee.interval_margins(*given, weight, bias, target, False), 1, expected)
    grads = torch.ops.fusee.interval_margins_backward(torch.randn(5, 4), *given, weight, target, 3)
    for grad in grads[:2]:
        assert torch.equal(grad.isnan().all(1), torch.arange(5) == 1)
