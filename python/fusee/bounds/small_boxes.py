"""Small boxes about chosen points, inside larger ones."""

from __future__ import annotations

import torch
from torch import Tensor

from fusee.bounds.boxes import check_ends, check_pair
from fusee.bounds.options import check_number


def small_boxes(
    lower: Tensor, upper: Tensor, points: Tensor, ratio: float
) -> tuple[Tensor, Tensor]:
    r"""The box of a part of the radius whose center is as near to a point as one inside the box can be.

    .. math:: \tau = \lambda \frac{u - l}{2}, \qquad
              c = \min(\max(x, l + \tau), u - \tau), \qquad [c - \tau,\; c + \tau]

    To train with such boxes about the points where an attack found the largest loss (SABR) gives
    networks that are less regular and more accurate than with the whole box, whose bounds are no longer
    what is trained; with λ = 1 it is the whole.

    Args:
        lower, upper: l and u, the ends of the boxes, of one shape, dtype and device; float32, float64,
            bfloat16 or float16.
        points: x, of that shape, dtype and device, such as :func:`fusee.nn.pgd_attack` gives. What lies
            outside the box is moved to its nearest end.
        ratio: λ in [0, 1].

    Returns:
        ``(lower, upper)``, each of the shape and dtype of ``lower``, without gradient. Whatever the
        rounding they lie inside the box and contain the point; ``ratio=1`` gives the box itself, to the
        bit.

    Raises:
        TypeError: an argument is not a dense floating-point tensor, the dtypes differ, or ``ratio`` is
            no number.
        ValueError: shapes or devices differ, an end is infinite, ``lower`` is above ``upper``, or
            ``ratio`` is out of range. NaN goes through as NaN.

    Deterministic.

    Source: Müller et al., "Certified training: small boxes are all you need", 2023.

    Example:
        >>> import torch, fusee
        >>> ends = torch.zeros(3), torch.ones(3)
        >>> fusee.small_boxes(*ends, torch.tensor([0.0, 0.5, 0.75]), 0.25)
        (tensor([0.0000, 0.3750, 0.6250]), tensor([0.2500, 0.6250, 0.8750]))
    """
    check_pair("lower", lower, "upper", upper)
    check_pair("lower", lower, "points", points)
    check_number("ratio", ratio, 0, 1)
    check_ends(lower, upper)
    with torch.no_grad():
        points = points.clamp(lower, upper)
        width = upper - lower
        half, rest = 0.5 * ratio * width, (1 - ratio) * width
        # So clamped, the ends stay on their sides of the point, and of the box.
        low = torch.minimum(torch.maximum(points - half, lower), lower + rest)
        high = torch.maximum(torch.minimum(points + half, upper), upper - rest)
    return low, high
