"""Bounds of the differences between a layer's outputs and the output of the target."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusee._checks import autocast_product, check_tensor, require_values
from fusee._op import Op, batch_first
from fusee._products import as_rows, needed, of_wanted, vmap_by_reference
from fusee.bounds.boxes import Box, check_radius, in_accumulate_dtype, next_above, rounding_of
from fusee.bounds.interval_linear import check_layer


def _differences(weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of the weight minus that of each target (..., rows, classes, in), and which targets there
    are (..., rows, 1)."""
    classes = weight.shape[-2]
    known = ((target >= 0) & (target < classes)).unsqueeze(-1)
    index = target.clamp(0, max(classes - 1, 0)).unsqueeze(-1)
    of_target = torch.take_along_dim(weight, index, -2)
    return weight.unsqueeze(-3) - of_target.unsqueeze(-2), known


def _reference(
    center: Tensor,
    radius: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    sound: bool,
) -> Tensor:
    """Leading dimensions, then (rows, in), weight (..., classes, in)."""
    dtype, classes = center.dtype, weight.shape[-2]
    if target.shape[-1] == 0 or classes == 0:
        return center.new_empty((*center.shape[:-1], classes)) + 0 * center.sum()
    center, radius, weight, bias = in_accumulate_dtype(center, radius, weight, bias)
    valid = ((radius >= 0) & (radius < torch.inf)).all(-1, keepdim=True)
    differences, known = _differences(weight, target)
    is_target = target.unsqueeze(-1) == torch.arange(classes, device=target.device)
    relative, absolute = rounding_of(weight.shape[-1] + 2, weight.dtype)
    if sound:
        radius = next_above(radius + next_above(relative * center.abs()))
    point = (differences * center.unsqueeze(-2)).sum(-1)
    spread = (differences.abs() * radius.unsqueeze(-2)).sum(-1)
    if sound:
        spread = next_above(next_above(next_above(spread + absolute) * (1 + 3 * relative)))
    if bias is not None:
        bias = bias.unsqueeze(-2)
        index = target.clamp(0, classes - 1).unsqueeze(-1)
        of_target = torch.take_along_dim(bias, index, -1)
        point = point + (bias - of_target)
        if sound:
            spread = next_above(spread + next_above(relative * (bias.abs() + of_target.abs())))
    upper = point + spread
    upper = torch.where(is_target, 0, next_above(upper) if sound else upper)
    upper = torch.where(known & valid, upper, torch.nan)
    rounded = upper.to(dtype)
    if sound and dtype != upper.dtype:
        rounded = torch.where(rounded.to(upper.dtype) < upper, next_above(rounded), rounded)
    return rounded.contiguous()


