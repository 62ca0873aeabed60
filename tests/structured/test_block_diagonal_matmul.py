"""What is special to the single stage; what it shares with the two is in test_monarch_matmul.py."""

from __future__ import annotations

import fusee
import pytest
import torch


def test_one_stage_is_the_dense_product_of_blocks() -> None:
    w = torch.randn(3, 4, 2).double()
    x = torch.randn(5, 6).double()
    expected = torch.nn.functional.linear(x, torch.block_diag(*w))
    torch.testing.assert_close(fusee.block_diagonal_matmul(x, w), expected)


@pytest.mark.parametrize("wanted", [1, 2, 3])
def test_gradients_that_are_not_asked_for_are_empty(wanted: int) -> None:
    given = [torch.randn(3, 8), torch.randn(3, 6), torch.randn(2, 4, 3)]
    every = torch.ops.fusee.block_diagonal_matmul_backward(*given, 3, False)
    some = torch.ops.fusee.block_diagonal_matmul_backward(*given, wanted, False)
    for i, (one, other) in enumerate(zip(some, every, strict=True)):
        assert torch.equal(one, other) if wanted >> i & 1 else one.shape == (0,)


def test_vmap_over_weights() -> None:
    x, w = torch.randn(7, 6).double(), torch.randn(5, 2, 4, 3).double()
    expected = torch.stack([fusee.block_diagonal_matmul(x, each) for each in w])
    together = torch.vmap(fusee.block_diagonal_matmul, in_dims=(None, 0))(x, w)
    torch.testing.assert_close(together, expected)


@pytest.mark.parametrize("rows", [1, 7, 33])
def test_rows_and_blocks_are_alone(rows: int) -> None:
    """NaN in one block of one row stays in that block of that row."""
    x, w = torch.randn(rows, 3 * 17), torch.randn(3, 10, 17)
    expected = fusee.block_diagonal_matmul(x, w)
    x[rows // 2, 17] = float("nan")
    result = fusee.block_diagonal_matmul(x, w)
    bad = torch.zeros_like(result, dtype=torch.bool)
    bad[rows // 2, 10:20] = True
    assert torch.equal(result.isnan(), bad) and torch.equal(result[~bad], expected[~bad])
