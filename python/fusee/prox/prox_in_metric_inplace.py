"""The proximal operator of the group envelope in a metric of elements, in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from fusee._checks import accumulate_dtype
from fusee._op import is_readable, register_in_place
from fusee.prox.groups import marked, wanted_in
from fusee.prox.metric import prox_in_metric
from fusee.prox.scopes import as_placed, placed


def _reference(
    tensors: list[Tensor],
    metric: list[Tensor],
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
        inside = [i for i, place in enumerate(places) if place.scope == scope]
        groups = max((places[i].first + places[i].groups for i in inside), default=0)
        # Each group is a row, of its elements in one tensor after another. What fills up the rows of
        # groups without a part in a tensor is zero, in the metric the largest.
        rows, of_rows = [k.new_zeros((groups, 0))], [k.new_zeros((groups, 0))]
        largest = max(
            (metric[i].amax() for i in inside if metric[i].numel()), default=k.new_ones(())
        )
        for i in inside:
            place = places[i]
            of_tensor = slice(place.first, place.first + place.groups)
            shape = (groups, place.outer * place.inner)
            H = torch.empty_like(tensors[i], dtype=k.dtype).copy_(metric[i])
            for values, filled in ((tensors[i], k.new_zeros(())), (H, largest)):
                row = filled.to(k.dtype).expand(shape).clone()
                row[of_tensor] = as_placed(values, place).to(k.dtype).transpose(0, 1).flatten(1)
                (rows if values is tensors[i] else of_rows).append(row)
        v = torch.cat(rows, 1)
        d = None if weights is None else weights[begin : begin + groups]
        begin += groups
        one = slice(scope, scope + 1)
        x = prox_in_metric(
            v[None, None], torch.cat(of_rows, 1)[None, None], d, k[one], lam[one], form
        )[0, 0]
        parts = x.split([row.shape[1] for row in rows], 1)[1:]
        for i, part in zip(inside, parts, strict=True):
            place = places[i]
            moved = part[place.first : place.first + place.groups]
            moved = moved.reshape(place.groups, place.outer, place.inner).transpose(0, 1)
            as_placed(tensors[i], place).copy_(moved)
        kept = (v != 0).any(1) & (x != 0).any(1)
        counts.append((kept if d is None else kept & (d != 0)).sum())
    return torch.stack(counts) if counts else k.new_zeros(0, dtype=torch.int64)


def _fake(
    tensors: list[Tensor],
    metric: list[Tensor],
    layout: list[int],
    weights: Tensor | None,
    k: Tensor,
    lam: Tensor,
    form: int,
) -> Tensor:
    return k.new_empty(k.shape, dtype=torch.int64)


register_in_place("prox_group_envelope_metric_", reference=_reference, fake=_fake)


def prox_in_metric_(
    tensors: Sequence[Tensor],
    metric: Sequence[Tensor],
    layout: Sequence[int],
    weights: Tensor | None,
    k: Tensor,
    lam: Tensor,
    form: int,
) -> Tensor:
    """Applies the operator in a metric of elements to the tensors of many scopes, in place; returns how
    many groups of each scope are left.

    Args:
        tensors: those of all scopes, dense.
        metric: positive numbers for each tensor, of its shape and on its device. Those of the tensor's
            strides and of its dtype or float32 are not copied.
        layout: five numbers of each tensor, as :class:`fusee.prox.scopes.Placed` has them.
        weights: of the groups of all scopes, one after another, in float64; None for ones.
        k: how many groups are free, a float64 tensor of one element for each scope.
        lam: the factor of the penalty, the same.
        form: 0 for the envelope, 1 for the debiased one, 2 for the projection.
    """
    counts: Tensor = torch.ops.fusee.prox_group_envelope_metric_(
        tensors, metric, layout, weights, k, lam, form
    )
    if not torch.compiler.is_compiling():
        increment_version(tensors)
    return counts


def prox_of_elements(
    input: Tensor, metric: Tensor, weights: Tensor | None, k: Tensor, lam: Tensor, form: int
) -> Tensor:
    """The operator for (1, outer, groups, inner) and a metric of this shape: compiled, on a copy, where
    no derivative is wanted and nothing traces it, and in plain torch operators elsewhere."""
    dtype = accumulate_dtype(input.dtype)
    if torch.promote_types(metric.dtype, dtype) != dtype:
        given, metric = metric, metric.to(dtype)
        finite = wanted_in(given, metric, "positive and finite")
        metric = marked("metric", metric, (metric > 0) & metric.isfinite(), finite)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (input, k, lam))
    tensors = [t for t in (input, metric, weights, k, lam) if t is not None]
    if (
        wanted
        or forward_ad._current_level >= 0
        or torch.compiler.is_compiling()
        or input.device.type not in ("cpu", "cuda")
        or not all(is_readable(t) for t in tensors)
    ):
        return prox_in_metric(input, metric, weights, k, lam, form)
    x = input.detach().clone(memory_format=torch.contiguous_format)
    d = None if weights is None else weights.double()
    prox_in_metric_([x], [metric], [0, 0, *x.shape[1:]], d, k, lam, form)
    return x
