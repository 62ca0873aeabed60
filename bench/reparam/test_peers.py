"""Checks that the peers compute what we say they do, so that a ratio compares like with like."""

from __future__ import annotations

import fusee
import pytest
import torch

from bench.reparam.bench_compand import SMALL_OF_RESNET50, loop_of_calls
from bench.reparam.peers import FUNCTIONS, eager_compand, eager_loop


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("channels", [1, 6])
def test_expression_is_the_curve(kind: str, channels: int) -> None:
    torch.manual_seed(0)
    v, a, b = torch.randn(6, 4, 3, 3), torch.rand(channels) + 0.5, torch.rand(channels) + 0.5
    leaves = [t.requires_grad_() for t in (v, a, b)]
    grad = torch.randn(6, 4, 3, 3)
    results = []
    for function in (eager_compand(kind), lambda *t: fusee.compand(*t, kind)):
        w = function(*leaves)
        results.append((w, *torch.autograd.grad(w, leaves, grad)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_loops_are_the_list() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(shape) for shape in ((8, 3, 3, 3), (8,), (4, 8))]
    a, b = ([torch.tensor([x]) for x in values] for values in ((1.5, 1.0, 2.0), (0.5, 0.75, 1.0)))
    expected = fusee.compand_foreach(inputs, a, b)
    for loop in (loop_of_calls(), eager_loop):
        torch.testing.assert_close(loop(inputs, a, b), expected)


def test_most_tensors_of_resnet50_are_small() -> None:
    assert len(SMALL_OF_RESNET50) == 107
