"""A table of groups across tensors, for tests."""

from __future__ import annotations

from typing import Any

import torch
from fusee import GroupTable
from torch import Tensor

DOUBLE = torch.float64


def coupled() -> tuple[GroupTable, list[Tensor]]:
    """Two groups across three tensors, one within one, and elements in none; one group is zero."""
    tensors = [torch.randn(4, 3, dtype=DOUBLE), torch.randn(4, dtype=DOUBLE)]
    tensors.append(torch.randn(2, 4, 2, dtype=DOUBLE))
    groups: list[list[Any]] = [[(0, 0, 0), (1, 0, 0), (2, 1, 0)], [(0, 0, 1), (1, 0, 1), (2, 1, 1)]]
    groups += [[(2, 1, [3])], [(0, 0, slice(2, 4)), (1, 0, 2)]]
    tensors[2][:, 3] = 0
    return GroupTable.from_slices(tensors, groups), tensors
