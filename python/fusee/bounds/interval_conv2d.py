"""A box through a convolution, and through ReLU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusee._checks import autocast_product
from fusee.bounds.boxes import Box, check_radius, checked_box
from fusee.bounds.interval_affine import affine_box
from fusee.bounds.interval_linear import check_layer, linear_box


def convolve_box(
    convolution: Any, box: Box, weight: Tensor, bias: Tensor | None, relu: bool, options: Any
) -> Box:
    """One of torch's convolutions of both center and radius. The magnitudes of a filter are small
    beside the two inputs, which share nothing: torch's own convolutions are as fast as can be. The bias
    and ReLU go over both results at once."""
    if box.center.dim() == weight.dim() - 1:  # one image, without a batch
        one = Box(*(part.unsqueeze(0) for part in box))
        made = convolve_box(convolution, one, weight, bias, relu, options)
        return Box(*(part.squeeze(0) for part in made))
    center, radius, weight, bias = autocast_product(*box, weight, bias)
    magnitudes = weight.abs()
    # Not all algorithms for convolutions keep positive sums positive.
    of_radius = convolution(radius, magnitudes, None, *options).clamp(min=0)
    if not relu:
        return Box(convolution(center, weight, bias, *options), of_radius)
    of_center = convolution(center, weight, None, *options)
    return affine_box(Box(of_center, of_radius), None, bias, relu=True)


def conv2d_box(
    box: Box,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    relu: bool = False,
    sound: bool = False,
) -> Box:
    """:func:`interval_conv2d` without checks."""
    if not sound:
        options = (stride, padding, dilation, groups)
        return convolve_box(F.conv2d, box, weight, bias, relu, options)
    return _sound_conv2d(box, weight, bias, stride, padding, dilation, groups, relu)


_PATCH_BYTES = 1 << 22
"""About so many bytes of patches are made at a time, which a cache may hold."""


def _sound_conv2d(
    box: Box,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    relu: bool,
) -> Box:
    """As a linear layer of patches: torch's convolutions do not say how they sum."""
    if box.center.dim() == 3:  # one image, without a batch
        one = Box(*(part.unsqueeze(0) for part in box))
        made = _sound_conv2d(one, weight, bias, stride, padding, dilation, groups, relu)
        return Box(*(part.squeeze(0) for part in made))
    # Torch's own errors, of no images.
    F.conv2d(box.center[:0].detach(), weight.detach(), None, stride, padding, dilation, groups)
    kernel, stride, dilation = weight.shape[2:], _pair(stride), _pair(dilation)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if isinstance(padding, str):
        total = reach if padding == "same" else [0, 0]
        # The last dimension first, and the odd one at the end.
        sides = [side for n in reversed(total) for side in (n // 2, n - n // 2)]
    else:
        sides = [p for p in reversed(_pair(padding)) for _ in range(2)]

    def windows(part: Tensor) -> Tensor:
        """(batch, height, width, kernel, kernel, channels), not copied yet."""
        view = F.pad(part, sides).permute(0, 2, 3, 1).contiguous()
        for dim in (0, 1):
            view = view.unfold(1 + dim, reach[dim] + 1, stride[dim])[..., :: dilation[dim]]
        return view.permute(0, 1, 2, 4, 5, 3)

    parts = [windows(part) for part in box]
    batch, height, width = parts[0].shape[:3]
    channels = weight.shape[1]
    rows = weight.permute(0, 2, 3, 1).flatten(1).chunk(groups)
    biases = [None] * groups if bias is None else bias.chunk(groups)
    of_image = height * width * rows[0].shape[1] * weight.element_size()
    images = max(1, _PATCH_BYTES // max(of_image, 1))
    outputs = []
    for first in range(0, batch, images):
        of_groups = []
        for group in range(groups):
            some = (
                slice(first, first + images),
                ...,
                slice(group * channels, (group + 1) * channels),
            )
            patches = Box(*(part[some].flatten(3) for part in parts))
            of_groups.append(linear_box(patches, rows[group], biases[group], relu, True))
        outputs.append([torch.cat(of_part, -1) for of_part in zip(*of_groups, strict=True)])
    if not outputs:
        empty = box.center.new_empty(0, height, width, weight.shape[0])
        outputs.append([empty + 0 * part.sum() for part in box])
    whole = (torch.cat(of_part) for of_part in zip(*outputs, strict=True))
    return Box(*(part.permute(0, 3, 1, 2).contiguous() for part in whole))


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return (value, value)
    values = tuple(value)
    return (values[0], values[0]) if len(values) == 1 else (values[0], values[1])


def interval_conv2d(
    center: Tensor,
    radius: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    relu: bool = False,
    sound: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""The box that a convolution makes of a box, and ReLU where asked.

    .. math:: \mu' = W * \mu + b, \qquad r' = |W| * r

    Both are torch's convolutions: filters are small, so that their magnitudes cost nothing beside the
    products, and center and radius share no input. Zero padding pads both with zeros. The bias and ReLU
    take one pass over both results. A sound convolution is computed as a linear layer of patches, which
    takes kernel-size times the memory of the input, as torch's convolutions promise no order of
    summation.

    Args:
        center: μ (batch, channels, height, width), any strides; float32, float64, bfloat16 or float16.
        radius: r, of the shape and dtype of ``center``, not negative.
        weight: W (outputs, channels / groups, height, width), of that dtype.
        bias: b (outputs), of that dtype.
        stride, padding, dilation, groups: as in :func:`torch.nn.functional.conv2d`.
        relu: whether ReLU follows.
        sound: whether to round outward; see :func:`fusee.interval_linear`.

    Returns:
        ``(center, radius)``, each (batch, outputs, height, width), of the dtype of ``center``.

    Raises:
        TypeError: an argument is not a dense floating-point tensor, or of another dtype.
        ValueError: shapes or devices do not fit; a radius is negative or infinite (on CUDA and under
            compile what it reaches comes back NaN). NaN goes through as NaN.

    Differentiable in all tensors, to any order and in forward mode. Under autocast it runs in the
    autocast dtype. Deterministic where torch's convolutions are.

    Source: see :func:`fusee.interval_linear`.

    Example:
        >>> import torch, fusee
        >>> box = torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.5)
        >>> center, radius = fusee.interval_conv2d(*box, torch.tensor([[[[1.0, -1.0]]]]))
        >>> center.flatten(), radius.flatten()
        (tensor([0., 0.]), tensor([1., 1.]))
    """
    check_layer(center, radius, weight, bias, 4, sound)
    if center.dim() != 4 or center.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            f"center must be (batch, {weight.shape[1] * groups}, height, width), got "
            f"{tuple(center.shape)}"
        )
    # Torch's convolutions take any radius.
    box = Box(center, radius) if check_radius(radius) else checked_box(center, radius)
    options = (stride, padding, dilation, groups)
    center, radius = conv2d_box(box, weight, bias, *options, relu, sound)
    return center, radius
