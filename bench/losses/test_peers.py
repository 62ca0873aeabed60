"""Checks that the peers compute what we say they do, so that a ratio compares like with like."""

from __future__ import annotations

import warnings
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from bench.losses import peers
from bench.losses.bench_linear_stablemax_cross_entropy import torch_chunked
from bench.losses.bench_perp_grad import eager_loop
from bench.losses.bench_stablemax import eager_stablemax, softmax_of_symlog
from bench.models import resnet50_shapes


def test_cross_entropies_agree() -> None:
    torch.manual_seed(0)
    logits, target = 3 * torch.randn(64, 37), torch.randint(37, (64,))
    reference = peers.eager_float64(logits, target)
    assert reference.dtype == torch.float64
    s = torch.where(logits >= 0, logits + 1, 1 / (1 - logits)).double()
    direct = -(s / s.sum(1, keepdim=True))[torch.arange(64), target].log().mean()
    torch.testing.assert_close(reference, direct, rtol=1e-6, atol=0)
    one_line = peers.symlog_cross_entropy(logits, target)
    torch.testing.assert_close(one_line.double(), reference, rtol=1e-5, atol=0)


def test_stablemax_forms_agree() -> None:
    torch.manual_seed(0)
    x = 3 * torch.randn(8, 50)
    torch.testing.assert_close(eager_stablemax(x), softmax_of_symlog(x))


@pytest.mark.parametrize("rows", [8, None])
def test_chunked_path_of_torch_is_what_runs(rows: int | None) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(32, 16, requires_grad=True), torch.randn(128, 16, requires_grad=True)
    target = torch.randint(128, (32,))
    module = __import__("torch.nn.modules.linear_cross_entropy", fromlist=["_"])
    name = "_linear_cross_entropy_batch_chunked"
    with (
        warnings.catch_warnings(),
        mock.patch.object(module, name, wraps=getattr(module, name)) as chunked,
    ):
        warnings.simplefilter("error")  # torch warns when it ignores `options`
        loss = torch_chunked(rows)(x, w, target)
    assert chunked.call_count == 1
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(x, w), target))


def test_eager_projection_is_orthogonal_and_keeps_the_norm() -> None:
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(4, 3, 2))
    param.grad = torch.randn(4, 3, 2)
    norm = param.grad.norm()
    for _ in range(3):  # the benchmark repeats it in place
        eager_loop([param])
        assert abs((param * param.grad).sum().item()) < 1e-5
        torch.testing.assert_close(param.grad.norm(), norm)


def test_resnet50_has_its_161_tensors() -> None:
    shapes = list(resnet50_shapes())
    assert len(shapes) == 161
    assert sum(torch.Size(s).numel() for s in shapes) == 25_557_032
