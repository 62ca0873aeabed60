"""The proximal operator of the group envelope: structured sparsity with the level chosen beforehand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusee._checks import accumulate_dtype, check_floating, check_same_device
from fusee._op import Op
from fusee.prox.group_table import GroupTable
from fusee.prox.groups import (
    Dims,
    Folded,
    Weights,
    check_no_dim,
    check_scalar,
    check_weights,
    fold_groups,
    marked,
    wanted_in,
)
from fusee.prox.prox_in_metric_inplace import prox_of_elements
from fusee.prox.root import keep_largest, norms_of, solve_root
from fusee.prox.sharded import is_sharded, scaled_by_problem

FORMS = ("envelope", "debiased", "projection")
"""In the order of their numbers in the operators."""


def _broadcast(value: Tensor | None, norms: Tensor) -> Tensor:
    if value is None:
        return torch.ones_like(norms)
    return value.reshape(-1, norms.shape[1]).to(norms.dtype).expand_as(norms)


def _reference(
    input: Tensor,
    weights: Tensor | None,
    metric: Tensor | None,
    k: Tensor,
    lam: Tensor,
    form: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(input.dtype)
    v = input.to(dtype)
    norms = norms_of(v)
    # The root is found in float64, whatever the input is.
    n = norms.to(k.dtype)
    d, metric_ = _broadcast(weights, n), _broadcast(metric, n)
    of_lam = lam[:, None]
    bound = torch.where(d == 0, 0.0, of_lam * d)
    inner = metric_ - bound if FORMS[form] == "debiased" else metric_
    projects = (inner <= 0).any(1) if form != 2 else torch.ones_like(k, dtype=torch.bool)
    safe = torch.where(projects[:, None], metric_, inner)
    a, b = d.sqrt() * n * metric_ / safe, bound / safe
    theta = solve_root(torch.where(d > 0, a, 0.0), b, k)
    theta = torch.where((lam == 0) & ~(k > 0), 0.0, theta)
    theta = torch.where(theta.isinf() & (lam == 0), 0.0, theta)
    theta = torch.where(lam.isinf() & ~a.sum(1).isnan(), math.inf, theta)
    most = torch.where(inner < metric_, 1.0, metric_ / (safe + bound))
    unbound = (d == 0) | ((theta == 0) | (lam == 0))[:, None]
    nothing = theta.isinf()[:, None] & (d > 0)
    finite = torch.where(theta.isinf(), 0.0, theta)[:, None]
    middle = (metric_ - of_lam * finite * d.sqrt() / torch.where(n == 0, 1.0, n)) / safe
    # Not torch.minimum, which would halve the derivatives where both are one, for lam = 0.
    saturated = (a >= (1 + b) * finite) | (d == 0)
    scale = torch.where(saturated, most, middle.clamp(min=0))
    scale = torch.where(n == 0, torch.where(unbound, most, 0.0), scale)
    scale = torch.where(nothing, 0.0, scale)
    keys = d.sqrt() * n * metric_.sqrt()
    keep, kept_roots = keep_largest(keys.detach(), k.detach())
    kept = (keep | (d == 0)).to(n.dtype)
    scale = torch.where(projects[:, None], kept, scale)
    roots = torch.stack([theta, torch.zeros_like(k), torch.zeros_like(k)], 1)
    roots = torch.where(projects[:, None], kept_roots, roots)
    scale = torch.where(roots[:, :1].isnan(), math.nan, scale)
    output = v * scale[:, None, :, None].to(dtype)
    return output.to(input.dtype), norms, roots


def _fake(
    input: Tensor,
    weights: Tensor | None,
    metric: Tensor | None,
    k: Tensor,
    lam: Tensor,
    form: int,
) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(input.dim() == 4, lambda: f"input must have 4 dimensions, got {input.shape}")
    batch, _, groups, _ = input.shape
    output = torch.empty_like(input, memory_format=torch.contiguous_format)
    norms = input.new_empty((batch, groups), dtype=accumulate_dtype(input.dtype))
    return output, norms, k.new_empty((batch, 3))


def fold_problems(info: Any, in_dims: Any, args: Any) -> list[Any]:
    """Moves a vmapped dimension into the first one, the batch of problems; what is not vmapped is
    repeated."""
    folded = []
    for value, dim in zip(args, in_dims, strict=True):
        if not isinstance(value, Tensor):
            folded.append(value)
            continue
        batch = (info.batch_size, *value.shape)
        first = value.expand(batch) if dim is None else value.movedim(dim, 0)
        folded.append(first.flatten(0, 1))
    return folded


def unfold_problems(info: Any, results: tuple[Tensor, ...]) -> tuple[Any, Any]:
    """The inverse of :func:`fold_problems` for results."""
    size = info.batch_size
    outputs = tuple(r.unflatten(0, (size, r.shape[0] // size if size else 1)) for r in results)
    return outputs, (0,) * len(outputs)


def _vmap(
    info: Any,
    in_dims: Any,
    input: Tensor,
    weights: Tensor | None,
    metric: Tensor | None,
    k: Tensor,
    lam: Tensor,
    form: int,
) -> Any:
    if in_dims[1] is not None:
        raise NotImplementedError("weights of the groups cannot be vmapped")
    args = fold_problems(info, in_dims, (input, None, metric, k, lam, form))
    args[1] = weights
    return unfold_problems(info, torch.ops.fusee.prox_group_envelope(*args))


def _backward(ctx: Any, args: Any, constants: Any, grad: Tensor) -> Any:
    input, weights, metric, k, lam, form = args
    grads = _prox_backward(grad, input, *constants, weights, metric, k, lam, form)
    return grads[0], None, None, grads[1], grads[2], None


def _backward_reference(
    grad: Tensor,
    input: Tensor,
    norms: Tensor,
    roots: Tensor,
    weights: Tensor | None,
    metric: Tensor | None,
    k: Tensor,
    lam: Tensor,
    form: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(input.dtype)

    def function(v: Tensor, k: Tensor, lam: Tensor) -> Tensor:
        return _reference(v, weights, metric, k, lam, form)[0]

    pull: Any = torch.func.vjp(function, input.to(dtype), k, lam)[1]
    in_v, in_k, in_lam = pull(grad.to(dtype))
    return in_v.to(input.dtype), in_k, in_lam


def _backward_fake(
    grad: Tensor,
    input: Tensor,
    norms: Tensor,
    roots: Tensor,
    weights: Tensor | None,
    metric: Tensor | None,
    k: Tensor,
    lam: Tensor,
    form: int,
) -> tuple[Tensor, Tensor, Tensor]:
    output = torch.empty_like(input, memory_format=torch.contiguous_format)
    return output, torch.empty_like(k), torch.empty_like(lam)


def _backward_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    if in_dims[4] is not None:
        raise NotImplementedError("weights of the groups cannot be vmapped")
    weights = args[4]
    folded = fold_problems(info, in_dims, (*args[:4], None, *args[5:]))
    folded[4] = weights
    return unfold_problems(info, torch.ops.fusee.prox_group_envelope_backward(*folded))


_prox = Op(
    "prox_group_envelope",
    fake=_fake,
    reference=_reference,
    vmap=_vmap,
    differentiable=((0, 3, 4), (0,)),
    backward=_backward,
)
_prox_backward = Op(
    "prox_group_envelope_backward",
    fake=_backward_fake,
    reference=_backward_reference,
    vmap=_backward_vmap,
    differentiable=((0, 1, 6, 7), (0, 1, 2)),
)


def _check_metric(metric: Any, input: Tensor, folded: Folded, dim: Dims) -> Tensor:
    """The metric (1, groups), of the accumulation dtype, or in the shape of the folded input."""
    check_floating("metric", metric)
    check_same_device("metric", metric, "input", input)
    groups = folded.groups
    whole = metric.shape == input.shape
    if not whole and metric.shape != (groups,):
        raise ValueError(
            f"metric must have shape ({groups},) or that of input, {tuple(input.shape)}, got "
            f"{tuple(metric.shape)}"
        )
    given = metric.detach()
    of_groups = not whole or folded.size == 1
    h = given.to(accumulate_dtype(input.dtype)) if of_groups else given
    wanted = wanted_in(given, h, "positive and finite")
    h = marked("metric", h, (h > 0) & h.isfinite(), wanted)
    if whole:
        h = fold_groups(h, dim).tensor
    return h.reshape(1, groups) if of_groups else h


def prox_group_envelope(
    input: Any,
    k: float | Tensor,
    lam: float | Tensor,
    *,
    dim: Dims = 0,
    groups: GroupTable | None = None,
    weights: Weights = None,
    metric: Tensor | Sequence[Tensor] | None = None,
    debiased: bool = False,
) -> Any:
    r"""The exact proximal operator of :func:`fusee.group_envelope`: shrinks groups towards having at
    most ``k`` that are not zero, and makes the smallest exactly zero.

    .. math::
        \operatorname*{argmin}_x \; \tfrac12 \sum_i H_i (x_i - v_i)^2 + \lambda S_k(x)

    Of groups with norms :math:`n_j`, weights :math:`d_j` and the metric :math:`H_j` (ones without), each
    is multiplied by

    .. math::
        \max\!\Big(0, \min\!\Big(\frac{H_j}{h_j + \lambda d_j},
        \frac{H_j - \lambda \theta \sqrt{d_j} / n_j}{h_j}\Big)\Big),

    where :math:`h_j = H_j`, or :math:`H_j - \lambda d_j` if ``debiased``. The threshold theta solves

    .. math::
        \sum_j \text{clip}(a_j / \theta - b_j, 0, 1) = k, \quad
        a_j = \sqrt{d_j}\, n_j H_j / h_j, \quad b_j = \lambda d_j / h_j,

    and is zero where at most k groups are not. So large groups shrink as by weight decay, those in
    between by a threshold that k sets, and small ones become zero. The debiased form returns large
    groups as they are, bit for bit; it runs from the identity at ``lam = 0`` to the projection that
    keeps the ``floor(k)`` groups with the largest :math:`\sqrt{d_j H_j}\, n_j`, the first of equals,
    which it is wherever :math:`\lambda \max_j d_j / H_j \ge 1`.

    Note that more than k groups may survive one call with a small ``lam``.

    Args:
        input: v, any shape and strides; float32, float64, bfloat16 or float16. Half types are computed
            in float32 and rounded once.
        k: how many groups are free, a number or a tensor of one element, not necessarily an integer.
        lam: the factor of the penalty, a number or a tensor of one element, not negative. In a step of
            an optimiser it is the learning rate times the factor in the objective.
        dim: the dimension or dimensions that number the groups, as in :func:`fusee.group_envelope`.
        groups: a :class:`fusee.GroupTable` for groups that are no slices or span tensors; then ``input``
            is a sequence of tensors, and so is the result.
        weights: of the groups, as in :func:`fusee.group_envelope`.
        metric: positive numbers H, one for each group in the order of ``dim``, or of the shape of
            ``input``, as the denominator of Adam; with a table, a sequence of tensors of the shapes of
            ``input``. It has no gradient. Where it differs within groups of several elements, the
            shares of the groups take a search of their own, a few passes over the elements; where
            derivatives are wanted that is in float64, in plain PyTorch operators, and much slower.
        debiased: whether the penalty is the debiased one, which leaves large groups as they are.

    Returns:
        A tensor of the shape and dtype of ``input``.

    Raises:
        TypeError: ``input`` is not a dense floating-point tensor, ``k`` or ``lam`` is not a real number
            or tensor, ``dim`` is not an int or a sequence of them, or ``weights`` or ``metric`` is not a
            floating-point tensor.
        IndexError: ``dim`` is out of range.
        ValueError: ``dim`` repeats a dimension, ``k`` or ``lam`` is NaN or has more than one element,
            ``lam`` is negative, ``weights`` or ``metric`` has another shape, ``weights`` is an unknown
            string, negative or not finite, ``metric`` is not positive and finite, or a tensor is on
            another device. What only the values of a tensor show raises for CPU tensors in eager
            mode; on CUDA and in compiled code the result becomes NaN instead, unless
            ``FUSEE_CHECK_VALUES=1``.

    With ``lam = 0`` the result is ``input``, bit for bit, whatever k is; with ``k <= 0`` and any other
    lam it is zero, and with an infinite lam too, but for the debiased form. k past the number of groups
    is allowed. A group of weight zero stays as it is and does not count. Zero groups stay zero and do
    not count. NaN in one group makes the whole result NaN, as the groups share theta. An infinite group
    counts as the largest; in a metric of elements it makes the result NaN.

    Differentiable in ``input``, ``k`` and ``lam``, to any order (to the third in a metric of elements)
    and in forward mode, in closed form: on the partition of the groups, which is constant almost
    everywhere. A projection passes the gradient of the groups that it keeps. ``vmap`` makes one call of
    a batch of problems, each with its ``k`` and ``lam``, all with the same ``weights``. A DTensor keeps
    its placements; of it one number for each group travels, and ``metric`` must be one for each group.

    Deterministic: the same bits on the same engine, whatever the number of threads; with a table in
    compiled code on CUDA only under ``torch.use_deterministic_algorithms``. Nothing is read back from
    the device, but of a table in its first call.

    Source: the penalty as in :func:`fusee.group_envelope`; its operator for single elements without
    weights is that of Argyriou, Foygel and Srebro, arXiv:1204.5043. Groups, weights, metric, debiased
    form and derivatives were derived here.

    Example:
        >>> import torch, fusee
        >>> x = torch.tensor([3.0, 2.0, -1.0, 0.25])
        >>> fusee.prox_group_envelope(x, k=2, lam=0.5)
        tensor([ 2.0000,  1.2500, -0.2500,  0.0000])
        >>> fusee.prox_group_envelope(x, k=2, lam=0.5, debiased=True)
        tensor([3., 2., -0., 0.])
    """
    if groups is not None:
        from fusee.prox.table_functions import prox_of_table

        check_no_dim(dim)
        options: Any = {"weights": weights, "metric": metric, "debiased": debiased}
        return prox_of_table(input, groups, k, lam, **options)
    check_floating("input", input)
    if is_sharded(input):
        form = int(debiased)
        of_groups: Any = {"dim": dim, "weights": weights, "metric": metric}
        return scaled_by_problem(input, k, lam, **of_groups, form=form)
    folded = fold_groups(input, dim)
    d = check_weights(weights, input, folded.groups, folded.size)
    of_k = check_scalar("k", k, input, positive=False)
    of_lam = check_scalar("lam", lam, input, positive=True)
    H = None if metric is None else _check_metric(metric, input, folded, dim)
    if H is not None and H.dim() == 4:
        x = prox_of_elements(folded.tensor, H, d, of_k, of_lam, int(debiased))
    else:
        x = _prox(folded.tensor, d, H, of_k, of_lam, 1 if debiased else 0)[0]
    return folded.unfold(x)
