"""The proximal operator of the group envelope in place, for all layers of a model in one call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusee._checks import accumulate_dtype, check_floating, check_same_device, has_twice
from fusee._op import register_in_place
from fusee.prox.group_table import GroupTable
from fusee.prox.groups import (
    Dims,
    Weights,
    as_number,
    check_no_dim,
    marked,
    marked_number,
    wanted_in,
)
from fusee.prox.scope_plan import ScopePlan
from fusee.prox.scopes import Scope, as_placed, check_apart, placed
from fusee.prox.table_functions import _scales


def _reference(
    tensors: list[Tensor],
    layout: list[int],
    weights: Tensor | None,
    k: Tensor,
    lam: Tensor,
    form: int,
) -> Tensor:
    """The same computation in plain torch operators; writes to ``tensors``."""
    places = placed(layout)
    begin = 0
    counts = []
    for scope in range(k.shape[0]):
        inside = [(t, p) for t, p in zip(tensors, places, strict=True) if p.scope == scope]
        groups = max((p.first + p.groups for _, p in inside), default=0)
        squares = k.new_zeros(groups)
        for tensor, place in inside:
            of_tensor = as_placed(tensor, place).to(k.dtype).square().sum((0, 2))
            squares[place.first : place.first + place.groups] += of_tensor
        d = None if weights is None else weights[begin : begin + groups]
        begin += groups
        norms = squares.sqrt()
        of_scope = slice(scope, scope + 1)
        scales = _scales(norms, d, None, k[of_scope], lam[of_scope], form)
        for tensor, place in inside:
            view = as_placed(tensor, place)
            of_tensor = scales[place.first : place.first + place.groups, None]
            # Rounded once, and from -0 to -0.
            view.copy_(view.to(k.dtype) * of_tensor)
        kept = (norms != 0) & (scales != 0)
        counts.append((kept if d is None else kept & (d != 0)).sum())
    return torch.stack(counts) if counts else k.new_empty(0, dtype=torch.int64)


def _fake(
    tensors: list[Tensor],
    layout: list[int],
    weights: Tensor | None,
    k: Tensor,
    lam: Tensor,
    form: int,
) -> Tensor:
    return k.new_empty(k.shape, dtype=torch.int64)


register_in_place("prox_group_envelope_", reference=_reference, fake=_fake)


def _make_scopes(
    tensors: list[Tensor], dim: Dims, groups: Any, scope: str, weights: Any
) -> list[Scope]:
    if scope not in ("tensor", "all"):
        raise ValueError(f"scope must be 'tensor' or 'all', got {scope!r}")
    if groups is None:
        if scope == "all":
            return [Scope(tuple(tensors), dim, None, weights)]
        if isinstance(weights, Tensor):
            if len(tensors) != 1:
                raise ValueError(
                    "weights must be a string or None where there are several scopes, got a Tensor"
                )
            return [Scope((tensors[0],), dim, None, weights)]
        return [Scope((tensor,), dim, None, weights) for tensor in tensors]
    check_no_dim(dim)
    if scope == "all":
        raise ValueError("scope must be left out where groups are tables, got 'all'")
    tables = [groups] if isinstance(groups, GroupTable) else list(groups)
    if isinstance(weights, Tensor) and len(tables) != 1:
        raise ValueError(
            "weights must be a string or None where there are several scopes, got a Tensor"
        )
    scopes, begin = [], 0
    for table in tables:
        if not isinstance(table, GroupTable):
            raise TypeError(f"groups must be GroupTables, got {type(table).__name__}")
        end = begin + len(table.ids)
        of_table = table.check("tensors", tensors[begin:end])
        scopes.append(Scope(tuple(of_table), 0, table, weights))
        begin = end
    if begin != len(tensors):
        raise ValueError(f"tensors must be those of groups, {begin}, got {len(tensors)}")
    return scopes


def _numbers(name: str, value: Any, count: int, device: torch.device, *, positive: bool) -> Tensor:
    """``k`` or ``lam`` of each scope: float64 (count,), from a number, several, or a tensor."""
    if not isinstance(value, Tensor):
        listed = []
        for given in value if isinstance(value, Iterable) else [value]:
            number = as_number(given)
            if number is None:
                raise TypeError(
                    f"{name} must be of numbers or a Tensor, got {type(given).__name__}"
                )
            if number != number or (positive and number < 0):
                wanted = "not be negative" if positive else "not be NaN"
                raise ValueError(f"{name} must {wanted}, got {number}")
            listed.append(number)
        if (
            listed and listed[1:] == listed[:-1]
        ):  # nothing to copy from the host, so a graph can be captured
            numbers = torch.full((len(listed),), listed[0], dtype=torch.float64, device=device)
        else:
            numbers = torch.tensor(listed, dtype=torch.float64, device=device)
    elif value.dtype.is_complex or value.dtype == torch.bool:
        raise TypeError(f"{name} must be real, got dtype {value.dtype}")
    elif value.device != device:
        raise ValueError(f"{name} must be on the device of tensors, {device}, got {value.device}")
    else:
        numbers = marked_number(name, value.detach().reshape(-1).double(), positive=positive)
    if numbers.numel() not in (1, count):
        raise ValueError(
            f"{name} must have one element or {count}, one for each scope, got {numbers.numel()}"
        )
    return numbers.expand(count).contiguous()


def _check_metric(metric: Any, tensors: list[Tensor]) -> list[Tensor]:
    listed = [metric] if isinstance(metric, Tensor) else list(metric)
    if len(listed) != len(tensors):
        raise ValueError(f"metric must be as many as tensors, {len(tensors)}, got {len(listed)}")
    checked = []
    for i, (h, tensor) in enumerate(zip(listed, tensors, strict=True)):
        name = f"metric[{i}]"
        check_floating(name, h)
        check_same_device(name, h, f"tensors[{i}]", tensor)
        if h.shape != tensor.shape:
            raise ValueError(
                f"{name} must have the shape of tensors[{i}], {tuple(tensor.shape)}, got "
                f"{tuple(h.shape)}"
            )
        used = h.detach()
        if used.dtype not in (tensor.dtype, torch.float32):
            used = used.to(accumulate_dtype(tensor.dtype))
        valid = (used > 0) & used.isfinite()
        checked.append(marked(name, used, valid, wanted_in(h, used, "positive and finite")))
    return checked


def prox_group_envelope_(
    tensors: Tensor | Sequence[Tensor],
    k: float | Sequence[float] | Tensor,
    lam: float | Sequence[float] | Tensor,
    *,
    dim: Dims = 0,
    groups: GroupTable | Sequence[GroupTable] | None = None,
    scope: str = "tensor",
    weights: Weights = None,
    metric: Tensor | Sequence[Tensor] | None = None,
    debiased: bool = False,
) -> Tensor:
    r"""Applies :func:`fusee.prox_group_envelope` in place, to all tensors of a model in one call.

    A scope is a set of groups that share one k. On CUDA a call is three launches, of squares, roots and
    scaling, whatever the number of tensors (the first and the last for each dtype; one more where scopes
    have very many groups), and nothing is read back from the device.

    Args:
        tensors: a tensor, or several of any shapes; float32, float64, bfloat16 or float16, also mixed;
            on one device. Overwritten. Where the memory of a tensor has gaps, or its groups do not lie
            in it as slices, its scope is computed by plain torch operators.
        k: how many groups of each scope are free, as in :func:`fusee.prox_group_envelope`: a number for
            all scopes, or one for each in a sequence or a tensor.
        lam: the factor of the penalty, likewise.
        dim: the dimension or dimensions that number the groups of each tensor.
        groups: a :class:`fusee.GroupTable`, or several for the tensors of each in turn; every table is a
            scope.
        scope: ``"tensor"``, each tensor is a scope, or ``"all"``, all tensors share one k.
        weights: of the groups: None, ``"size"``, ``"inverse_size"``, or where there is one scope a
            tensor of one element a group.
        metric: positive numbers for each tensor, of its shape, as the denominator of Adam; float32 or of
            its dtype. The launches are then several for each step of a search, of a fixed number.
        debiased: whether the penalty is the debiased one.

    Returns:
        How many groups of each scope are not zero now, of those with a weight: an int64 tensor on the
        device of the tensors.

    Raises:
        TypeError: an argument is not of the types above.
        IndexError: ``dim`` is out of range of a tensor.
        ValueError: there are no tensors, two share memory, or they are on several devices; ``k`` or
            ``lam`` has another number of elements, ``k`` is NaN, ``lam`` is negative, ``scope`` is
            unknown, the tensors do not fit the tables, or ``weights`` or ``metric`` are not what
            :func:`fusee.prox_group_envelope` takes.
        RuntimeError: a tensor requires gradients where they are recorded, or is an expanded tensor,
            whose elements share memory.

    Norms and roots are computed in float64, and the elements rounded once. NaN in a group makes its
    scope NaN, and no other. On CUDA, the squares of float64 numbers beyond about 1e154 count as
    infinite. Deterministic: the same bits on the same engine, whatever the number of threads; with
    tables in compiled code on CUDA only under ``torch.use_deterministic_algorithms``. Not
    differentiable. Of a DTensor one number for each group travels.

    Source: as :func:`fusee.prox_group_envelope`.

    Example:
        >>> import torch, fusee
        >>> first, second = torch.tensor([[3.0], [1.0]]), torch.tensor([[0.5], [2.0], [4.0]])
        >>> fusee.optim.prox_group_envelope_([first, second], k=1, lam=2.0, debiased=True)
        tensor([1, 1])
        >>> second.flatten()
        tensor([0., 0., 4.])
    """
    listed = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    if not listed:
        raise ValueError("tensors must hold one tensor at least, got none")
    for i, tensor in enumerate(listed):
        check_floating(f"tensors[{i}]", tensor)
        check_same_device(f"tensors[{i}]", tensor, "tensors[0]", listed[0])
    if has_twice(listed):
        raise ValueError("tensors must not hold the same tensor twice")
    check_apart(listed)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in listed):
        raise RuntimeError("tensors must not require gradients where these are recorded")
    scopes = _make_scopes(listed, dim, groups, scope, weights)
    plan = ScopePlan(scopes)
    device = listed[0].device
    of_k = _numbers("k", k, len(scopes), device, positive=False)
    of_lam = _numbers("lam", lam, len(scopes), device, positive=True)
    H = None if metric is None else _check_metric(metric, listed)
    return plan.prox_(of_k, of_lam, metric=H, debiased=bool(debiased))
