"""Tensors as (outer, n, inner), the shape in which operators along one dimension take them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """A tensor folded along one dimension, without a copy where its strides allow it."""

    folded: Tensor
    """(outer, n, inner), contiguous."""
    moved_shape: torch.Size
    position: int
    """Where the dimension stands in ``moved_shape``."""
    dim: int

    def unfold(self, result: Tensor) -> Tensor:
        """Gives an elementwise result, shaped as ``folded``, the original shape."""
        return result.reshape(self.moved_shape).movedim(self.position, self.dim)


def fold_rows(input: Tensor, dim: int) -> Rows:
    """Folds ``input`` along ``dim`` (counted from the front); a scalar counts as one element."""
    if input.dim() == 0:
        return Rows(input.reshape(1, 1, 1), input.shape, 0, 0)
    position = dim
    if not input.is_contiguous():
        # A tensor whose memory order has the dimension last (logits transposed to (B, V, T)) or first
        # is taken in that order.
        for candidate in (input.dim() - 1, 0):
            if input.movedim(dim, candidate).is_contiguous():
                position = candidate
                break
    moved = input.movedim(dim, position)
    shape = moved.shape
    outer, inner = math.prod(shape[:position]), math.prod(shape[position + 1 :])
    folded = moved.reshape(outer, shape[position], inner)
    return Rows(folded, shape, position, dim)
