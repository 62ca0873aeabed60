"""Plans: scopes laid out once for many calls of the in-place operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fusee.prox.groups import fold_groups
from fusee.prox.metric import prox_in_metric_of_table
from fusee.prox.prox_in_metric_inplace import prox_in_metric_
from fusee.prox.scopes import (
    Placed,
    Scope,
    groups_of_dims,
    place_by_dims,
    place_by_ids,
    scope_groups,
    scope_weights,
    table_of_dims,
)
from fusee.prox.sharded import is_sharded, scale_sharded, sharded_norms
from fusee.prox.table_functions import _scales, norms_of_table, scaled_by_table

_MOST_TENSORS = 256
"""In one scope, for which the layout still fits into the arguments of a CUDA kernel."""


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
