"""A box times a number for each channel, plus another, and through ReLU, in one pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fusee._checks import accumulate_dtype, check_floating, check_same_device
from fusee._op import Op, batch_first
from fusee._products import filled, needed, of_wanted, vmap_by_reference
from fusee.bounds.boxes import (
    Box,
    box_relu,
    box_relu_gradient,
    check_pair,
    check_radius,
    checked_box,
    in_accumulate_dtype,
    next_above,
    of_two,
)


def _of_channels(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.unsqueeze(-2).unsqueeze(-1)


def _reference(
    center: Tensor,
    radius: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    sound: bool,
) -> tuple[Tensor, Tensor]:
    """Leading dimensions, then (outer, channels, inner); scale and shift (..., channels), in the
    accumulation dtype, as their gradients are."""
    box = checked_box(center, radius)
    if scale is not None or shift is not None:
        wide = Box(*in_accumulate_dtype(*box))
        box = _affine(wide, _of_channels(scale), _of_channels(shift), sound)
    if relu:
        box = box_relu(Box(*in_accumulate_dtype(*box)), sound)
    new_center, new_radius = of_two(box, center.dtype, sound)
    return new_center.contiguous(), new_radius.contiguous()


def _affine(box: Box, scale: Tensor | None, shift: Tensor | None, sound: bool) -> Box:
    product = box.center if scale is None else scale * box.center
    center = product if shift is None else product + shift
    radius = box.radius if scale is None else scale.abs() * box.radius
    if not sound:
        return Box(center, radius)
    limits = torch.finfo(center.dtype)
    lost = limits.eps * (product.abs() + center.abs()) + 2 * limits.tiny
    return Box(center, next_above(next_above(radius) + next_above(lost)))


def _backward_reference(
    grad_center: Tensor,
    grad_radius: Tensor,
    center: Tensor,
    radius: Tensor,
    scale: Tensor | None,
    out_center: Tensor | None,
    out_radius: Tensor | None,
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = (grad_center, grad_radius, center, radius, out_center, out_radius)
    grad_c, grad_r, wide_c, wide_r, out_c, out_r = in_accumulate_dtype(*tensors)
    grad = Box(grad_c, grad_r)
    if out_c is not None:
        grad = box_relu_gradient(Box(out_c, out_r), grad)
    factor = torch.ones_like(grad_c) if scale is None else scale.unsqueeze(-2).unsqueeze(-1)
    results = (
        (factor * grad.center).to(center.dtype),
        (factor.abs() * grad.radius).to(center.dtype),
        (grad.center * wide_c + factor.sign() * grad.radius * wide_r).sum((-3, -1)),
        grad.center.sum((-3, -1)),
    )
    one, two, three, four = (
        value.contiguous() if wanted >> i & 1 else value.new_empty((*center.shape[:-3], 0))
        for i, value in enumerate(results)
    )
    return one, two, three, four


def _fake(
    center: Tensor,
    radius: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    sound: bool,
) -> tuple[Tensor, Tensor]:
    return center.new_empty(center.shape), center.new_empty(center.shape)


def _backward_fake(
    grad_center: Tensor,
    grad_radius: Tensor,
    center: Tensor,
    radius: Tensor,
    scale: Tensor | None,
    out_center: Tensor | None,
    out_radius: Tensor | None,
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide, channels = accumulate_dtype(center.dtype), center.shape[1:2]
    one, two, three, four = (
        center.new_empty(shape if wanted >> i & 1 else (0,), dtype=dtype)
        for i, (shape, dtype) in enumerate(
            ((center.shape, None), (center.shape, None), (channels, wide), (channels, wide))
        )
    )
    return one, two, three, four


def _vmap(info: Any, in_dims: Any, center: Tensor, radius: Tensor, *others: Any) -> Any:
    if any(dim is not None for dim in in_dims[2:]):
        return _of_batched_scales(info, in_dims, center, radius, *others)
    center, radius = batch_first(info, in_dims[:2], (center, radius))
    outputs = torch.ops.fusee.interval_affine(center.flatten(0, 1), radius.flatten(0, 1), *others)
    return tuple(output.unflatten(0, center.shape[:2]) for output in outputs), (0, 0)


_of_batched_scales = vmap_by_reference(_reference)


def _sharding(
    center: Any, radius: Any, scale: Any, shift: Any, relu: bool, sound: bool
) -> list[Any]:
    return [
        ([box, box], [box, box, scale and channels, shift and channels, None, None])
        for box, channels in _splits()
    ]


def _splits() -> list[tuple[Any, Any]]:
    """How a box (outer, channels, inner) may be split, and what goes with its channels."""
    from torch.distributed.tensor import Replicate, Shard

    whole: Any = Replicate()
    return [(whole, whole), (Shard(0), whole), (Shard(1), Shard(0)), (Shard(2), whole)]


def _backward_sharding(
    grad_center: Any,
    grad_radius: Any,
    center: Any,
    radius: Any,
    scale: Any,
    out_center: Any,
    out_radius: Any,
    wanted: int,
) -> list[Any]:
    from torch.distributed.tensor import Partial, Replicate

    choices: list[Any] = []
    for box, channels in _splits():
        summed: Any = Partial("sum") if channels == Replicate() != box else channels
        of_output = out_center and box
        inputs = [box, box, box, box, scale and channels, of_output, of_output, None]
        choices.append((of_wanted(wanted, (box, box, summed, summed)), inputs))
    return choices


def _backward(ctx: Any, args: Any, saved: Any, *grads: Tensor | None) -> Any:
    center, radius, scale, _, relu, _ = args
    grad_center, grad_radius = filled(grads, saved)
    outputs = saved if relu else (None, None)

    def gradients(wanted: int) -> Any:
        return _interval_affine_backward(
            grad_center, grad_radius, center, radius, scale, *outputs, wanted
        )

    return *needed(ctx, gradients, 4), None, None


_interval_affine = Op(
    "interval_affine",
    fake=_fake,
    reference=_reference,
    vmap=_vmap,
    differentiable=((0, 1, 2, 3), (0, 1)),
    saved=(0, 1),
    backward=_backward,
    sharding=_sharding,
)
_interval_affine_backward = Op(
    "interval_affine_backward",
    fake=_backward_fake,
    reference=_backward_reference,
    vmap=vmap_by_reference(_backward_reference),
    differentiable=((0, 1, 2, 3, 4), (0, 1, 2, 3)),
    sharding=_backward_sharding,
)


def affine_box(
    box: Box,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool = False,
    sound: bool = False,
) -> Box:
    """A box (batch, channels, ...) times the scales of its channels, plus the shifts."""
    center, radius = box
    last = _is_channels_last(center) and _is_channels_last(radius)
    if last:
        center, radius = center.movedim(1, -1), radius.movedim(1, -1)
    scale, shift = (
        v if v is None else v.to(accumulate_dtype(center.dtype)) for v in (scale, shift)
    )
    shape = center.shape
    if scale is None and shift is None:
        view = (1, 1, math.prod(shape))
    elif last:
        view = (math.prod(shape[:-1]), shape[-1], 1)
    else:
        view = (shape[0], shape[1], math.prod(shape[2:]))
    made = _interval_affine(center.reshape(view), radius.reshape(view), scale, shift, relu, sound)
    outputs = (output.view(shape) for output in made)
    return Box(*(output.movedim(-1, 1) if last else output for output in outputs))


def _is_channels_last(tensor: Tensor) -> bool:
    """Whether the channels of a (batch, channels, ...) lie side by side, and the rest around them."""
    if tensor.dim() < 3 or tensor.is_contiguous():
        return False
    return tensor.movedim(1, -1).is_contiguous()


def interval_relu(center: Tensor, radius: Tensor, *, sound: bool = False) -> tuple[Tensor, Tensor]:
    r"""The box that ReLU makes of a box.

    .. math:: l' = \max(\mu - r, 0), \quad u' = \max(\mu + r, 0), \quad
        \mu' = (u' + l') / 2, \quad r' = (u' - l') / 2

    A box of positive numbers keeps its bits. One that holds zero inside gets a center and a radius that
    are equal to the bit, so that its lower end is 0.

    Args:
        center: μ, of any shape and strides; float32, float64, bfloat16 or float16.
        radius: r, of the shape and dtype of ``center``, not negative.
        sound: whether to round outward.

    Returns:
        ``(center, radius)``, each of the shape and dtype of ``center``.

    Raises:
        TypeError: an argument is not a dense floating-point tensor, or the dtypes differ.
        ValueError: shapes or devices differ; a radius is negative or infinite (on CUDA and under compile
            such elements come back NaN). NaN goes through as NaN.

    Differentiable to any order and in forward mode; where zero lies inside, each gradient is half of the
    sum of both. Deterministic.

    Source: see :func:`fusee.interval_linear`.

    Example:
        >>> import torch, fusee
        >>> fusee.interval_relu(torch.tensor([2.0, 0.0, -2.0]), torch.tensor([1.0, 1.0, 1.0]))
        (tensor([2.0000, 0.5000, 0.0000]), tensor([1.0000, 0.5000, 0.0000]))
    """
    check_pair("center", center, "radius", radius)
    check_radius(radius)
    center, radius = affine_box(Box(center, radius), None, None, True, sound)
    return center, radius


def check_channels(center: Tensor, values: dict[str, Tensor | None]) -> None:
    """Raises unless each tensor that is there has one number for each channel of the box."""
    if center.dim() < 2:
        raise ValueError(
            f"center must have at least two dimensions (batch, channels), got {tuple(center.shape)}"
        )
    for name, tensor in values.items():
        if tensor is None:
            continue
        check_floating(name, tensor)
        check_same_device(name, tensor, "center", center)
        if tensor.shape != center.shape[1:2]:
            raise ValueError(
                f"{name} must have shape ({center.shape[1]},), got {tuple(tensor.shape)}"
            )
