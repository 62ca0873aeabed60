"""The pieces of groups: slices of tensors, as they are given to a table of groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusee._checks import check_dim, check_tensor

Indices = int | slice | Sequence[int] | Tensor | None
Piece = tuple[int, int | None, Indices]
"""Part of a group: the number of a tensor, a dimension of it, and which slices along that."""

INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def empty_ids(tensors: Sequence[Tensor]) -> list[Tensor]:
    for number, tensor in enumerate(tensors):
        check_tensor(f"tensor {number}", tensor)
    return [torch.full(t.shape, -1, dtype=torch.int64, device=t.device) for t in tensors]


def check_piece(piece: Any, ids: list[Tensor]) -> tuple[int, int | None, Indices]:
    if not isinstance(piece, tuple) or len(piece) != 3:
        raise TypeError(f"groups must have pieces (tensor, dim, indices), got {piece!r}")
    number, dim, indices = piece
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"groups must number tensors by ints, got {type(number).__name__}")
    if not 0 <= number < len(ids):
        raise IndexError(f"groups must number tensors below {len(ids)}, got {number}")
    if dim is None:
        if indices is not None:
            raise TypeError("groups must have a dimension where a piece has indices, got None")
        return number, None, None
    return number, check_dim(dim, ids[number].dim()), indices


def check_indices(indices: Any, extent: int, device: torch.device) -> Tensor:
    if indices is None:
        indices = slice(None)
    if isinstance(indices, slice):
        indices = range(*indices.indices(extent))
    if isinstance(indices, Tensor):
        if indices.dtype not in INTEGER_DTYPES:
            raise TypeError(f"groups must have indices that are integers, got {indices.dtype}")
        chosen = indices.reshape(-1).to(device, torch.int64)
    else:
        listed = [indices] if isinstance(indices, int) else list(indices)
        if any(isinstance(i, bool) or not isinstance(i, int) for i in listed):
            raise TypeError(f"groups must have indices that are ints, got {indices!r}")
        chosen = torch.tensor(listed, dtype=torch.int64, device=device)
    wrong = chosen[(chosen < 0) | (chosen >= extent)]
    if wrong.numel():
        raise IndexError(f"groups must have indices in [0, {extent - 1}], got {int(wrong[0])}")
    return chosen
