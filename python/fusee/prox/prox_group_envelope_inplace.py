"""The proximal operator of the group envelope in place, for all layers of a model in one call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fusee._checks import accumulate_dtype, check_floating, check_same_device
from fusee._library import LOADED
from fusee._op import _missing_engine
from fusee.prox.group_table import GroupTable
from fusee.prox.groups import (
    Dims,
    Weights,
    as_number,
    check_no_dim,
    fold_groups,
    marked,
    marked_number,
    wanted_in,
)
from fusee.prox.metric import prox_in_metric_of_table
from fusee.prox.prox_in_metric_inplace import prox_in_metric_
from fusee.prox.scopes import (
    Placed,
    Scope,
    as_placed,
    check_apart,
    groups_of_dims,
    place_by_dims,
    place_by_ids,
    placed,
    scope_groups,
    scope_weights,
    table_of_dims,
)
from fusee.prox.sharded import is_sharded, scale_sharded, sharded_norms
from fusee.prox.table_functions import _scales, norms_of_table, scaled_by_table

_MOST_TENSORS = 256
"""In one scope, for which the layout still fits into the arguments of a CUDA kernel."""


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


# Op of fusee._op is for functions with derivatives; this operator writes to its arguments and has none.
_library = torch.library.Library("fusee", "IMPL")
_library.impl("prox_group_envelope_", _reference, "CompositeExplicitAutograd")
for _device, _key in (("cpu", "CPU"), ("cuda", "CUDA")):
    if LOADED[_device].engine is None:
        _library.impl(
            "prox_group_envelope_", _missing_engine("prox_group_envelope_", _device), _key
        )
torch.library.register_fake("fusee::prox_group_envelope_", _fake)


class ScopePlan:
    """Scopes, checked and laid out once for many calls.

    Attributes:
        tensors: those of all scopes, in order.
        groups: how many groups each scope has.
    """

    def __init__(self, scopes: Sequence[Scope]) -> None:
        self.scopes = list(scopes)
        self.tensors = [tensor for scope in scopes for tensor in scope.tensors]
        self.groups = [scope_groups(scope) for scope in scopes]
        self._weights = [scope_weights(scope) for scope in scopes]
        self._prepare()

    def _prepare(self) -> None:
        """Finds for each scope whether the compiled operator takes it; depends on the strides."""
        self._strides = [tensor.stride() for tensor in self.tensors]
        self._fused: list[int] = []
        self._others: list[int] = []
        layout: list[int] = []
        self._in_place: list[Tensor] = []
        self._in_place_at: list[int] = []  # among all tensors
        for number, scope in enumerate(self.scopes):
            places = self._places(scope, len(self._fused))
            if places is None:
                self._others.append(number)
                continue
            self._fused.append(number)
            self._in_place.extend(scope.tensors)
            first = sum(len(s.tensors) for s in self.scopes[:number])
            self._in_place_at.extend(range(first, first + len(scope.tensors)))
            for place in places:
                layout.extend(place)
        self._layout = layout
        # Not in each call, as it waits for the device; of no use where all scopes are placed.
        self._fused_at = (
            torch.tensor(self._fused, device=self.tensors[0].device)
            if self._fused and self._others
            else None
        )
        self._weights_of_all = self._joined_weights()

    @staticmethod
    def _places(scope: Scope, number: int) -> list[Placed] | None:
        if len(scope.tensors) > _MOST_TENSORS:
            return None
        if any(is_traceable_wrapper_subclass(tensor) for tensor in scope.tensors):
            return None
        places, first = [], 0
        for i, tensor in enumerate(scope.tensors):
            if scope.table is not None:
                place = place_by_ids(tensor, scope.table.ids[i], number)
            else:
                place = place_by_dims(tensor, scope.dim, number, first)
            if place is None:
                return None
            first += place.groups
            places.append(place)
        return places

    def _joined_weights(self) -> Tensor | None:
        weights = [self._weights[number] for number in self._fused]
        if all(d is None for d in weights):
            return None
        device = self.tensors[0].device
        ones = [torch.ones(self.groups[n], dtype=torch.float64, device=device) for n in self._fused]
        return torch.cat([one if d is None else d for d, one in zip(weights, ones, strict=True)])

    def prox_(
        self,
        k: Tensor,
        lam: Tensor,
        *,
        metric: Sequence[Tensor] | None = None,
        debiased: bool = False,
    ) -> Tensor:
        """Applies the operator to all tensors; returns how many groups of each scope are left.

        ``k`` and ``lam`` are float64 tensors of one element a scope, ``metric`` holds positive numbers
        of the shape of each tensor.
        """
        if [tensor.stride() for tensor in self.tensors] != self._strides:
            self._prepare()
        form = int(debiased)
        if not self._others:
            return self._call(k, lam, metric, form)
        counts = torch.zeros(k.shape, dtype=torch.int64, device=k.device)
        if self._fused_at is not None:
            chosen = self._fused_at
            of_fused = None if metric is None else [metric[i] for i in self._in_place_at]
            counts[chosen] = self._call(k[chosen], lam[chosen], of_fused, form)
        for number in self._others:
            scope, of_scope = self.scopes[number], slice(number, number + 1)
            first = sum(len(s.tensors) for s in self.scopes[:number])
            h = None if metric is None else metric[first : first + len(scope.tensors)]
            counts[number] = _by_operators(
                scope, self._weights[number], k[of_scope], lam[of_scope], h, form
            )
        return counts

    def _call(self, k: Tensor, lam: Tensor, metric: Sequence[Tensor] | None, form: int) -> Tensor:
        tensors, layout, weights = self._in_place, self._layout, self._weights_of_all
        if metric is not None:
            return prox_in_metric_(tensors, metric, layout, weights, k, lam, form)
        counts: Tensor = torch.ops.fusee.prox_group_envelope_(
            tensors, layout, weights, k, lam, form
        )
        if not torch.compiler.is_compiling():
            increment_version(tensors)
        return counts


def _by_operators(
    scope: Scope,
    weights: Tensor | None,
    k: Tensor,
    lam: Tensor,
    metric: Sequence[Tensor] | None,
    form: int,
) -> Tensor:
    """The operator for tensors whose groups do not lie in memory as the compiled ones need them, and for
    DTensors."""
    tensors, table = scope.tensors, scope.table
    if metric is not None:
        if any(map(is_sharded, tensors)):
            raise NotImplementedError("a metric of elements of DTensors")
        table = table_of_dims(tensors, scope.dim) if table is None else table
        moved: Sequence[Tensor] = prox_in_metric_of_table(
            tensors, metric, table, weights, k, lam, form
        )
        before, after = table.norms(tensors), table.norms(moved)
        kept = (before != 0) & (after != 0)
    else:
        norms = scope_norms(scope)
        scales = _scales(norms, weights, None, k, lam, form)
        moved = _scaled_by(scope, scales)
        kept = (norms != 0) & (scales != 0)
    for tensor, result in zip(tensors, moved, strict=True):
        tensor.copy_(result)
    return (kept if weights is None else kept & (weights != 0)).sum()


def scope_norms(scope: Scope) -> Tensor:
    """Of all groups of a scope, in float64."""
    if scope.table is not None:
        return norms_of_table(scope.table, scope.tensors)
    return torch.cat(
        [
            sharded_norms(tensor, scope.dim)
            if is_sharded(tensor)
            else fold_groups(tensor.detach(), scope.dim).tensor.double().norm(dim=(1, 3))[0]
            for tensor in scope.tensors
        ]
    )


def _scaled_by(scope: Scope, scales: Tensor) -> Sequence[Tensor]:
    if scope.table is not None:
        return scaled_by_table(scope.table, list(scope.tensors), scales)
    results: list[Tensor] = []
    parts = scales.split([groups_of_dims(tensor, scope.dim) for tensor in scope.tensors])
    for tensor, part in zip(scope.tensors, parts, strict=True):
        if is_sharded(tensor):
            results.append(scale_sharded(tensor, scope.dim, part))
        else:
            folded = fold_groups(tensor, scope.dim)
            results.append(folded.unfold(folded.tensor.double() * part[:, None]))
    return results


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
    scaling, whatever the number of tensors (the first and the last for each dtype), and nothing is read
    back from the device.

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
    if len({id(tensor) for tensor in listed}) != len(listed):
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
