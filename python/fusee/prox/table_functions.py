"""The group envelope, its proximal operator and the projection for the groups of a table.

What they do to a group depends on its norm alone, so the norms become a problem of groups of one
element, and the elements are scaled as their group's norm was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusee._checks import check_floating, check_same_device
from fusee.prox.group_envelope import _envelope
from fusee.prox.group_table import GroupTable
from fusee.prox.groups import Weights, check_scalar, check_weights, marked
from fusee.prox.metric import check_metric_of_table, prox_in_metric_of_table
from fusee.prox.prox_group_envelope import FORMS, _prox
from fusee.prox.sharded import is_sharded, table_norms, table_scale


def prox_of_table(
    input: Sequence[Tensor],
    table: GroupTable,
    k: float | Tensor,
    lam: float | Tensor,
    *,
    weights: Weights = None,
    metric: Tensor | Sequence[Tensor] | None = None,
    debiased: bool = False,
) -> tuple[Tensor, ...]:
    """:func:`fusee.prox_group_envelope` of tensors whose groups a table gives."""
    tensors, norms, d = _problem(input, table, weights)
    numbers = (
        check_scalar("k", k, norms, positive=False),
        check_scalar("lam", lam, norms, positive=True),
    )
    if metric is not None and not isinstance(metric, Tensor):
        of_elements = check_metric_of_table(metric, table)
        return prox_in_metric_of_table(tensors, of_elements, table, d, *numbers, int(debiased))
    h = _check_metric(metric, norms, table.groups, "groups is a table")
    return scaled_by_table(table, tensors, _scales(norms, d, h, *numbers, int(debiased)))


def project_of_table(
    input: Sequence[Tensor],
    table: GroupTable,
    k: float | Tensor,
    *,
    weights: Weights = None,
) -> tuple[Tensor, ...]:
    """:func:`fusee.project_top_k_groups` of tensors whose groups a table gives."""
    tensors, norms, d = _problem(input, table, weights)
    kept = check_scalar("k", k, norms, positive=False).detach()
    form = FORMS.index("projection")
    # What is kept has no derivative.
    scales = _scales(norms.detach(), d, None, kept, torch.zeros_like(kept), form)
    return scaled_by_table(table, tensors, scales)


def envelope_of_table(
    input: Sequence[Tensor],
    table: GroupTable,
    k: float | Tensor,
    *,
    weights: Weights = None,
    debiased: bool = False,
) -> Tensor:
    """:func:`fusee.group_envelope` of tensors whose groups a table gives; its dtype is float64 if one
    of theirs is, float32 otherwise."""
    tensors, norms, d = _problem(input, table, weights)
    of_k = check_scalar("k", k, norms, positive=False)
    value = _envelope(norms.reshape(1, 1, -1, 1), d, of_k, bool(debiased))[0]
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return value.reshape(()).to(torch.float64 if double else torch.float32)


def _problem(input: Any, table: Any, weights: Any) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """The checked tensors, the norms of their groups and the weights."""
    if not isinstance(table, GroupTable):
        raise TypeError(f"groups must be a GroupTable, got {type(table).__name__}")
    tensors = table.check("input", input)
    norms = table_norms(table, tensors) if any(map(is_sharded, tensors)) else table.norms(tensors)
    d = check_weights(weights, norms, table.groups, 1)
    if isinstance(weights, str):
        sizes = table.sizes.to(norms.dtype)
        d = sizes if weights == "size" else 1 / sizes
    return tensors, norms, d


def norms_of_table(table: GroupTable, tensors: Sequence[Tensor]) -> Tensor:
    if any(map(is_sharded, tensors)):
        return table_norms(table, tensors)
    return table.norms(tensors)


def scaled_by_table(table: GroupTable, tensors: list[Tensor], scales: Tensor) -> tuple[Tensor, ...]:
    if any(map(is_sharded, tensors)):
        return table_scale(table, tensors, scales)
    return table.scale(tensors, scales)


def _check_metric(metric: Any, norms: Tensor, groups: int, where: str) -> Tensor | None:
    if metric is None:
        return None
    check_floating("metric", metric)
    check_same_device("metric", metric, "input", norms)
    if metric.shape != (groups,):
        raise ValueError(
            f"metric must have shape ({groups},) where {where}, got {tuple(metric.shape)}"
        )
    h = metric.detach()
    return marked("metric", h, (h > 0) & h.isfinite(), "positive and finite").to(norms.dtype)


def _scales(
    norms: Tensor,
    weights: Tensor | None,
    metric: Tensor | None,
    k: Tensor,
    lam: Tensor,
    form: int,
) -> Tensor:
    """What the elements of each group are multiplied with."""
    shape = (1, 1, norms.shape[0], 1)
    h = None if metric is None else metric.reshape(1, -1)
    moved, _, roots = _prox(norms.reshape(shape), weights, h, k, lam, form)
    moved, roots = moved.reshape(-1), roots.detach()
    at_ends = _scales_at_ends(norms, weights, metric, lam, form, roots)
    ends = (norms == 0) | moved.isinf()
    return torch.where(ends, at_ends, moved / torch.where(ends, 1.0, norms))


def _scales_at_ends(
    norms: Tensor,
    weights: Tensor | None,
    metric: Tensor | None,
    lam: Tensor,
    form: int,
    roots: Tensor,
) -> Tensor:
    """The scales, which are the derivatives, of groups whose norm is zero, or is infinite and kept."""
    ones = torch.ones_like(norms)
    d = ones if weights is None else weights
    h = ones if metric is None else metric
    theta, last, projects = roots.to(norms.dtype).unbind(1)
    index = torch.arange(norms.shape[0], device=norms.device)
    zero = norms == 0
    dropped = zero & (d > 0) & ((theta > 0) | ((theta == 0) & (index > last)))
    lam = lam.to(norms.dtype)
    ridge = torch.ones_like(norms) if FORMS[form] == "debiased" else h / (h + lam * d)
    # Without a penalty the operator is the identity, also where nothing is.
    smooth = torch.where(zero & (theta > 0) & (d > 0) & (lam > 0), 0.0, ridge)
    scale = torch.where(projects > 0, torch.where(dropped, 0.0, 1.0), smooth)
    return torch.where(theta.isnan(), math.nan, scale)
