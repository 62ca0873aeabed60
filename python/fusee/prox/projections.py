"""Projections onto sparse sets: k groups of a tensor, or k entries of each of its rows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fusee._checks import accumulate_dtype, check_dim, check_floating
from fusee.prox.group_table import GroupTable
from fusee.prox.groups import (
    Dims,
    Weights,
    as_index,
    as_number,
    check_no_dim,
    check_scalar,
    check_weights,
    fold_groups,
)
from fusee.prox.prox_group_envelope import FORMS, _prox
from fusee.prox.sharded import is_sharded, scaled_by_problem


def project_top_k_groups(
    input: Any,
    k: float | Tensor,
    *,
    dim: Dims = 0,
    groups: GroupTable | None = None,
    weights: Weights = None,
) -> Any:
    r"""Keeps the k largest groups of a tensor and sets the others to zero.

    The group j, of the elements :math:`v_{g_j}`, is kept if :math:`\sqrt{d_j}\,\lVert v_{g_j} \rVert_2`
    is among the ⌊k⌋ largest; of equals the first are. It is the projection onto the tensors with at most
    k nonzero groups, in the norm :math:`\sum_j d_j \lVert v_{g_j} \rVert_2^2`, and what
    :func:`fusee.prox_group_envelope` in its debiased form becomes for large ``lam``.

    Args:
        input: any shape and strides; float32, float64, bfloat16 or float16.
        k: how many groups are kept, a number or a tensor of one element; of a real one the integer
            below. With k <= 0 all are set to zero, with k at or above their number none.
        dim: the dimension, or dimensions, that number the groups: 0 for filters, 1 for input channels,
            all for single elements.
        groups: a :class:`fusee.GroupTable` for groups that are no slices or span tensors; then ``input``
            is a sequence of tensors, and so is the result.
        weights: the d of the groups: None for ones, ``"size"``, ``"inverse_size"`` (of no consequence
            where all groups have one size), or a tensor of one a group, not negative. A group of weight
            zero is always kept and does not count.

    Returns:
        A tensor of the shape and dtype of ``input``; what is kept has the same bits.

    Raises:
        TypeError: ``input`` is not a dense floating-point tensor, or ``k``, ``dim`` or ``weights`` is of
            another type than described.
        IndexError: ``dim`` is out of range.
        ValueError: ``dim`` repeats a dimension, ``k`` is NaN or a tensor of several elements,
            ``weights`` has another shape or is on another device, or is negative or infinite. What only
            the values of ``weights`` show raises for CPU tensors in eager mode.

    Differentiable in ``input`` to any order and in forward mode: the derivative is what is kept; ``k``
    and ``weights`` have none. Deterministic: the same bits on the same engine, whatever the number of
    threads; with a table in compiled code on CUDA only under ``torch.use_deterministic_algorithms``.
    NaN anywhere makes all of the result NaN, since then no group is known to be among the largest. A
    DTensor keeps its placements; of it one number for each group travels.

    Source: hard thresholding of groups, see Blumensath and Davies, "Iterative Hard Thresholding for
    Compressed Sensing", arXiv:0805.0510, for that of single elements.

    Example:
        >>> import torch, fusee
        >>> fusee.project_top_k_groups(torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 6.0]]), 1)
        tensor([[0., 0.],
                [0., 0.],
                [0., 6.]])
    """
    if groups is not None:
        from fusee.prox.table_functions import project_of_table

        check_no_dim(dim)
        return project_of_table(input, groups, k, weights=weights)
    check_floating("input", input)
    form = FORMS.index("projection")
    if is_sharded(input):
        return scaled_by_problem(input, k, 0, dim=dim, weights=weights, metric=None, form=form)
    folded = fold_groups(input, dim)
    d = check_weights(weights, input, folded.groups, folded.size)
    kept = check_scalar("k", k, input, positive=False).detach()
    return folded.unfold(_prox(folded.tensor, d, None, kept, torch.zeros_like(kept), form)[0])


def project_top_k_nonnegative(input: Tensor, k: float, *, dim: int = -1) -> Tensor:
    r"""Projects every row onto the nonnegative vectors with at most k entries that are not zero.

    .. math:: \arg\min_x \lVert x - v \rVert_2 \quad\text{over}\quad x \ge 0,\ \lVert x \rVert_0 \le k

    Positive entries that are among the ⌊k⌋ largest are kept, of equals the first; the others become
    zero.

    Args:
        input: the vectors v along ``dim``, any shape and strides; float32, float64, bfloat16 or float16.
        k: how many entries are kept at most; of a real number the integer below. With k <= 0 none is,
            with k at or above the length of the row the result is ``input.relu()``.
        dim: the dimension along which the vectors lie. The others are a batch.

    Returns:
        A tensor of the shape and dtype of ``input``; what is kept has the same bits.

    Raises:
        TypeError: ``input`` is not a dense floating-point tensor, ``k`` not a number or ``dim`` not an
            int.
        IndexError: ``dim`` is out of range.
        ValueError: ``k`` is NaN.

    Differentiable to any order and in forward mode: the derivative is one for what is kept, zero
    elsewhere. Deterministic: made of torch's own operators, whose results here are the same whatever the
    number of threads. NaN makes its row NaN.

    Source: Kyrillidis, Becker, Cevher and Koch, "Sparse projections onto the simplex", arXiv:1206.1529.

    Example:
        >>> import torch, fusee
        >>> fusee.project_top_k_nonnegative(torch.tensor([3.0, -5.0, 1.0, 2.0]), 2)
        tensor([3., 0., 0., 2.])
    """
    v, dim, kept = _checked(input, k, dim)
    broken = v.isnan().any(dim, keepdim=True)
    keep = (_largest(v.detach(), kept, dim) & (v > 0)) | broken
    return _finished(torch.where(keep, v, 0.0), broken, input)


def project_top_k_simplex(input: Tensor, k: float, *, total: float = 1.0, dim: int = -1) -> Tensor:
    r"""Projects every row onto the vectors of a simplex with at most k entries that are not zero.

    .. math:: \arg\min_x \lVert x - v \rVert_2 \quad\text{over}\quad
        x \ge 0,\ \textstyle\sum_i x_i = s,\ \lVert x \rVert_0 \le k

    With K the ⌊k⌋ largest entries, of equals the first, it is :math:`x_i = \max(v_i - \tau, 0)` on K and
    zero elsewhere, the :math:`\tau` being that with which the entries sum to s.

    Args:
        input: the vectors v along ``dim``, any shape and strides; float32, float64, bfloat16 or float16.
            Half types are computed in float32 and rounded once.
        k: how many entries are not zero at most; of a real number the integer below. At least 1: the set
            has no points otherwise. With k at or above the length of the row it is the projection onto
            the simplex.
        total: the sum s of the entries, positive and finite.
        dim: the dimension along which the vectors lie. The others are a batch.

    Returns:
        A tensor of the shape and dtype of ``input``, whose rows sum to ``total`` up to rounding.

    Raises:
        TypeError: ``input`` is not a dense floating-point tensor, ``k`` or ``total`` not a number or
            ``dim`` not an int.
        IndexError: ``dim`` is out of range.
        ValueError: ``k`` is less than 1 or NaN, ``total`` is not positive and finite, or the rows have
            no entries.

    Differentiable in ``input`` to any order and in forward mode: the derivative subtracts the mean over
    the entries that are positive. Deterministic: made of torch's own operators, whose results here are
    the same on one device. Entries of minus infinity become zero where others are finite; NaN and plus
    infinity make their row NaN.

    Source: Kyrillidis, Becker, Cevher and Koch, "Sparse projections onto the simplex", arXiv:1206.1529.

    Example:
        >>> import torch, fusee
        >>> fusee.project_top_k_simplex(torch.tensor([0.75, 1.0, 0.5, -2.0]), 2)
        tensor([0.3750, 0.6250, 0.0000, 0.0000])
    """
    total = _check_positive("total", total)
    v, dim, kept = _checked(input, k, dim)
    if v.shape[dim] == 0:
        raise ValueError(f"input must have entries along dim, got shape {tuple(input.shape)}")
    if kept < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    # Relative to the largest, so that nothing cancels.
    relative = v - v.detach().amax(dim, keepdim=True)
    below = relative.detach()
    broken = below.isnan().any(dim, keepdim=True)
    positive = below >= _least_positive(below, kept, dim, total)
    support = (_largest(v.detach(), kept, dim) & positive) | broken
    # The clamp below would hide from a gradient that the row is broken.
    relative = torch.where(support, relative, 0.0) * torch.where(broken, math.nan, 1.0)
    tau = (relative.sum(dim, keepdim=True) - total) / support.sum(dim, keepdim=True)
    output = torch.where(support, (relative - tau).clamp(min=0), 0.0)
    return _finished(output, broken, input)


def project_top_k_ball(input: Tensor, k: float, *, radius: float = 1.0, dim: int = -1) -> Tensor:
    r"""Projects every row onto the vectors of a ball with at most k entries that are not zero.

    .. math:: \arg\min_x \lVert x - v \rVert_2 \quad\text{over}\quad
        \lVert x \rVert_2 \le r,\ \lVert x \rVert_0 \le k

    The ⌊k⌋ entries of the largest magnitude are kept, of equals the first, and together scaled down to
    the radius if their norm is larger.

    Args:
        input: the vectors v along ``dim``, any shape and strides; float32, float64, bfloat16 or float16.
            Half types are computed in float32 and rounded once.
        k: how many entries are kept at most; of a real number the integer below. With k <= 0 none is,
            with k at or above the length of the row it is the projection onto the ball.
        radius: that of the ball, r, positive and finite.
        dim: the dimension along which the vectors lie. The others are a batch.

    Returns:
        A tensor of the shape and dtype of ``input``; where a row is not scaled, what is kept has the
        same bits.

    Raises:
        TypeError: ``input`` is not a dense floating-point tensor, ``k`` or ``radius`` not a number or
            ``dim`` not an int.
        IndexError: ``dim`` is out of range.
        ValueError: ``k`` is NaN, or ``radius`` is not positive and finite.

    Differentiable in ``input`` to any order and in forward mode; on the sphere itself the derivative is
    that from inside. Deterministic: made of torch's own operators, whose results here are the same on
    one device. NaN and infinity make their row NaN.

    Source: Beck and Hallak, "On the minimization over sparse symmetric sets: projections, optimality
    conditions, and algorithms", Mathematics of Operations Research 41 (2016).

    Example:
        >>> import torch, fusee
        >>> fusee.project_top_k_ball(torch.tensor([3.0, -4.0, 1.0]), 2)
        tensor([ 0.6000, -0.8000,  0.0000])
    """
    radius = _check_positive("radius", radius)
    v, dim, kept = _checked(input, k, dim)
    if v.shape[dim] == 0:
        return input.clone()
    sizes = v.detach().abs()
    most = sizes.amax(dim, keepdim=True)
    broken = ~most.isfinite()
    keep = _largest(sizes, kept, dim) | broken
    scale = torch.where(most > 0, most, 1.0)
    chosen = torch.where(keep, v, 0.0)
    # Of numbers up to 1, so that no square overflows.
    unit = chosen / scale
    squares = unit.square().sum(dim, keepdim=True)
    some = squares > 0
    norm = torch.where(some, torch.where(some, squares, 1.0).sqrt(), 0.0)
    outside = norm > radius / scale
    shrunk = unit * (radius / torch.where(outside, norm, 1.0))
    return _finished(torch.where(outside, shrunk, chosen), broken, input)


def _check_number(name: str, value: Any) -> float:
    number = as_number(value)
    if number is None:
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return number


def _check_positive(name: str, value: Any) -> float:
    number = _check_number(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return number


def _checked(input: Any, k: Any, dim: Any) -> tuple[Tensor, int, int]:
    """The input with at least one dimension and in the accumulation dtype, ``dim`` from the front, and
    how many entries are kept."""
    check_floating("input", input)
    dim = check_dim(as_index(dim), input.dim())
    k = _check_number("k", k)
    if k != k:
        raise ValueError(f"k must not be NaN, got {k}")
    v = input.to(accumulate_dtype(input.dtype))
    v = v if v.dim() else v.reshape(1)
    count = v.shape[dim]
    if isinstance(k, int):
        return v, dim, k if k < count else count
    return v, dim, count if k >= count else math.floor(max(k, 0.0))


def _largest(keys: Tensor, k: int, dim: int) -> Tensor:
    """Which keys are the k largest along ``dim``, the first of equals."""
    if k <= 0:
        return torch.zeros_like(keys, dtype=torch.bool)
    if k >= keys.shape[dim]:
        return torch.ones_like(keys, dtype=torch.bool)
    least = keys.topk(k, dim, sorted=False).values.amin(dim, keepdim=True)
    above, ties = keys > least, keys == least
    room = k - above.sum(dim, keepdim=True)
    return above | (ties & (ties.cumsum(dim) <= room))


def _least_positive(v: Tensor, k: int, dim: int, total: float) -> Tensor:
    """The least of the k largest entries that is positive in their projection onto the simplex.

    An entry is positive if what the larger ones are above it sums to less than ``total``. Found by
    bisection, whose sums are fresh: those that grow entry by entry cancel.
    """
    values = v.topk(k, dim).values
    low = torch.zeros_like(values.narrow(dim, 0, 1), dtype=torch.int64)
    high = torch.full_like(low, k - 1)
    for _ in range(k.bit_length()):
        middle = (low + high + 1) // 2
        excess = (values - values.gather(dim, middle)).clamp(min=0).sum(dim, keepdim=True)
        positive = excess < total
        low = torch.where(positive, middle, low)
        high = torch.where(positive, high, middle - 1)
    return values.gather(dim, low)


def _finished(output: Tensor, broken: Tensor, input: Tensor) -> Tensor:
    """The result, NaN in the rows that are broken, as its gradient is."""
    output = output * torch.where(broken, math.nan, 1.0)
    return output.to(input.dtype).reshape(input.shape)
