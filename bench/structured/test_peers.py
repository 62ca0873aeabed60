"""Checks that the peers compute what we compute, so that a ratio compares like with like."""

from __future__ import annotations

import fusee
import pytest
import torch

from bench.structured import peers

SIZES = [(3, 4, 4, 4, 4, 4), (2, 4, 6, 3, 8, 5), (1, 3, 4, 5, 2, 7)]
"""Rows, k, q, p, l, s."""


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("peer", [peers.fly_monarch, peers.plain_monarch, peers.dense_linear])
def test_monarch(sizes: tuple[int, ...], peer: object) -> None:
    rows, k, q, p, outer, s = sizes
    given = [torch.randn(rows, k * p), torch.randn(k, q, p), torch.randn(outer, s, k * q // outer)]
    leaves = [t.double().requires_grad_() for t in given]
    dense = fusee.monarch_to_dense(*leaves[1:])
    results = [fusee.monarch_matmul(*leaves), peer(*leaves, dense)]  # type: ignore[operator]
    torch.testing.assert_close(results[1], results[0])
    g = torch.randn_like(results[0])
    ours, theirs = (torch.autograd.grad(r, leaves, g, retain_graph=True) for r in results)
    torch.testing.assert_close(theirs, ours)


def test_blocks() -> None:
    x, w = torch.randn(5, 12), torch.randn(4, 2, 3)
    torch.testing.assert_close(peers.batched_blocks(x, w), fusee.block_diagonal_matmul(x, w))
