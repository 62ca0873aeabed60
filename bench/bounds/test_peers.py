"""Checks that the peers compute what we compute, so that a ratio compares like with like."""

from __future__ import annotations

import fusee
import pytest
import torch
from torch import Tensor, nn

from bench.bounds import peers
from bench.bounds.bench_interval_affine import eager_batch_norm
from bench.bounds.bench_interval_model import cnn7, mlp

NETWORKS = [(mlp(16, 6), (6,)), (cnn7(4, False, 8), (3, 8, 8)), (cnn7(4, True, 8), (3, 8, 8))]


def box(*shape: int) -> list[Tensor]:
    return [torch.randn(shape).double(), torch.rand(shape).double()]


@pytest.mark.parametrize("peer", [peers.pair_linear, peers.cached_linear])
def test_linear(peer: object) -> None:
    given = [*box(5, 6), torch.randn(4, 6).double(), torch.randn(4).double()]
    expected = fusee.interval_linear(*given)
    result = peer(*given, given[2].abs())  # type: ignore[operator]
    torch.testing.assert_close(result, expected)


def test_channels() -> None:
    given = box(3, 4, 2, 2)
    torch.testing.assert_close(peers.eager_relu(*given), fusee.interval_relu(*given))
    statistics = [torch.randn(4).double(), torch.rand(4).double() + 0.5]
    statistics += [torch.randn(4).double(), torch.randn(4).double()]
    expected = fusee.interval_batch_norm(*given, *statistics, relu=True)
    torch.testing.assert_close(eager_batch_norm(*given, *statistics), expected)


def test_margins() -> None:
    given = [*box(5, 6), torch.randn(4, 6).double(), torch.randn(4).double()]
    target = torch.randint(4, (5,))
    expected = fusee.interval_margins(*given, target)
    torch.testing.assert_close(peers.eager_margins(*given, target), expected)


@pytest.mark.parametrize("case", NETWORKS)
@pytest.mark.parametrize("peer", ["plain", "auto_LiRPA"])
def test_networks(case: tuple[nn.Sequential, tuple[int, ...]], peer: str) -> None:
    """Equal to rounding; auto_LiRPA where it can be imported."""
    model, shape = case
    for layer in model:
        if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
    x = torch.rand(3, *shape)
    if peer == "plain":
        bounds = peers.PlainBounds(model)
    else:
        pytest.importorskip("auto_LiRPA")
        bounds = peers.lirpa_bounds(model, (3, *shape))  # type: ignore[assignment]
    ours = fusee.interval_bounds(model, x - 0.05, x + 0.05)
    torch.testing.assert_close(bounds(x - 0.05, x + 0.05), ours, atol=1e-5, rtol=1e-5)
