"""The Monarch matrix nearest to a dense one, and the dense one that a Monarch matrix is."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusee._checks import accumulate_dtype, check_floating, require_values
from fusee.structured.monarch_matmul import check_factors, monarch_matmul


def check_count(name: str, value: Any) -> int:
    """A plain positive int."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be positive, got {value}")
    return value


class MonarchShape:
    """The sizes of both factors, with as many blocks each, for a dense matrix of any size.

    Args:
        in_features, out_features: of the dense matrix, which is padded with zeros to multiples of the
            blocks: ``in_padded`` and ``out_padded``.
        nblocks: k = l.
        rank: of each tile of the dense matrix; None for a middle as wide as the narrower side, where no
            tile is without any.
    """

    def __init__(self, in_features: int, out_features: int, nblocks: Any, rank: Any) -> None:
        self.nblocks = check_count("nblocks", nblocks)
        self.columns = -(-in_features // self.nblocks)
        self.rows = -(-out_features // self.nblocks)
        self.in_padded, self.out_padded = self.columns * nblocks, self.rows * nblocks
        self.middle = max(min(self.columns, self.rows), self.nblocks)
        if rank is not None:
            self.middle = check_count("rank", rank) * self.nblocks

    @property
    def w1(self) -> tuple[int, int, int]:
        return self.nblocks, self.middle, self.columns

    @property
    def w2(self) -> tuple[int, int, int]:
        return self.nblocks, self.rows, self.middle


def monarch_project(
    dense: Tensor, nblocks: int, rank: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Finds the Monarch matrix that is nearest to a dense one in the Frobenius norm.

    A Monarch matrix with l = k = ``nblocks`` is a grid of tiles, tile (κ, λ) being the columns of block
    κ in the rows that are λ modulo l, and each tile is any matrix of its rank. So the nearest one has
    the truncated singular value decomposition of every tile, and the error is what is cut off:

    .. math:: \text{error}^2 = \sum_{\kappa\lambda} \sum_{t > \text{rank}} \sigma_t(T_{\kappa\lambda})^2

    Args:
        dense: (out_features, in_features), as the weight of ``torch.nn.Linear``; float32, float64,
            bfloat16 or float16 (computed in float32). Sizes that are not multiples of ``nblocks`` are
            padded with zeros.
        nblocks: blocks of each factor.
        rank: of each tile. None for what :class:`fusee.nn.MonarchLinear` uses, a middle width of
            ceil(min(in_features, out_features) / nblocks) for each block, and at least ``nblocks``, so
            that no tile is without rank; where ``nblocks`` does not divide it, some tiles have one rank
            more than others.

    Returns:
        ``w1`` (nblocks, q, p) and ``w2`` (nblocks, s, q), in the dtype of ``dense``, with the singular
        values' roots in both, p = ceil(in_features / nblocks) and s = ceil(out_features / nblocks); and
        the error, the norm of the difference, a scalar in float32, or float64 for float64.

    Raises:
        TypeError: ``dense`` is not a dense floating-point tensor, or a number is no int.
        ValueError: ``dense`` is not a matrix or is not finite (raised for CPU tensors in eager mode), or
            a number is not positive.

    Not differentiable: singular vectors have no derivative where singular values meet.
    Deterministic as far as ``torch.linalg.svd`` is.

    Source: Dao et al., "Monarch", arXiv:2204.00595, for square matrices of rank one; the same for every
    rectangle and rank.

    Example:
        >>> import torch, fusee
        >>> w1, w2, error = fusee.monarch_project(torch.eye(4), nblocks=2)
        >>> w1.shape, w2.shape, error  # a tile of the identity has rank one
        (torch.Size([2, 2, 2]), torch.Size([2, 2, 2]), tensor(0.))
    """
    check_floating("dense", dense)
    if dense.dim() != 2:
        raise ValueError(f"dense must be a matrix, got shape {tuple(dense.shape)}")
    out_features, in_features = dense.shape
    shape = MonarchShape(in_features, out_features, nblocks, rank)

    def raise_error() -> None:
        raise ValueError("dense must be finite")

    require_values(dense, lambda: ~dense.isfinite().all(), raise_error)
    with torch.no_grad():
        matrix = dense.detach().to(accumulate_dtype(dense.dtype))
        pad = (0, shape.in_padded - in_features, 0, shape.out_padded - out_features)
        w1, w2, error = _nearest(F.pad(matrix, pad), shape)
    return w1.to(dense.dtype), w2.to(dense.dtype), error


def _nearest(matrix: Tensor, shape: MonarchShape) -> tuple[Tensor, Tensor, Tensor]:
    k, width = shape.nblocks, shape.middle
    # Tiles (k, l, s, p), of which (block, other) has the middle's elements that are in both.
    tiles = matrix.view(shape.rows, k, k, shape.columns).permute(2, 1, 0, 3)
    u, s, v = torch.linalg.svd(tiles, full_matrices=False)
    hidden = torch.arange(k * width, device=matrix.device)
    block, other = hidden // width, hidden % k
    # The how manyth of these an element is.
    place = (hidden % width - (other - block * width) % k) // k
    ranks = torch.zeros(k, k, dtype=torch.int64, device=matrix.device)
    ranks.index_put_((block, other), torch.ones_like(hidden), accumulate=True)
    count = s.shape[-1]
    cut = torch.arange(count, device=matrix.device) >= ranks.unsqueeze(-1)
    left = s.where(cut, 0.0)
    largest = left.max() if left.numel() else left.sum()
    scale = torch.where(largest > 0, largest, 1.0)  # as squares might leave the range
    error = scale * (left / scale).square().sum().sqrt()
    if count == 0:
        return matrix.new_zeros(shape.w1), matrix.new_zeros(shape.w2), error
    at = block, other, place.clamp(max=count - 1)
    root = s[at].sqrt().where(place < count, 0.0).unsqueeze(1)
    w1 = (root * v[at]).view(shape.w1)
    w2 = (root * u.mT[at]).view(width, k, shape.rows).permute(1, 2, 0).contiguous()
    return w1, w2, error


def monarch_to_dense(w1: Tensor, w2: Tensor) -> Tensor:
    r"""The dense matrix that the two factors of a Monarch matrix make.

    .. math:: M = P_{(l,s)}\, \text{blkdiag}(W^2)\, P_{(l,r)}^\top\, \text{blkdiag}(W^1)

    Args:
        w1: (k, q, p), see :func:`fusee.monarch_matmul`.
        w2: (l, s, r) with l * r = k * q.

    Returns:
        M (l * s, k * p), so that ``fusee.monarch_matmul(x, w1, w2)`` is ``F.linear(x, M)``.

    Raises:
        TypeError, ValueError: as :func:`fusee.monarch_matmul`.

    Differentiable to any order. Deterministic.

    Source: as :func:`fusee.monarch_matmul`.

    Example:
        >>> import torch, fusee
        >>> w1 = torch.eye(2).repeat(2, 1, 1)
        >>> w2 = torch.tensor([[[1.0, 1.0]], [[1.0, -1.0]]])
        >>> fusee.monarch_to_dense(w1, w2)
        tensor([[ 1.,  0.,  1.,  0.],
                [ 0.,  1.,  0., -1.]])
    """
    check_factors(w1, w2)
    features = w1.shape[0] * w1.shape[2]
    identity = torch.eye(features, dtype=w1.dtype, device=w1.device)
    with torch.autocast(w1.device.type, enabled=False):
        return monarch_matmul(identity, w1, w2).mT.contiguous()
