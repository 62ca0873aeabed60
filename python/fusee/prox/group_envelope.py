"""The group envelope: the tightest convex penalty under a bound on the number of groups."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fusee._checks import accumulate_dtype, check_floating
from fusee._op import Op, in_functorch_transform
from fusee.prox.group_table import GroupTable
from fusee.prox.groups import (
    Dims,
    Weights,
    check_no_dim,
    check_scalar,
    check_weights,
    fold_groups,
)
from fusee.prox.prox_group_envelope import fold_problems, unfold_problems
from fusee.prox.root import norms_of, solve_root
from fusee.prox.sharded import envelope_of_sharded, is_sharded


def _roots_of_weights(weights: Tensor | None, norms: Tensor) -> Tensor:
    return torch.ones_like(norms) if weights is None else weights.to(norms.dtype).sqrt()


def _norms_and_knee(input: Tensor, weights: Tensor | None, k: Tensor) -> tuple[Tensor, Tensor]:
    norms = norms_of(input.to(accumulate_dtype(input.dtype)))
    # The root is found in float64, whatever the input is.
    n = norms.to(k.dtype)
    z = _roots_of_weights(weights, n) * n
    knee = solve_root(z, torch.zeros_like(z), k)
    return norms, torch.where(k <= 0, math.inf, knee)


def _reference(
    input: Tensor, weights: Tensor | None, k: Tensor, debiased: bool
) -> tuple[Tensor, Tensor, Tensor]:
    norms, knee = _norms_and_knee(input, weights, k)
    n = norms.to(k.dtype)
    z = _roots_of_weights(weights, n) * n
    above = z >= knee[:, None]
    others = torch.where(above, 0.0, z)
    # T^2 / (k - N), and with it less the squares, of z below the knee T / (k - N).
    finite = torch.where(knee.isinf(), 0.0, knee)[:, None]
    tail = others * (finite - others) if debiased else others * finite
    value = tail.sum(1)
    if not debiased:
        value = value + torch.where(above, z.square(), 0.0).sum(1)
    some = others.sum(1) > 0
    value = torch.where(knee.isinf() & some, math.inf, value / 2)
    return torch.where(knee.isnan(), math.nan, value), norms, knee


def _fake(
    input: Tensor, weights: Tensor | None, k: Tensor, debiased: bool
) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(input.dim() == 4, lambda: f"input must have 4 dimensions, got {input.shape}")
    batch, _, groups, _ = input.shape
    norms = input.new_empty((batch, groups), dtype=accumulate_dtype(input.dtype))
    return k.new_empty((batch,)), norms, k.new_empty((batch,))


def _vmap(
    info: Any, in_dims: Any, input: Tensor, weights: Tensor | None, k: Tensor, debiased: bool
) -> Any:
    if in_dims[1] is not None:
        raise NotImplementedError("weights of the groups cannot be vmapped")
    args = fold_problems(info, in_dims, (input, None, k, debiased))
    args[1] = weights
    return unfold_problems(info, torch.ops.fusee.group_envelope(*args))


def _backward(ctx: Any, args: Any, constants: Any, grad: Tensor) -> Any:
    input, weights, k, debiased = args
    norms, knee = constants
    transformed = in_functorch_transform() or forward_ad._current_level >= 0
    if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or transformed):
        # A derivative of the gradient may follow, for which the knee is a function of input and k.
        norms, knee = _norms_and_knee(input, weights, k)
    in_input = _envelope_backward(grad, input, norms, knee, weights, debiased)
    in_k = -grad * torch.where(knee.isinf(), 0.0, knee).square() / 2
    return in_input, None, in_k, None


def _backward_reference(
    grad: Tensor,
    input: Tensor,
    norms: Tensor,
    knee: Tensor,
    weights: Tensor | None,
    debiased: bool,
) -> Tensor:
    dtype = accumulate_dtype(input.dtype)
    n = norms.to(knee.dtype)
    d = _roots_of_weights(weights, n)
    above = d * n >= knee[:, None]
    steep = d * knee[:, None] / torch.where(above | (n == 0), 1.0, n)
    slope = torch.where(above, d.square(), steep) - (d.square() if debiased else 0.0)
    slope = torch.where(n == 0, 0.0, slope)
    slope = torch.where(knee[:, None].isnan(), math.nan, slope) * grad[:, None]
    return (input.to(dtype) * slope[:, None, :, None].to(dtype)).to(input.dtype)


def _backward_fake(
    grad: Tensor,
    input: Tensor,
    norms: Tensor,
    knee: Tensor,
    weights: Tensor | None,
    debiased: bool,
) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def _backward_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    if in_dims[4] is not None:
        raise NotImplementedError("weights of the groups cannot be vmapped")
    folded = fold_problems(info, in_dims, (*args[:4], None, args[5]))
    folded[4] = args[4]
    result = torch.ops.fusee.group_envelope_backward(*folded)
    (result,), (dim,) = unfold_problems(info, (result,))
    return result, dim


_envelope = Op(
    "group_envelope",
    fake=_fake,
    reference=_reference,
    vmap=_vmap,
    differentiable=((0, 2), (0,)),
    backward=_backward,
)
_envelope_backward = Op(
    "group_envelope_backward",
    fake=_backward_fake,
    reference=_backward_reference,
    vmap=_backward_vmap,
    differentiable=((0, 1, 2, 3), (0,)),
)


def group_envelope(
    input: Any,
    k: float | Tensor,
    *,
    dim: Dims = 0,
    groups: GroupTable | None = None,
    weights: Weights = None,
    debiased: bool = False,
) -> Tensor:
    r"""The tightest convex penalty whose groups are free up to ``k`` of them: half the squared norm
    where at most k groups are not zero, and more elsewhere.

    Of groups with norms :math:`n_j` and weights :math:`d_j`,

    .. math::
        S_k = \tfrac12 \min_u \sum_j \frac{d_j n_j^2}{u_j}, \; 0 \le u_j \le 1, \; \sum_j u_j \le k.

    With :math:`z_j = \sqrt{d_j}\, n_j` and the knee :math:`\tau` that solves
    :math:`\sum_j \min(1, z_j / \tau) = k` (zero where at most k groups are not),

    .. math::
        S_k = \tfrac12 \sum_{z_j \ge \tau} z_j^2 + \frac{T^2}{2 (k - N)},

    where N counts the groups with :math:`z_j \ge \tau` and T sums the z of the others. For ``k = 1``
    this is half the squared sum of the norms, the group lasso squared; for k at least the number of
    groups, ridge. For single elements it is half the squared k-support norm. ``debiased`` subtracts
    :math:`\tfrac12 \sum_j d_j n_j^2`: the penalty is then zero exactly where at most k groups are not
    zero, and no longer convex.

    Args:
        input: any shape and strides; float32, float64, bfloat16 or float16. Half types are computed in
            float32 and rounded once.
        k: how many groups are free, a number or a tensor of one element, not necessarily an integer.
        dim: the dimension or dimensions that number the groups: 0 for the filters of a convolution, 1
            for its input channels, (1, 2, 3) for the shapes of filters, all of them for single elements.
            An empty tuple makes the whole tensor one group.
        groups: a :class:`fusee.GroupTable` for groups that are no slices or span tensors; then ``input``
            is a sequence of tensors.
        weights: of the groups: None for ones, ``"size"`` for the number of their elements,
            ``"inverse_size"`` for its reciprocal, or a tensor with one number for each, in the order of
            ``dim``. It has no gradient. A group of weight zero is free and does not count.
        debiased: whether to subtract half the weighted squared norm.

    Returns:
        A tensor without dimensions, of the dtype of ``input``.

    Raises:
        TypeError: ``input`` is not a dense floating-point tensor, ``k`` is not a real number or tensor,
            ``dim`` is not an int or a sequence of them, or ``weights`` is not a floating-point tensor.
        IndexError: ``dim`` is out of range.
        ValueError: ``dim`` repeats a dimension, ``k`` is NaN or has more than one element, ``weights``
            has another shape, is an unknown string, is negative or not finite, or a tensor is on another
            device. What only the values of a tensor show raises for CPU tensors in eager mode; on
            CUDA and in compiled code the result becomes NaN instead, unless ``FUSEE_CHECK_VALUES=1``.

    For ``k <= 0`` the value is infinite unless ``input`` is zero. No groups, or none with elements, have
    the value zero. NaN in one group makes the result NaN.

    Differentiable in ``input`` and ``k``, to any order and in forward mode. Where at most k groups are
    not zero, the gradient in ``input`` is that of the ridge; zero groups have the gradient zero; that in
    ``k`` is :math:`-\tau^2 / 2`. Deterministic: the same bits on the same engine, whatever the number of
    threads; with a table in compiled code on CUDA only under ``torch.use_deterministic_algorithms``.
    ``vmap`` makes one call of a batch of problems, each with its ``k``, all with the same ``weights``.
    Of a DTensor one number for each group travels, and the result is a plain tensor, the same in every
    process.

    Source: the sparse envelope of Beck and Refael, "Sparse Regularization via Bidualization", for groups
    and with weights; Argyriou, Foygel and Srebro, "Sparse Prediction with the k-Support Norm",
    arXiv:1204.5043. The formulas were derived anew. The debiased form is the quadratic envelope of
    Carlsson, "On Convex Envelopes and Regularization of Non-Convex Functionals without Moving Global
    Minima", arXiv:1811.03439.

    Example:
        >>> import torch, fusee
        >>> x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.6, 0.8]])
        >>> [fusee.group_envelope(x, k).item() for k in (1, 2)]
        [18.0, 13.0]
    """
    if groups is not None:
        from fusee.prox.table_functions import envelope_of_table

        check_no_dim(dim)
        return envelope_of_table(input, groups, k, weights=weights, debiased=debiased)
    check_floating("input", input)
    if is_sharded(input):
        return envelope_of_sharded(input, k, dim=dim, weights=weights, debiased=debiased)
    folded = fold_groups(input, dim)
    d = check_weights(weights, input, folded.groups, folded.size)
    of_k = check_scalar("k", k, input, positive=False)
    value = _envelope(folded.tensor, d, of_k, bool(debiased))[0]
    return value.reshape(()).to(input.dtype)
