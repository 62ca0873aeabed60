"""The projection onto Monarch matrices: its error, and that no other is nearer."""

from __future__ import annotations

import fusee
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES = [
    (12, 12, 3, None),
    (20, 12, 4, None),
    (12, 20, 4, 2),
    (13, 7, 3, None),
    (7, 13, 3, 1),
    (5, 5, 2, 7),
    (6, 4, 4, None),
    (1, 1, 1, None),
]
"""out_features, in_features, nblocks, rank."""


def projected(dense: Tensor, nblocks: int, rank: int | None) -> tuple[Tensor, Tensor, float]:
    """The projection, the padded matrix, and the error that it states."""
    w1, w2, error = fusee.monarch_project(dense, nblocks, rank)
    near = fusee.monarch_to_dense(w1, w2)
    pad = (0, near.shape[1] - dense.shape[1], 0, near.shape[0] - dense.shape[0])
    return near, F.pad(dense, pad), float(error)


@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_the_norm_of_the_difference(shape: tuple[int, int, int, int | None]) -> None:
    *size, nblocks, rank = shape
    dense = torch.randn(size, dtype=torch.float64)
    near, padded, error = projected(dense, nblocks, rank)
    assert float((near - padded).norm()) == pytest.approx(error, abs=1e-13)
    torch.testing.assert_close(near[size[0] :], torch.zeros_like(near[size[0] :]))


@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_the_singular_tail(shape: tuple[int, int, int, int | None]) -> None:
    """Of each tile, beyond as many singular values as the middle gives it."""
    *size, k, rank = shape
    dense = torch.randn(size, dtype=torch.float64)
    w1, _, error = fusee.monarch_project(dense, k, rank)
    _, width, columns = w1.shape
    rows = -(-size[0] // k)
    padded = F.pad(dense, (0, k * columns - size[1], 0, k * rows - size[0]))
    tail = 0.0
    for block in range(k):
        for other in range(k):
            kept = sum(h % k == other for h in range(block * width, (block + 1) * width))
            tile = padded[other::k, block * columns : (block + 1) * columns]
            tail += float(torch.linalg.svdvals(tile)[kept:].square().sum())
    assert float(error) == pytest.approx(tail**0.5, abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_monarch_matrices_stay(shape: tuple[int, int, int, int | None]) -> None:
    *size, nblocks, rank = shape
    w1, w2, _ = fusee.monarch_project(torch.randn(size, dtype=torch.float64), nblocks, rank)
    dense = fusee.monarch_to_dense(w1, w2)[: size[0], : size[1]]
    near, padded, error = projected(dense, nblocks, rank)
    assert error < 1e-12
    torch.testing.assert_close(near, padded)


def test_no_descent_from_it() -> None:
    """The gradient of the distance in both factors is zero, and steps away from it lead up."""
    dense = torch.randn(12, 8, dtype=torch.float64)
    w1, w2, error = fusee.monarch_project(dense, 4)
    leaves = [w1.requires_grad_(), w2.requires_grad_()]
    distance = (fusee.monarch_to_dense(*leaves) - dense).square().sum()
    for gradient in torch.autograd.grad(distance, leaves):
        assert float(gradient.abs().max()) < 1e-12
    for _ in range(20):
        moved = [w.detach() + 0.1 * torch.randn_like(w) for w in leaves]
        assert float((fusee.monarch_to_dense(*moved) - dense).norm()) > float(error)


def test_factors_are_balanced() -> None:
    w1, w2, _ = fusee.monarch_project(torch.randn(16, 16, dtype=torch.float64), 4)
    torch.testing.assert_close(w1.square().sum(), w2.square().sum())


@pytest.mark.parametrize("n", [16, 36, 64])
def test_discrete_fourier_transform(n: int) -> None:
    """A Monarch matrix, once its columns are permuted; its real part is one of rank two."""
    k = int(n**0.5)
    i = torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(2 * torch.pi * i[:, None] * i / n)
    columns = torch.arange(n).view(k, k).T.reshape(-1)
    _, _, error = fusee.monarch_project(matrix[:, columns], k, rank=2)
    assert float(error) < 1e-10
    _, _, error = fusee.monarch_project(matrix, k, rank=1)
    assert float(error) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    dense = torch.randn(24, 16)
    w1, w2, error = fusee.monarch_project(dense.to(dtype), 4)
    assert w1.dtype == w2.dtype == dtype and error.dtype == torch.float32
    expected = fusee.monarch_project(dense.to(dtype).double(), 4)
    near = fusee.monarch_to_dense(w1.double(), w2.double())
    tolerance = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(near, fusee.monarch_to_dense(*expected[:2]), rtol=0, atol=tolerance)
    assert float(error) == pytest.approx(float(expected[2]), rel=1e-5)


@pytest.mark.parametrize("scale", [1e-25, 1e22])
def test_errors_of_any_size(scale: float) -> None:
    dense = torch.randn(16, 16)
    error = fusee.monarch_project(dense, 4)[2]
    assert float(fusee.monarch_project(scale * dense, 4)[2]) == pytest.approx(scale * float(error))


def test_empty_matrices() -> None:
    w1, w2, error = fusee.monarch_project(torch.ones(0, 4), 2)
    assert (w1.shape, w2.shape, float(error)) == ((2, 2, 2), (2, 0, 2), 0.0)
    assert fusee.monarch_to_dense(w1, w2).shape == (0, 4)


@pytest.mark.parametrize(
    ("kind", "match", "changed"),
    [
        (TypeError, "dense must be a Tensor", {"dense": [[1.0]]}),
        (TypeError, "dense must have dtype", {"dense": torch.ones(2, 2, dtype=torch.int64)}),
        (ValueError, "dense must be a matrix", {"dense": torch.ones(3)}),
        (ValueError, "dense must be finite", {"dense": torch.full((2, 2), float("nan"))}),
        (TypeError, "nblocks must be an int, got float", {"nblocks": 2.0}),
        (ValueError, "nblocks must be positive, got 0", {"nblocks": 0}),
        (TypeError, "rank must be an int, got bool", {"rank": True}),
        (ValueError, "rank must be positive, got -1", {"rank": -1}),
    ],
)
def test_errors(kind: type[Exception], match: str, changed: dict[str, object]) -> None:
    given: dict[str, object] = {"dense": torch.randn(4, 4), "nblocks": 2, **changed}
    with pytest.raises(kind, match=match):
        fusee.monarch_project(**given)  # type: ignore[arg-type]