def _backward_reference(
    grad: Tensor, center: Tensor, radius: Tensor, weight: Tensor, target: Tensor, wanted: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, classes = center.dtype, weight.shape[-2]
    grad, center, radius, weight = in_accumulate_dtype(grad, center, radius, weight)
    shapes = (center.shape, radius.shape, weight.shape, weight.shape[:-1])
    if target.shape[-1] == 0 or classes == 0:
        results = tuple(weight.new_zeros(shape) + 0 * grad.sum() for shape in shapes)
    else:
        differences, known = _differences(weight, target)
        is_target = target.unsqueeze(-1) == torch.arange(classes, device=target.device)
        grad = torch.where(is_target, 0, grad)
        grad = torch.where(known, grad, torch.nan)
        of_pairs = grad.unsqueeze(-1) * (
            center.unsqueeze(-2) + differences.sign() * radius.unsqueeze(-2)
        )
        row = is_target.to(grad.dtype)
        results = (
            (grad.unsqueeze(-1) * differences).sum(-2),
            (grad.unsqueeze(-1) * differences.abs()).sum(-2),
            of_pairs.sum(-3) - row.mT @ of_pairs.sum(-2),
            grad.sum(-2) - (row * grad.sum(-1, keepdim=True)).sum(-2),
        )
    nothing = torch.zeros((*center.shape[:-2], 0), dtype=dtype, device=center.device)
    one, two, three, four = (
        value.to(dtype).contiguous() if wanted >> i & 1 else nothing.clone()
        for i, value in enumerate(results)
    )
    return one, two, three, four


def _fake(
    center: Tensor,
    radius: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    sound: bool,
) -> Tensor:
    return center.new_empty((center.shape[0], weight.shape[0]))


def _backward_fake(
    grad: Tensor, center: Tensor, radius: Tensor, weight: Tensor, target: Tensor, wanted: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = (center.shape, radius.shape, weight.shape, weight.shape[:1])
    one, two, three, four = (
        center.new_empty(shape if wanted >> i & 1 else (0,)) for i, shape in enumerate(shapes)
    )
    return one, two, three, four


def _vmap(
    info: Any,
    in_dims: Any,
    center: Tensor,
    radius: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    sound: bool,
) -> Any:
    """Boxes and targets of a batch are more rows."""
    if in_dims[2] is not None or in_dims[3] is not None:
        others = (weight, bias, target, sound)
        return _of_batched_weights(info, in_dims, center, radius, *others)
    of_rows = (in_dims[0], in_dims[1], in_dims[4])
    batched = batch_first(info, of_rows, (center, radius, target))
    rows = [tensor.flatten(0, 1) for tensor in batched]
    output = torch.ops.fusee.interval_margins(*rows[:2], weight, bias, rows[2], sound)
    return output.unflatten(0, batched[0].shape[:2]), 0


_of_batched_weights = vmap_by_reference(_reference)


def _sharding(
    center: Any, radius: Any, weight: Any, bias: Any, target: Any, sound: bool
) -> list[Any]:
    """Rows may be split."""
    from torch.distributed.tensor import Replicate, Shard

    whole: Any = Replicate()
    return [([rows], [rows, rows, whole, bias and whole, rows, None]) for rows in (whole, Shard(0))]


def _backward_sharding(
    grad: Any, center: Any, radius: Any, weight: Any, target: Any, wanted: int
) -> list[Any]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    whole: Any = Replicate()
    summed: Any = Partial("sum")
    return [
        (of_wanted(wanted, (rows, rows, total, total)), [rows, rows, rows, whole, rows, None])
        for rows, total in ((whole, whole), (Shard(0), summed))
    ]


def _backward(ctx: Any, args: Any, saved: Any, grad: Tensor) -> Any:
    center, radius, weight, _, target, _ = args

    def gradients(wanted: int) -> Any:
        return _interval_margins_backward(grad, center, radius, weight, target, wanted)

    return *needed(ctx, gradients, 4), None, None


_interval_margins = Op(
    "interval_margins",
    fake=_fake,
    reference=_reference,
    vmap=_vmap,
    differentiable=((0, 1, 2, 3), (0,)),
    backward=_backward,
    sharding=_sharding,
)
_interval_margins_backward = Op(
    "interval_margins_backward",
    fake=_backward_fake,
    reference=_backward_reference,
    vmap=vmap_by_reference(_backward_reference),
    differentiable=((0, 1, 2, 3), (0, 1, 2, 3)),
    sharding=_backward_sharding,
)


def margins_of(
    box: Box, weight: Tensor, bias: Tensor | None, target: Tensor, sound: bool = False
) -> Tensor:
    """:func:`interval_margins` without checks."""
    center, radius = box
    if not sound:
        center, radius, weight, bias = autocast_product(center, radius, weight, bias)
    made: Tensor = _interval_margins(
        as_rows(center), as_rows(radius), weight, bias, target.reshape(-1), sound
    )
    return made if center.dim() == 2 else made.reshape(*center.shape[:-1], weight.shape[0])


def check_targets(target: Any, shape: tuple[int, ...], classes: int) -> None:
    """Raises unless there is one class for each of the rows."""
    check_tensor("target", target)
    if target.dtype != torch.int64:
        raise TypeError(f"target must have dtype int64, got {target.dtype}")
    if target.shape != shape:
        raise ValueError(f"target must have shape {tuple(shape)}, got {tuple(target.shape)}")

    def outside() -> Tensor:
        return (target < 0) | (target >= classes)

    def fail() -> None:
        raise IndexError(f"target must be in [0, {classes - 1}], got {target[outside()][0].item()}")

    require_values(target, lambda: outside().sum(), fail)


def interval_margins(
    center: Tensor,
    radius: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    sound: bool = False,
) -> Tensor:
    r"""Upper bounds of how far each class's output may lie above that of the target.

    .. math:: d_j = (W_j - W_y)\mu + b_j - b_y + |W_j - W_y|\, r, \qquad y = \text{target}

    The differences of a last layer's outputs are bounded as one layer, which is tighter than the
    difference of two bounds ("elision of the last layer"). A box is certified if all but the target's d
    are below zero. No tensor (rows, classes, in) is made, but for forward mode, second derivatives and
    vmapped weights.

    Args:
        center: μ (..., in), the box before the layer; float32, float64, bfloat16 or float16.
        radius: r, of the shape and dtype of ``center``, not negative.
        weight: W (classes, in), of that dtype.
        bias: b (classes), of that dtype, or None.
        target: y (...), int64.
        sound: whether to round upward, so that no difference in the exact box is above its bound.

    Returns:
        d (..., classes) of the dtype of ``center``; 0 at the target.

    Raises:
        TypeError: an argument is not a dense tensor, or of a wrong dtype.
        ValueError: shapes or devices do not fit; a radius is negative or infinite.
        IndexError: a target is no class. (On CUDA and under compile, rows with such values come back
            NaN.)

    Differentiable in all floating tensors, to any order and in forward mode. Under autocast it runs in
    the autocast dtype. Deterministic. Of DTensors the rows may be sharded.

    Source: Gowal et al., 2018, section 3 (the specification is folded into the last layer).

    Example:
        >>> import torch, fusee
        >>> weight = torch.tensor([[1.0, 0.0], [0.5, 1.0]])
        >>> box = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.5, 0.5]])
        >>> fusee.interval_margins(*box, weight, None, torch.tensor([0]))
        tensor([[ 0.0000, -0.2500]])
    """
    check_layer(center, radius, weight, bias, 2, sound)
    if center.dim() == 0 or center.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"center must have {weight.shape[1]} features in its last dimension, got "
            f"{tuple(center.shape)}"
        )
    check_targets(target, center.shape[:-1], weight.shape[0])
    check_radius(radius)
    return margins_of(Box(center, radius), weight, bias, target, sound)
