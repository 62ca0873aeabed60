"""The same values in other memory layouts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def transposed(tensor: Tensor) -> Tensor:
    """First and last dimension swapped in memory."""
    if tensor.dim() < 2:
        return tensor
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def sliced(tensor: Tensor) -> Tensor:
    """Every second element of storage, with NaN (or -1) between."""
    if tensor.dim() == 0:
        return tensor
    between = float("nan") if tensor.is_floating_point() else 1
    wide = torch.full((*tensor.shape, 2), between, dtype=tensor.dtype, device=tensor.device)
    wide[..., 0] = tensor
    return wide[..., 0]


def padded(tensor: Tensor) -> Tensor:
    """Rows with a gap between them."""
    if tensor.dim() == 0:
        return tensor
    shape = (*tensor.shape[:-1], tensor.shape[-1] + 3)
    between = float("nan") if tensor.is_floating_point() else 1
    wide = torch.full(shape, between, dtype=tensor.dtype, device=tensor.device)
    wide[..., : tensor.shape[-1]] = tensor
    return wide[..., : tensor.shape[-1]]


def offset(tensor: Tensor) -> Tensor:
    """One element into its storage: contiguous, not aligned to 16 bytes."""
    storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    moved = storage[1:].view(tensor.shape)
    moved.copy_(tensor)
    return moved


def expanded(tensor: Tensor) -> Tensor:
    """The first item repeated with stride zero; these are other values."""
    if tensor.dim() == 0 or tensor.shape[0] == 0:
        return tensor
    return tensor[:1].clone().expand(tensor.shape)


def expanded_last(tensor: Tensor) -> Tensor:
    """The first element of every row repeated with stride zero; these are other values."""
    if tensor.dim() == 0 or tensor.shape[-1] == 0:
        return tensor
    return tensor[..., :1].clone().expand(tensor.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    layout.__name__: layout
    for layout in (transposed, sliced, padded, offset, expanded, expanded_last)
}
