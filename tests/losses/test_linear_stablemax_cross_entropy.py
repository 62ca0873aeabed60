"""The loss of a linear layer without its logits: equal to the loss with them, in less memory."""

from __future__ import annotations

import math
from typing import Any

import fusee
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.harness.measure import ulps

loss_of = fusee.linear_stablemax_cross_entropy


def materialised(input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    logits = F.linear(input, linear_weight, options.pop("linear_bias", None))
    return fusee.stablemax_cross_entropy(logits, target, dim=-1, **options)


def both(*tensors: Tensor, target: Tensor, **options: Any) -> list[tuple[Tensor, Tensor]]:
    """Losses and gradients, without and with the logits."""
    input, linear_weight, *bias = [t.detach().requires_grad_() for t in tensors]
    if bias:
        options["linear_bias"] = bias[0]
    results = []
    for function in (loss_of, materialised):
        loss = function(input, linear_weight, target, **options)
        grads = torch.autograd.grad(loss.sum(), [input, linear_weight, *bias])
        results.append([loss.detach(), *grads])
    return list(zip(*results, strict=True))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_equal_to_the_loss_of_logits(
    bias: bool, weighted: bool, smoothing: float, reduction: str
) -> None:
    """Over all options, in float64, gradients included."""
    x, w = torch.randn(17, 8).double(), torch.randn(23, 8).double()
    target = torch.randint(0, 23, (17,))
    target[3] = -100
    tensors = [x, w, *([torch.randn(23).double()] if bias else [])]
    weight = torch.rand(23).double() if weighted else None
    options = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
    for actual, expected in both(*tensors, target=target, **options):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.threads
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("classes", [50_257, 128_256])
def test_several_blocks_of_classes(classes: int, reduction: str) -> None:
    """Vocabularies that take several blocks, with targets in the first and the last of them; a mean
    takes chunks of rows, and an unreduced loss blocks of classes in its backward pass."""
    x, w = torch.randn(128, 16), torch.randn(classes, 16) / 4
    target = torch.randint(0, classes, (128,))
    target[0], target[1], target[2] = 0, classes - 1, -100
    for actual, expected in both(x, w, target=target, label_smoothing=0.1, reduction=reduction):
        assert ulps(actual, expected) <= 64


@pytest.mark.threads
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_several_blocks_in_half_types(smoothing: float) -> None:
    """Half types take blocks of classes in both passes. The logits are rounded as those of the
    materialised form are, so the losses agree to float32 and the gradients to a few roundings."""
    x, w = torch.randn(128, 16).bfloat16(), (torch.randn(50_257, 16) / 4).bfloat16()
    target = torch.randint(0, 50_257, (128,))
    target[0], target[1], target[2] = 0, 50_256, -100
    loss, *grads = both(x, w, target=target, label_smoothing=smoothing)
    torch.testing.assert_close(*loss, rtol=1e-6, atol=0)
    for actual, expected in grads:
        assert (actual - expected).double().norm() <= 0.01 * expected.double().norm()


@pytest.mark.threads
def test_confident_rows() -> None:
    """The loss keeps its digits where the target's logit is far above the rest."""
    w = torch.full((113, 1), -1.0)
    w[7] = 1.0
    loss = loss_of(torch.tensor([[1e8]]), w, torch.tensor([7]))
    assert loss.item() == pytest.approx(1.12e-14, rel=1e-5)


def test_nan_stays_in_its_row() -> None:
    """A NaN in a row of the input reaches its loss and its gradient, and no other row's."""
    x, w = torch.randn(4, 6, requires_grad=True), torch.randn(5, 6)
    with torch.no_grad():
        x[2, 3] = math.nan
    loss = loss_of(x, w, torch.tensor([0, 1, 2, 3]), reduction="none")
    assert loss.isnan().tolist() == [False, False, True, False]
    loss.sum().backward()
    assert x.grad is not None
    assert x.grad.isnan().any(1).tolist() == [False, False, True, False]


@pytest.mark.threads
def test_logits_are_not_kept() -> None:
    """What is saved is at most the gradients of the layer, formed in the forward pass, and
    16 bytes a row: nothing of the size of the logits."""
    rows, classes, features = 64, 20_000, 4
    x = torch.randn(rows, features, requires_grad=True)
    w = torch.randn(classes, features, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    target = torch.randint(0, classes, (rows,))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(x, w, target)
    assert loss.requires_grad
    for argument in (x, w, target):
        kept.pop(argument.untyped_storage().data_ptr(), None)
    assert sum(kept.values()) <= x.nbytes + w.nbytes + 16 * rows + 64


@pytest.mark.threads
@pytest.mark.processes
def test_peak_memory() -> None:
    """Beyond inputs, loss and gradients, the peak is under a tenth of the logits."""
    import subprocess
    import sys

    code = """
import resource, torch, fusee
torch.set_num_threads(1)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
rows, features, classes = 1024, 64, 131072
x = torch.randn(rows, features, requires_grad=True)
w = (torch.randn(classes, features) / 8).requires_grad_()
target = torch.randint(0, classes, (rows,))
fusee.linear_stablemax_cross_entropy(x[:2], w[:4096], target[:2] % 4096).backward()
x.grad = w.grad = None
before = peak()
fusee.linear_stablemax_cross_entropy(x, w, target).backward()
print(peak() - before - x.nbytes - w.nbytes, 4 * rows * classes)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    extra, logits = map(int, done.stdout.split())
    assert extra < logits / 10


def test_module() -> None:
    """The module calls the function with its layer, and keeps its class weights as a buffer."""
    torch.manual_seed(0)
    weight = torch.rand(5)
    module = fusee.nn.LinearStableMaxCrossEntropyLoss(
        6, 5, bias=True, weight=weight, label_smoothing=0.1, dtype=torch.float64
    )
    x, target = torch.randn(4, 6).double(), torch.tensor([0, 4, 2, 1])
    expected = fusee.stablemax_cross_entropy(module.logits(x), target, weight, label_smoothing=0.1)
    torch.testing.assert_close(module(x, target), expected)
    assert sorted(module.state_dict()) == ["bias", "class_weight", "weight"]
    assert "in_features=6, num_classes=5, bias=True" in repr(module)
    torch.manual_seed(0)
    torch.rand(5)
    assert torch.equal(module.weight, torch.nn.Linear(6, 5, dtype=torch.float64).weight)
