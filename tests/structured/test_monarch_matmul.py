"""What is special to the products with structured matrices: their index rules, and what is beneath."""

from __future__ import annotations

import types
from typing import Any

import fusee
import pytest
import torch
from fusee.structured import block_diagonal_matmul as blocks
from fusee.structured import monarch_matmul as module
from torch import Tensor

from tests.structured.record_monarch_matmul import dense_of

SIZES = [(2, 3, 4, 3, 5), (4, 4, 4, 4, 4), (6, 10, 3, 4, 2), (1, 6, 5, 3, 2), (5, 1, 2, 5, 7)]
"""k, q, p, l, s."""


def factors(k: int, q: int, p: int, outer: int, s: int) -> tuple[Tensor, Tensor]:
    return torch.randn(k, q, p).double(), torch.randn(outer, s, k * q // outer).double()


@pytest.mark.parametrize("sizes", SIZES)
def test_index_rules(sizes: tuple[int, int, int, int, int]) -> None:
    """Element by element, as the rules say it."""
    k, q, p, outer, s = sizes
    w1, w2 = factors(*sizes)
    x = torch.randn(k * p).double()
    z = [sum(w1[h // q, h % q, i] * x[h // q * p + i] for i in range(p)) for h in range(k * q)]
    expected = torch.empty(outer * s).double()
    for i in range(outer * s):
        sigma, block = divmod(i, outer)
        terms = (w2[block, sigma, r] * z[r * outer + block] for r in range(k * q // outer))
        expected[i] = sum(terms)
    torch.testing.assert_close(fusee.monarch_matmul(x, w1, w2), expected)


@pytest.mark.parametrize("sizes", SIZES)
def test_tiles_have_the_rank_of_what_they_share(sizes: tuple[int, int, int, int, int]) -> None:
    k, q, p, outer, s = sizes
    dense = fusee.monarch_to_dense(*factors(*sizes))
    tiles = dense.view(s, outer, k, p).permute(2, 1, 0, 3)
    for block in range(k):
        for other in range(outer):
            shared = sum(h % outer == other for h in range(block * q, block * q + q))
            expected = min(shared, s, p)
            assert int(torch.linalg.matrix_rank(tiles[block, other])) == expected


@pytest.mark.parametrize("sizes", SIZES)
def test_dense_matrix(sizes: tuple[int, int, int, int, int]) -> None:
    w1, w2 = factors(*sizes)
    dense = fusee.monarch_to_dense(w1, w2)
    torch.testing.assert_close(dense, dense_of(w1, w2))
    assert dense.is_contiguous()
    x = torch.randn(3, dense.shape[1]).double()
    product = fusee.monarch_matmul(x, w1, w2)
    torch.testing.assert_close(product, torch.nn.functional.linear(x, dense))


@pytest.mark.parametrize("wanted", [1, 2, 3, 4, 5, 6, 7])
def test_gradients_that_are_not_asked_for_are_empty(wanted: int) -> None:
    given = [torch.randn(3, 8), torch.randn(3, 6), torch.randn(2, 4, 3), torch.randn(4, 2, 2)]
    every = torch.ops.fusee.monarch_matmul_backward(*given, 7, False)
    some = torch.ops.fusee.monarch_matmul_backward(*given, wanted, False)
    for i, (one, other) in enumerate(zip(some, every, strict=True)):
        assert torch.equal(one, other) if wanted >> i & 1 else one.shape == (0,)


@pytest.mark.parametrize("sizes", [(16, 16, 16, 16, 16), (3, 10, 7, 6, 5), (4, 40, 33, 4, 50)])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 31, 65])
def test_rows_are_alone(sizes: tuple[int, int, int, int, int], rows: int) -> None:
    """NaN in one row stays there, wherever the row lies in a tile."""
    w1, w2 = (w.float() for w in factors(*sizes))
    x = torch.randn(rows, sizes[0] * sizes[2])
    expected = fusee.monarch_matmul(x, w1, w2)
    bad = x.clone()
    bad[rows // 2] = float("nan")
    result = fusee.monarch_matmul(bad, w1, w2)
    assert result[rows // 2].isnan().all()
    others = torch.arange(rows) != rows // 2
    assert torch.equal(result[others], expected[others])


def test_vmap_over_weights() -> None:
    """An ensemble of layers, on the same input and on one each."""
    w1, w2 = torch.randn(5, 2, 4, 3).double(), torch.randn(5, 4, 3, 2).double()
    bias = torch.randn(5, 12).double()
    x = torch.randn(7, 6).double()
    expected = torch.stack([fusee.monarch_matmul(x, *w) for w in zip(w1, w2, bias, strict=True)])
    together = torch.vmap(fusee.monarch_matmul, in_dims=(None, 0, 0, 0))(x, w1, w2, bias)
    torch.testing.assert_close(together, expected)
    each = torch.vmap(fusee.monarch_matmul)(x.expand(5, 7, 6), w1, w2, bias)
    torch.testing.assert_close(each, expected)


def test_mixed_dtypes_are_for_autocast() -> None:
    x, w1, w2 = torch.randn(3, 6), torch.randn(2, 4, 3), torch.randn(4, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert fusee.monarch_matmul(x.bfloat16(), w1, w2).dtype == torch.bfloat16
        assert fusee.monarch_matmul(x, w1, w2).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="w1 must have the dtype of input"):
        fusee.monarch_matmul(x.bfloat16(), w1, w2)


def test_large_blocks_take_batched_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where these are faster, and only there; the numbers are the same."""
    called = []

    def spy(*args: Any) -> Tensor:
        called.append(args)
        return reference(*args)

    reference = module._reference
    monkeypatch.setattr(module, "_reference", spy)
    x, w1, w2 = torch.randn(2, 1024), torch.randn(1, 1024, 1024), torch.randn(1, 8, 1024)
    large = torch.randn(1, 1024, 1024, requires_grad=True)
    for second, wanted in ((w2, 0), (w2.clone().requires_grad_(), 0), (large, 1)):
        called.clear()
        result = fusee.monarch_matmul(x, w1, second)
        assert len(called) == wanted
        torch.testing.assert_close(result, x @ w1[0].mT @ second[0].mT, rtol=1e-4, atol=1e-2)
    with torch.no_grad():
        fusee.monarch_matmul(x, w1, large)
    assert len(called) == 1
    # Of a single row smaller ones do.
    w1, w2 = torch.randn(1, 256, 256), torch.randn(1, 256, 256, requires_grad=True)
    for rows, wanted in ((1, 2), (2, 2)):
        fusee.monarch_matmul(torch.randn(rows, 256), w1, w2)
        assert len(called) == wanted


@pytest.mark.parametrize("sizes", [(4, 16, 16, 4, 16), (3, 10, 17, 6, 21), (2, 65, 33, 5, 40)])
@pytest.mark.parametrize("rows", [1, 33])
def test_tf32(sizes: tuple[int, int, int, int, int], rows: int) -> None:
    """On tensor cores the operands are rounded to eleven bits where that is allowed; sums are not. The
    CPU has no such products."""
    w1, w2 = (w.float() for w in factors(*sizes))
    x = torch.randn(rows, sizes[0] * sizes[2])
    g = torch.randn(rows, sizes[3] * sizes[4])
    block = torch.randn(rows, sizes[0] * sizes[1])
    calls = [
        (module._monarch_matmul, (x, w1, w2, None)),
        (module._monarch_matmul_backward, (g, x, w1, w2, 7)),
        (blocks._block_diagonal_matmul, (x, w1, None)),
        (blocks._block_diagonal_matmul_backward, (block, x, w1, 3)),
    ]
    for op, given in calls:
        in_double = [t.double() if isinstance(t, Tensor) else t for t in given]
        exact, rounded, plain = (
            outputs if isinstance(outputs, tuple) else (outputs,)
            for outputs in (op(*in_double, False), op(*given, True), op(*given, False))
        )
        for right, one, other in zip(exact, rounded, plain, strict=True):
            if fusee.engine("cpu") == "emulated":
                assert not torch.equal(one, other)
            else:
                assert torch.equal(one, other)
            assert float((one - right).norm() / right.norm()) < 2e-3
            assert float((other - right).norm() / right.norm()) < 1e-6


def test_tf32_is_what_the_user_allows() -> None:
    on_cuda = types.SimpleNamespace(is_cuda=True, dtype=torch.float32)
    half = types.SimpleNamespace(is_cuda=True, dtype=torch.float16)
    before = torch.get_float32_matmul_precision()
    try:
        for precision, wanted in (("highest", False), ("high", True)):
            torch.set_float32_matmul_precision(precision)
            assert blocks.allows_tf32(on_cuda) is wanted  # type: ignore[arg-type]
            assert not blocks.allows_tf32(half)  # type: ignore[arg-type]
            assert not blocks.allows_tf32(torch.ones(1))
    finally:
        torch.set_float32_matmul_precision(before)


def test_half_types_of_large_numbers() -> None:
    """Sums are in float32; on a GPU the middle is rounded to the type, as a product of two layers is."""
    x, w1, w2 = torch.full((1, 4), 20.0), torch.full((2, 2, 2), 40.0), torch.full((2, 2, 2), 1e-2)
    expected = fusee.monarch_matmul(x, w1, w2)
    result = fusee.monarch_matmul(x.half(), w1.half(), w2.half())
    torch.testing.assert_close(result.float(), expected, rtol=2e-3, atol=0)
