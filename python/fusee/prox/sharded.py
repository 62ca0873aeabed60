"""The group envelope and its relatives for DTensors: all that travels is one number for each group.

Every process sums the squares of its own elements, the sums are added up over the mesh, and each
process solves the same problem of norms and scales its own elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusee._checks import accumulate_dtype
from fusee.prox.group_sums import spread_to_elements, sum_of_groups
from fusee.prox.groups import Dims, Weights, check_dims, check_scalar, check_weights

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from fusee.prox.group_table import GroupTable


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor; importing their module takes long."""
    return hasattr(tensor, "full_tensor")


def sharded_norms(tensor: Tensor, dim: Dims) -> Tensor:
    """The norms of the groups of a DTensor, those along ``dim``, as a plain float64 tensor (groups) that
    is the same in every process; differentiable, with derivative zero where a norm is zero.

    Their squares are all-reduced over the mesh dimensions along which the tensor is sharded.
    """
    dims = check_dims(dim, tensor.dim())
    others = [d for d in range(tensor.dim()) if d not in dims]
    whole = _without_partials(tensor)
    local = whole.to_local().double()
    squares = local.square().sum(others) if others else local.square()
    begin = _offsets(whole)
    padding: list[int] = []
    for d, extent in zip(reversed(dims), reversed(squares.shape), strict=True):
        padding += [begin[d], tensor.shape[d] - begin[d] - extent]
    squares = torch.nn.functional.pad(squares, padding).reshape(-1)
    return _roots(_summed(squares, whole))


def scale_sharded(tensor: Tensor, dim: Dims, scales: Tensor) -> DTensor:
    """The DTensor with the elements of each group multiplied by its number among the ``scales``, a
    plain tensor (groups) that is the same in every process; rounded once, with the same placements."""
    dims = check_dims(dim, tensor.dim())
    whole = _without_partials(tensor)
    local, begin = whole.to_local(), _offsets(whole)
    of_local = _for_local(scales, whole).reshape([tensor.shape[d] for d in dims])
    for place, d in enumerate(dims):
        of_local = of_local.narrow(place, begin[d], local.shape[d])
    shape = [local.shape[d] if d in dims else 1 for d in range(local.dim())]
    dtype = accumulate_dtype(local.dtype)
    scaled = local.to(dtype) * of_local.reshape(shape).to(dtype)
    return _as_sharded(scaled.to(local.dtype), whole)


def table_norms(table: GroupTable, tensors: Sequence[Tensor]) -> Tensor:
    """:meth:`fusee.GroupTable.norms` where some tensors are DTensors, with one sum over the mesh for all
    that are sharded alike."""
    sums: dict[Any, tuple[Tensor, Any]] = {}
    listed = table.check("tensors", tensors)
    for number, (tensor, ids) in enumerate(zip(listed, table.ids, strict=True)):
        whole = _without_partials(tensor) if is_sharded(tensor) else None
        local = tensor if whole is None else whole.to_local()
        mine = ids if whole is None else _cut(ids, whole, local)
        key = None if whole is None else (whole.device_mesh, tuple(_is_split(whole)))
        zeros = torch.zeros(table.groups, dtype=torch.float64, device=local.device)
        so_far, _ = sums.get(key, (zeros, None))
        terms = local.double().square().reshape(-1)
        of_groups = sum_of_groups(table, _part(number, whole, local), mine, terms)
        sums[key] = so_far + of_groups, whole
    parts = [part if like is None else _summed(part, like) for part, like in sums.values()]
    return _roots(torch.stack(parts).sum(0))


def _part(number: int, whole: Any, local: Tensor) -> Any:
    """What of a table belongs to this process: the tensor's number, where its elements begin, and their
    shape."""
    return number if whole is None else (number, *_offsets(whole), *local.shape)


def table_scale(table: GroupTable, tensors: Sequence[Tensor], scales: Tensor) -> tuple[Tensor, ...]:
    """:meth:`fusee.GroupTable.scale` where some tensors are DTensors."""
    scaled: list[Tensor] = []
    listed = table.check("tensors", tensors)
    for number, (tensor, ids) in enumerate(zip(listed, table.ids, strict=True)):
        whole = _without_partials(tensor) if is_sharded(tensor) else None
        local = tensor if whole is None else whole.to_local()
        mine = ids if whole is None else _cut(ids, whole, local)
        known = scales if whole is None else _for_local(scales, whole)
        part, wide = _part(number, whole, local), known.to(accumulate_dtype(local.dtype))
        each = spread_to_elements(table, part, mine, wide).reshape(local.shape)
        moved = torch.where(mine < 0, local, (local.to(each.dtype) * each).to(local.dtype))
        scaled.append(moved if whole is None else _as_sharded(moved, whole))
    return tuple(scaled)


