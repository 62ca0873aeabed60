"""A box through batch normalisation, and through ReLU."""

from __future__ import annotations

import torch
from torch import Tensor

from fusee._checks import accumulate_dtype
from fusee.bounds.boxes import Box, check_pair, check_radius, in_accumulate_dtype, next_above
from fusee.bounds.interval_affine import affine_box, check_channels


def batch_norm_box(
    box: Box,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relu: bool = False,
    sound: bool = False,
) -> Box:
    """:func:`interval_batch_norm` without checks."""
    if sound:
        return _sound_batch_norm(box, mean, var, weight, bias, eps, relu)
    mean, var, weight, bias = in_accumulate_dtype(mean, var, weight, bias)
    scale = torch.rsqrt(var + eps)
    scale = scale if weight is None else scale * weight
    shift = -mean * scale
    shift = shift if bias is None else shift + bias
    return affine_box(box, scale, shift, relu)


def _sound_batch_norm(
    box: Box,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relu: bool,
) -> Box:
    """With what scale and shift may have lost: they are computed in float64 and rounded, so that a scale
    is off by at most 8 units of its dtype, or by its smallest number, and a shift by 8 units of
    |mean scale| + |bias|."""
    dtype = box.center.dtype
    unit = torch.finfo(accumulate_dtype(dtype)).eps / 2
    wide = [None if t is None else t.double() for t in (mean, var, weight, bias)]
    mean, var, weight, bias = wide  # type: ignore[assignment]
    scale = torch.rsqrt(var + eps)
    scale = scale if weight is None else scale * weight
    shift, size = -mean * scale, (mean * scale).abs()
    if bias is not None:
        shift, size = shift + bias, size + bias.abs()
    of_channels = (-1, *[1] * (box.center.dim() - 2))
    reach = next_above(next_above(box.center.abs()) + box.radius)
    covered = next_above(box.radius + next_above(9 * unit * reach))
    tiny = torch.finfo(dtype).tiny
    lost = (next_above((9 * unit * size).to(dtype)) + tiny).view(of_channels)
    grown = affine_box(Box(box.center, covered), scale.to(dtype), shift.to(dtype), False, True)
    lost = next_above(lost + next_above(tiny * reach))
    radius = next_above(grown.radius * (1 + 16 * unit) + lost)
    return affine_box(Box(grown.center, next_above(radius)), None, None, relu, True)


def interval_batch_norm(
    center: Tensor,
    radius: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    relu: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""The box that batch normalisation makes of a box, and ReLU where asked.

    .. math:: \mu' = c\,\mu + (\beta - c\, m), \quad r' = |c|\, r, \quad c = \gamma / \sqrt{v + \epsilon}

    Args:
        center: μ (batch, channels, ...), any strides; float32, float64, bfloat16 or float16.
        radius: r, of the shape and dtype of ``center``, not negative.
        mean, var: m and v (channels): running statistics, or in training those of a batch, whose
            gradients are then needed. The variance is not negative.
        weight, bias: γ and β (channels).
        eps: ε, added to the variance.
        relu: whether ReLU follows.

    Returns:
        ``(center, radius)``, each of the shape and dtype of ``center``.

    Raises:
        TypeError: an argument is not a dense floating-point tensor, or the dtypes of center and radius
            differ.
        ValueError: shapes or devices do not fit; a radius is negative or infinite (on CUDA and under
            compile such elements come back NaN). NaN goes through as NaN.

    Differentiable in all tensors, to any order and in forward mode. One pass over both arrays.
    Deterministic.

    Source: see :func:`fusee.interval_linear`.

    Example:
        >>> import torch, fusee
        >>> box = torch.ones(1, 2), torch.full((1, 2), 0.5)
        >>> statistics = torch.zeros(2), torch.ones(2)
        >>> fusee.interval_batch_norm(*box, *statistics, torch.tensor([2.0, -2.0]), eps=0)
        (tensor([[ 2., -2.]]), tensor([[1., 1.]]))
    """
    check_pair("center", center, "radius", radius)
    check_channels(center, {"mean": mean, "var": var, "weight": weight, "bias": bias})
    check_radius(radius)
    center, radius = batch_norm_box(Box(center, radius), mean, var, weight, bias, eps, relu)
    return center, radius
