"""Scopes: the groups that share one k, of many tensors at once, laid out for the in-place operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusee._checks import check_floating, check_same_device
from fusee._op import is_readable
from fusee.prox.group_table import GroupTable
from fusee.prox.groups import Dims, Weights, check_dims, marked


class Scope(NamedTuple):
    """The tensors whose groups share one k.

    Without a table the groups are the slices along ``dim``, those of one tensor after those of another.
    """

    tensors: tuple[Tensor, ...]
    dim: Dims = 0
    table: GroupTable | None = None
    weights: Weights = None


class Placed(NamedTuple):
    """A tensor as (outer, groups, inner) in the order of its memory; its groups are those of the scope
    from ``first`` on."""

    scope: int
    first: int
    outer: int
    groups: int
    inner: int


def placed(layout: Sequence[int]) -> list[Placed]:
    """The inverse of flattening places into one list, as the operators take them."""
    return [Placed(*layout[i : i + 5]) for i in range(0, len(layout), 5)]


def as_placed(tensor: Tensor, place: Placed) -> Tensor:
    """The tensor as (outer, groups, inner), a view in the order of its memory."""
    _, _, outer, groups, inner = place
    return tensor.as_strided((outer, groups, inner), (groups * inner, inner, 1))


def memory_order(tensor: Tensor) -> list[int] | None:
    """The dimensions in the order of the memory, None where the memory has gaps or is shared."""
    if tensor.is_contiguous() or tensor.numel() == 0:
        return list(range(tensor.dim()))

    def outermost(d: int) -> tuple[int, int]:
        return tensor.stride(d), tensor.shape[d]

    order = sorted(range(tensor.dim()), key=outermost, reverse=True)
    expected = 1
    for d in reversed(order):
        if tensor.shape[d] != 1 and tensor.stride(d) != expected:
            return None
        expected *= tensor.shape[d]
    return order


def check_apart(tensors: Sequence[Tensor]) -> None:
    """Raises ValueError where a tensor begins in the memory of another that is without gaps."""
    if torch.compiler.is_compiling():
        return
    begins = []
    for i, tensor in enumerate(tensors):
        if is_readable(tensor) and tensor.numel() and tensor.device.type in ("cpu", "cuda"):
            begins.append((tensor.data_ptr(), memory_order(tensor) is None, i))
    end, last = 0, 0
    for begin, gaps, i in sorted(begins):
        if begin < end:
            one, other = sorted((last, i))
            raise ValueError(
                f"tensors must not share memory, got tensors[{one}] and tensors[{other}] that do"
            )
        if not gaps:
            end, last = begin + tensors[i].numel() * tensors[i].element_size(), i


def place_by_dims(tensor: Tensor, dim: Dims, scope: int, first: int) -> Placed | None:
    """None where the groups do not lie in memory as (outer, groups, inner) in their order."""
    dims = check_dims(dim, tensor.dim())
    order = memory_order(tensor)
    if order is None:
        return None
    extents = [tensor.shape[d] for d in order]
    places = [order.index(d) for d in dims]
    if not places:
        return Placed(scope, first, 1, 1, tensor.numel())
    begin, end = places[0], places[0] + len(places)
    if places != list(range(begin, end)):
        return None
    outer, groups, inner = (
        math.prod(part) for part in (extents[:begin], extents[begin:end], extents[end:])
    )
    return Placed(scope, first, outer, groups, inner)


def place_by_ids(tensor: Tensor, ids: Tensor, scope: int) -> Placed | None:
    """None where the numbers of the groups do not rise by one along (outer, groups, inner)."""
    order = memory_order(tensor)
    if order is None or not ids.numel():
        return None
    flat = ids.permute(order).reshape(-1)
    first, last = int(flat[0]), int(flat[-1])
    groups = last - first + 1
    if first < 0 or groups < 1:
        return None
    others = (flat != first).nonzero()
    inner = int(others[0]) if others.numel() else flat.numel()
    if flat.numel() % (groups * inner):
        return None
    outer = flat.numel() // (groups * inner)
    wanted = torch.arange(first, last + 1, device=ids.device)[:, None].expand(outer, groups, inner)
    if not torch.equal(flat, wanted.reshape(-1)):
        return None
    return Placed(scope, first, outer, groups, inner)


def groups_of_dims(tensor: Tensor, dim: Dims) -> int:
    return math.prod([tensor.shape[d] for d in check_dims(dim, tensor.dim())])


def table_of_dims(tensors: Sequence[Tensor], dim: Dims) -> GroupTable:
    """The groups of a scope without a table as one."""
    ids, first = [], 0
    for tensor in tensors:
        dims, groups = check_dims(dim, tensor.dim()), groups_of_dims(tensor, dim)
        along = [tensor.shape[d] if d in dims else 1 for d in range(tensor.dim())]
        numbers = torch.arange(first, first + groups, device=tensor.device)
        ids.append(numbers.reshape(along).expand(tensor.shape))
        first += groups
    return GroupTable(ids, first)


def scope_groups(scope: Scope) -> int:
    """How many groups a scope has."""
    if scope.table is not None:
        return scope.table.groups
    return sum(groups_of_dims(tensor, scope.dim) for tensor in scope.tensors)


def scope_weights(scope: Scope) -> Tensor | None:
    """The weights of a scope's groups in float64; None for ones. Raises as ``prox_group_envelope``."""
    if scope.weights is None:
        return None
    device = scope.tensors[0].device
    count = scope_groups(scope)
    if isinstance(scope.weights, str):
        if scope.weights not in ("size", "inverse_size"):
            raise ValueError(
                f"weights must be 'size', 'inverse_size' or a Tensor, got {scope.weights!r}"
            )
        if scope.table is not None:
            sizes = scope.table.sizes.double()
        else:
            parts = []
            for tensor in scope.tensors:
                groups = groups_of_dims(tensor, scope.dim)
                size = max(tensor.numel() // max(groups, 1), 1)
                parts.append(torch.full((groups,), size, dtype=torch.float64, device=device))
            sizes = torch.cat(parts)
        return sizes if scope.weights == "size" else 1 / sizes
    if not isinstance(scope.weights, Tensor):
        raise TypeError(
            "weights must be 'size', 'inverse_size' or a floating-point Tensor, got "
            f"{type(scope.weights).__name__}"
        )
    check_floating("weights", scope.weights)
    check_same_device("weights", scope.weights, "the tensors", scope.tensors[0])
    if scope.weights.shape != (count,):
        raise ValueError(f"weights must have shape ({count},), got {tuple(scope.weights.shape)}")
    d = scope.weights.detach()
    return marked("weights", d, (d >= 0) & d.isfinite(), "finite and not negative").double()