def scaled_by_problem(
    input: Tensor,
    k: float | Tensor,
    lam: float | Tensor,
    *,
    dim: Dims,
    weights: Weights,
    metric: Tensor | None,
    form: int,
) -> Tensor:
    """The operator (or the projection, for its ``form``) of a DTensor."""
    from fusee.prox.prox_group_envelope import FORMS
    from fusee.prox.table_functions import _check_metric, _scales

    norms, d = _problem(input, dim, weights)
    h = _check_metric(_plain(metric), norms, norms.numel(), "input is a DTensor")
    of_k = check_scalar("k", _plain(k), norms, positive=False)
    of_lam = check_scalar("lam", _plain(lam), norms, positive=True)
    if FORMS[form] == "projection":
        norms, of_k = norms.detach(), of_k.detach()  # what is kept has no derivative
    return scale_sharded(input, dim, _scales(norms, d, h, of_k, of_lam, form))


def envelope_of_sharded(
    input: Tensor, k: float | Tensor, *, dim: Dims, weights: Weights, debiased: bool
) -> Tensor:
    """:func:`fusee.group_envelope` of a DTensor: a plain tensor, the same in every process."""
    from fusee.prox.group_envelope import _envelope

    norms, d = _problem(input, dim, weights)
    of_k = check_scalar("k", _plain(k), norms, positive=False)
    value = _envelope(norms.reshape(1, 1, -1, 1), d, of_k, bool(debiased))[0]
    return value.reshape(()).to(input.dtype)


def _problem(input: Tensor, dim: Dims, weights: Any) -> tuple[Tensor, Tensor | None]:
    norms = sharded_norms(input, dim)
    groups = norms.numel()
    size = input.numel() // groups if groups else 0
    return norms, check_weights(_plain(weights), norms, groups, size)


def _plain(value: Any) -> Any:
    """What is given beside the input, whole: it has at most a number for each group."""
    return value.full_tensor() if is_sharded(value) else value


def _roots(squares: Tensor) -> Tensor:
    positive = squares != 0
    return torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), 0.0)


def _without_partials(tensor: Any) -> Any:
    from torch.distributed.tensor import Replicate

    placements = tensor.placements
    if not any(p.is_partial() for p in placements):
        return tensor
    return tensor.redistribute(
        placements=[Replicate() if p.is_partial() else p for p in placements]
    )


def _is_split(tensor: Any) -> list[bool]:
    """For each dimension of the mesh, whether the tensor is sharded along it."""
    return [not placement.is_replicate() for placement in tensor.placements]


def _offsets(tensor: Any) -> list[int]:
    """Where the elements of this process begin."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    # Of a process without elements it may lie past the end.
    return [min(o, extent) for o, extent in zip(offsets, tensor.shape, strict=True)]


def local_tensor(tensor: Any) -> Tensor:
    """The elements of this process, which share memory with the tensor; a plain tensor as it is."""
    local: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return local


def local_part(beside: Tensor, tensor: Any) -> Tensor:
    """What of a plain tensor, which broadcasts to ``tensor``, belongs to this process's elements."""
    return _cut(beside, tensor, tensor.to_local()) if is_sharded(tensor) else beside


def _cut(beside: Tensor, tensor: Any, local: Tensor) -> Tensor:
    for d, (begin, extent) in enumerate(zip(_offsets(tensor), local.shape, strict=True)):
        if beside.shape[d] != 1:
            beside = beside.narrow(d, begin, extent)
    return beside


def _summed(of_local: Tensor, like: Any) -> Tensor:
    """The sum over the processes that share ``like``."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements = [Partial() if split else Replicate() for split in _is_split(like)]
    parts = DTensor.from_local(of_local, like.device_mesh, placements, run_check=False)
    return parts.full_tensor()


def _for_local(scales: Tensor, like: Any) -> Tensor:
    """The scales for the elements of this process: the gradients of all processes are summed."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh, split = like.device_mesh, _is_split(like)
    same = DTensor.from_local(scales, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return same.to_local(grad_placements=[Partial() if s else Replicate() for s in split])


def _as_sharded(local: Tensor, like: Any) -> Any:
    from torch.distributed.tensor import DTensor

    # A contiguous result, as of all the operators.
    strides = [math.prod(like.shape[d + 1 :]) for d in range(like.dim())]
    return DTensor.from_local(
        local.contiguous(),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=tuple(strides),
    )
