"""Cross entropy of the worst outputs: against torch's, against points of boxes, and without overflow."""

from __future__ import annotations

from typing import Any

import fusee
import pytest
import torch
import torch.nn.functional as F

from tests.bounds.networks import fully_connected


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_it_is_cross_entropy_of_the_margins(reduction: str) -> None:
    torch.manual_seed(0)
    target = torch.randint(5, (7,))
    margins = 3 * torch.randn(7, 5, dtype=torch.float64)
    margins[torch.arange(7), target] = 0
    expected = F.cross_entropy(margins, target, reduction=reduction)
    torch.testing.assert_close(fusee.robust_cross_entropy(margins, reduction), expected)
    module = fusee.nn.RobustCrossEntropyLoss(reduction)
    assert torch.equal(module(margins), fusee.robust_cross_entropy(margins, reduction))
    assert reduction in repr(module)


def test_no_point_of_a_box_has_a_larger_loss() -> None:
    torch.manual_seed(1)
    model = fully_connected(6, 16, 16, 4).double()
    net = fusee.nn.IntervalModel(model)
    x, target = torch.rand(5, 6, dtype=torch.float64), torch.randint(4, (5,))
    bound = fusee.robust_cross_entropy(net.margins(x - 0.05, x + 0.05, target), "none")
    points = x + 0.05 * (2 * torch.rand(2000, 5, 6, dtype=torch.float64) - 1)
    losses = F.cross_entropy(model(points).flatten(0, 1), target.repeat(2000), reduction="none")
    assert bool((losses.view(2000, 5) <= bound).all())
    clean = fusee.robust_cross_entropy(net.margins(x, x, target))
    torch.testing.assert_close(clean, F.cross_entropy(model(x), target))


def test_loose_bounds_do_not_overflow() -> None:
    """Where the sum of exponentials is infinite, the loss is the largest margin."""
    margins = torch.tensor([[0.0, 1e4, -1e4], [0.0, 3e38, 1.0]], requires_grad=True)
    loss = fusee.robust_cross_entropy(margins, "none")
    assert loss.tolist() == [1e4, margins[1, 1].item()]
    (grad,) = torch.autograd.grad(loss.sum(), margins)
    assert grad.tolist() == [[0, 1, 0], [0, 1, 0]]


def test_shapes_and_half_types() -> None:
    margins = torch.randn(2, 3, 4)
    assert fusee.robust_cross_entropy(margins, "none").shape == (2, 3)
    for margin in torch.linspace(0, 1, 20):
        # Rounding each row would move the sum.
        low = torch.stack([0 * margin, margin]).expand(700, 2).bfloat16()
        loss = fusee.robust_cross_entropy(low, "sum")
        assert loss.dtype == torch.bfloat16
        assert torch.equal(loss, fusee.robust_cross_entropy(low.float(), "sum").bfloat16())
    assert fusee.robust_cross_entropy(margins[:0]).isnan()
    assert fusee.robust_cross_entropy(margins[:0], "sum") == 0


def test_gradients() -> None:
    margins = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fusee.robust_cross_entropy, (margins,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(fusee.robust_cross_entropy, (margins,))


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "margins must be a Tensor, got list", ([0.0, 1.0],)),
        (TypeError, "margins must have dtype", (torch.zeros(2, 2, dtype=torch.int64),)),
        (ValueError, "margins must have classes", (torch.tensor(0.0),)),
        (ValueError, "margins must have classes", (torch.zeros(2, 0),)),
        (ValueError, "reduction must be one of", (torch.zeros(2, 2), "max")),
    ],
)
def test_errors(error: type[Exception], match: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(error, match=match):
        fusee.robust_cross_entropy(*arguments)


def test_errors_of_the_module() -> None:
    with pytest.raises(ValueError, match="reduction must be one of"):
        fusee.nn.RobustCrossEntropyLoss("max")
