"""What holds boxes small and units alive while a network begins to train with boxes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusee._checks import check_floating
from fusee.bounds.boxes import Box, check_pair, in_accumulate_dtype
from fusee.bounds.options import check_number


def _ratio(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The smaller of two numbers over the larger, and whether that is a number."""
    least, most = torch.minimum(one, other), torch.maximum(one, other)
    valid = most > 0
    return least / torch.where(valid, most, 1), valid


def _of_layer(first: Tensor, box: Box, tolerance: float) -> Tensor:
    """Both penalties of one layer."""
    center, radius = box
    mean_radius = radius.mean()
    is_point = mean_radius == 0
    growth = first / torch.where(is_point, 1, mean_radius)
    tight = torch.where(is_point, 0, (tolerance - growth).relu())

    active, inactive = center - radius > 0, center + radius < 0
    squares = (center - center.mean()).square()
    mean, mean_valid = _ratio((center * active).mean(), -(center * inactive).mean())
    spread, spread_valid = _ratio((squares * active).mean(), (squares * inactive).mean())
    balance = (tolerance - mean).relu() + (tolerance - spread).relu()
    return (tight + torch.where(mean_valid & spread_valid, balance, 0)) / tolerance


def interval_warmup_penalty(
    radius: Tensor,
    before_relu: Sequence[tuple[Tensor, Tensor]],
    tolerance: float = 0.5,
) -> Tensor:
    r"""A penalty on boxes that grow, and on layers of ReLU whose units are nearly all on one side.

    With R the mean radius of the input's boxes, and for each layer of ReLU the center μ and the mean
    radius R' of the boxes before it, over the batch and all units, and units active (lower end above 0)
    or inactive (upper end below 0):

    .. math:: \frac{1}{\tau}\Big(\max(0, \tau - R / R')
              + \max(0, \tau - \rho_1) + \max(0, \tau - \rho_2)\Big)

    averaged over the layers, where ρ₁ is the sum of \|μ\| over the active units and that over the
    inactive ones, the smaller over the larger, and ρ₂ likewise of the squared distances of μ from its
    mean.

    Add it to the loss while the radius of the boxes grows, not before, with a weight that falls to 0
    when they have their full radius; the authors take 0.5 (1 - ε_t / ε), and 0.2 at first for many
    classes.

    Args:
        radius: of the input's boxes, of any shape: ``(upper - lower) / 2``. float32, float64, bfloat16
            or float16; half types are summed in float32.
        before_relu: ``(center, radius)`` before each ReLU, as
            ``IntervalModel.propagate(..., before_relu=True).before_relu`` gives them.
        tolerance: τ, how far a layer may be off.

    Returns:
        A scalar, in float64 where a box before ReLU is, else in float32: between 0 and 3. A layer whose
        boxes are points has no first term, one with neither active nor inactive units no second and
        third; one with units on one side alone has the largest, with gradient zero. Finite unless a box
        is NaN or overflows.

    Raises:
        TypeError: an argument is not a dense floating-point tensor, or the dtypes of a box differ.
        ValueError: there is no layer, a tensor has no elements, shapes or devices of a box differ, or
            ``tolerance`` is not in (0, 1].

    Differentiable in all tensors. Deterministic.

    Source: Shi et al., "Fast certified robust training with short warmup", 2021, section 3.3.

    Example:
        >>> import torch, fusee
        >>> center, radius = torch.tensor([[2.0, -1.0]]), torch.tensor([[0.5, 0.5]])
        >>> fusee.interval_warmup_penalty(torch.tensor(0.1), [(center, radius)])
        tensor(0.6000)
    """
    check_floating("radius", radius)
    check_number("tolerance", tolerance, 0, 1)
    if tolerance == 0:
        raise ValueError("tolerance must be positive, got 0")
    if len(before_relu) == 0:
        raise ValueError("before_relu must have a layer: propagate with before_relu=True")
    if radius.numel() == 0:
        raise ValueError(f"radius must have elements, got shape {tuple(radius.shape)}")
    penalties = []
    for center, around in before_relu:
        check_pair("center", center, "radius", around)
        if center.numel() == 0:
            raise ValueError(f"a box must have elements, got shape {tuple(center.shape)}")
        box = Box(*in_accumulate_dtype(center, around))
        first = radius.to(box.radius.dtype).mean()
        penalties.append(_of_layer(first, box, tolerance))
    return torch.stack(penalties).mean()
