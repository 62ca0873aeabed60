"""A box through a linear layer, and through ReLU: both products from one read of the weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusee._checks import (
    accumulate_dtype,
    autocast_product,
    check_beside,
    check_floating,
    check_same_device,
)
from fusee._op import Op, batch_first
from fusee._products import allows_tf32, as_rows, filled, needed, of_wanted, vmap_by_reference
from fusee.bounds.boxes import (
    Box,
    box_relu,
    box_relu_gradient,
    check_pair,
    check_radius,
    next_above,
    of_two,
    rounding_of,
)


def _reference(
    center: Tensor,
    radius: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    relu: bool,
    sound: bool,
    tf32: bool = False,
) -> tuple[Tensor, Tensor]:
    valid = ((radius >= 0) & (radius < torch.inf)).all(-1, keepdim=True)
    box = Box(torch.where(valid, center, torch.nan), torch.where(valid, radius, torch.nan))
    if sound:
        result = _sound_product(*box, weight, bias)
    else:
        product = box.center @ weight.mT
        result = Box(
            product if bias is None else product + bias.unsqueeze(-2), box.radius @ weight.abs().mT
        )
    if relu:
        result = box_relu(result, sound)
    center, radius = of_two(result, center.dtype, sound)
    return center.contiguous(), radius.contiguous()


def _sound_product(center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor | None) -> Box:
    """The product in float64, which neither autocast nor TF32 rounds, with a radius that covers what any
    order of summation loses, in the accumulation dtype."""
    wide = [part if part is None else part.double() for part in (center, radius, weight, bias)]
    dtype = accumulate_dtype(center.dtype)
    relative, absolute = rounding_of(weight.shape[-1] + 2, torch.float64)
    center, radius, weight, bias = wide  # type: ignore[assignment]
    covered = next_above(radius + next_above(relative * center.abs()))
    grown = next_above(next_above(covered @ weight.abs().mT + absolute) * (1 + 3 * relative))
    product = center @ weight.mT
    if bias is not None:
        lost = next_above(relative * bias.abs()).unsqueeze(-2)
        product, grown = product + bias.unsqueeze(-2), next_above(grown + lost)
    return Box(*of_two(Box(product, grown), dtype, True))


def _backward_reference(
    grad_center: Tensor,
    grad_radius: Tensor,
    center: Tensor,
    radius: Tensor,
    weight: Tensor,
    out_center: Tensor | None,
    out_radius: Tensor | None,
    wanted: int,
    tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad = Box(grad_center, grad_radius)
    if out_center is not None and out_radius is not None:
        grad = box_relu_gradient(Box(out_center, out_radius), grad)
    of_weight = grad.center.mT @ center + weight.sign() * (grad.radius.mT @ radius)
    results = (
        grad.center @ weight,
        grad.radius @ weight.abs(),
        of_weight,
        grad.center.sum(-2),
    )
    nothing = center.new_empty((*center.shape[:-2], 0))
    one, two, three, four = (
        value.contiguous() if wanted >> i & 1 else nothing.clone()
        for i, value in enumerate(results)
    )
    return one, two, three, four


def _fake(
    center: Tensor,
    radius: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    relu: bool,
    sound: bool,
    tf32: bool,
) -> tuple[Tensor, Tensor]:
    shape = (center.shape[0], weight.shape[0])
    return center.new_empty(shape), center.new_empty(shape)


def _backward_fake(
    grad_center: Tensor,
    grad_radius: Tensor,
    center: Tensor,
    radius: Tensor,
    weight: Tensor,
    out_center: Tensor | None,
    out_radius: Tensor | None,
    wanted: int,
    tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = (center.shape, radius.shape, weight.shape, weight.shape[:1])
    one, two, three, four = (
        center.new_empty(shape if wanted >> i & 1 else (0,)) for i, shape in enumerate(shapes)
    )
    return one, two, three, four


def _vmap(info: Any, in_dims: Any, center: Tensor, radius: Tensor, *others: Any) -> Any:
    """Boxes of a batch are more rows; weights of a batch are a batched product."""
    if any(dim is not None for dim in in_dims[2:]):
        return _of_batched_weights(info, in_dims, center, radius, *others)
    center, radius = batch_first(info, in_dims[:2], (center, radius))
    outputs = torch.ops.fusee.interval_linear(center.flatten(0, 1), radius.flatten(0, 1), *others)
    return tuple(output.unflatten(0, center.shape[:2]) for output in outputs), (0, 0)


_of_batched_weights = vmap_by_reference(_reference)


def _sharding(
    center: Any, radius: Any, weight: Any, bias: Any, relu: bool, sound: bool, tf32: bool
) -> list[Any]:
    """Rows may be split, or the outputs."""
    from torch.distributed.tensor import Replicate, Shard

    whole: Any = Replicate()
    none = [None, None, None]
    choices = [
        ([rows, rows], [rows, rows, whole, bias and whole, *none]) for rows in (whole, Shard(0))
    ]
    split = Shard(0)
    choices.append(([Shard(1), Shard(1)], [whole, whole, split, bias and split, *none]))
    return choices


def _backward_sharding(
    grad_center: Any,
    grad_radius: Any,
    center: Any,
    radius: Any,
    weight: Any,
    out_center: Any,
    out_radius: Any,
    wanted: int,
    tf32: bool,
) -> list[Any]:
    """As forward; parts of the rows give parts of the sums that are the weight's and the bias's
    gradients, parts of the outputs those of the inputs'."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    whole: Any = Replicate()
    summed: Any = Partial("sum")
    choices = []
    for grad, box, of_weight, results in (
        (whole, whole, whole, (whole, whole, whole, whole)),
        (Shard(0), Shard(0), whole, (Shard(0), Shard(0), summed, summed)),
        (Shard(1), whole, Shard(0), (summed, summed, Shard(0), Shard(0))),
    ):
        of_output = out_center and grad
        inputs = [grad, grad, box, box, of_weight, of_output, of_output, None, None]
        choices.append((of_wanted(wanted, results), inputs))
    return choices


def _backward(ctx: Any, args: Any, saved: Any, *grads: Tensor | None) -> Any:
    center, radius, weight, _, relu, _, tf32 = args
    grad_center, grad_radius = filled(grads, saved)
    outputs = saved if relu else (None, None)

    def gradients(wanted: int) -> Any:
        return _interval_linear_backward(
            grad_center, grad_radius, center, radius, weight, *outputs, wanted, tf32
        )

    return *needed(ctx, gradients, 4), None, None, None


_interval_linear = Op(
    "interval_linear",
    fake=_fake,
    reference=_reference,
    vmap=_vmap,
    differentiable=((0, 1, 2, 3), (0, 1)),
    saved=(0, 1),
    backward=_backward,
    sharding=_sharding,
)
_interval_linear_backward = Op(
    "interval_linear_backward",
    fake=_backward_fake,
    reference=_backward_reference,
    vmap=vmap_by_reference(_backward_reference),
    differentiable=((0, 1, 2, 3, 4), (0, 1, 2, 3)),
    sharding=_backward_sharding,
)


def check_layer(
    center: Any, radius: Any, weight: Any, bias: Tensor | None, dims: int, sound: bool
) -> None:
    """Raises unless these can be a box, a weight of so many dimensions, and its bias."""
    check_pair("center", center, "radius", radius)
    check_floating("weight", weight)
    if weight.dim() != dims:
        raise ValueError(f"weight must have {dims} dimensions, got shape {tuple(weight.shape)}")
    others = {"weight": weight}
    if bias is not None:
        check_floating("bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
        others["bias"] = bias
    for name, tensor in others.items():
        if not sound:
            check_beside(name, tensor, "center", center)
            continue
        check_same_device(name, tensor, "center", center)
        if tensor.dtype != center.dtype:
            raise TypeError(
                f"{name} must have the dtype of center {center.dtype}, got {tensor.dtype}"
            )


def linear_box(
    box: Box, weight: Tensor, bias: Tensor | None, relu: bool = False, sound: bool = False
) -> Box:
    """:func:`interval_linear` without checks."""
    center, radius = box
    if not sound:
        center, radius, weight, bias = autocast_product(center, radius, weight, bias)
    if weight.dtype != center.dtype:
        raise TypeError(
            f"boxes must have the dtype of the layer {weight.dtype}, got {center.dtype}"
        )
    shape, tf32 = center.shape, allows_tf32(center)
    result = _interval_linear(as_rows(center), as_rows(radius), weight, bias, relu, sound, tf32)
    if len(shape) == 2:
        return Box(*result)
    return Box(*(output.reshape(*shape[:-1], weight.shape[0]) for output in result))


def products_back(grad: Box, weight: Tensor) -> Box:
    """The products grad.center W and grad.radius |W|, from one read of the weight."""
    center, radius = (part.reshape(-1, weight.shape[0]) for part in grad)
    made = _interval_linear_backward(
        center,
        radius,
        center.new_empty(center.shape[0], weight.shape[1]),
        center.new_empty(center.shape[0], weight.shape[1]),
        weight,
        None,
        None,
        3,
        allows_tf32(center),
    )
    return Box(*(part.reshape(*grad.center.shape[:-1], weight.shape[1]) for part in made[:2]))


def interval_linear(
    center: Tensor,
    radius: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    relu: bool = False,
    sound: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""The box that a linear layer makes of a box, and ReLU where asked.

    .. math:: \mu' = W\mu + b, \qquad r' = |W|\, r

    All x with \|x - μ\| <= r go to outputs within r' of μ', and each end is reached by some of them.
    Both products come from one read of the weight; the absolute value is taken in registers. ReLU moves
    the ends to max(μ' - r', 0) and max(μ' + r', 0).

    Args:
        center: μ (..., in), any strides; float32, float64, bfloat16 or float16. Half types are summed in
            float32.
        radius: r, of the shape and dtype of ``center``, not negative.
        weight: W (out, in), of that dtype.
        bias: b (out), of that dtype.
        relu: whether ReLU follows.
        sound: whether to round outward, so that the exact image of the box is contained: the radius
            grows by what the sums may have lost, at most (in + 11) units of rounding of \|W\| (\|μ\| +
            2r) + \|b\|, and less in most engines. By default results have the error of a matrix product,
            and may cut off as much. TF32 and autocast do not apply to a sound layer.

    Returns:
        ``(center, radius)``, each (..., out), of the dtype of ``center``.

    Raises:
        TypeError: an argument is not a dense floating-point tensor, or of another dtype.
        ValueError: shapes or devices do not fit; a radius is negative or infinite (on CUDA and under
            compile its row comes back NaN). NaN goes through as NaN.

    Differentiable in all tensors, to any order and in forward mode, with the derivative of \|W\| zero at
    zero; a sound layer has the derivatives of its sums. Under autocast it runs in the autocast dtype.
    Deterministic: the same bits on the same engine, whatever the number of threads. Of DTensors the rows
    or the outputs may be sharded, without communication but for gradients that are sums.

    Source: Gowal et al., "On the effectiveness of interval bound propagation for training verifiably
    robust models", 2018; the sound form: Rump, "Fast and parallel interval arithmetic", 1999.

    Example:
        >>> import torch, fusee
        >>> weight = torch.tensor([[1.0, -2.0], [3.0, 1.0]])
        >>> fusee.interval_linear(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 1.0]), weight)
        (tensor([1., 3.]), tensor([2.5000, 2.5000]))
    """
    check_layer(center, radius, weight, bias, 2, sound)
    if center.dim() == 0 or center.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"center must have {weight.shape[1]} features in its last dimension, got "
            f"{tuple(center.shape)}"
        )
    check_radius(radius)
    center, radius = linear_box(Box(center, radius), weight, bias, relu, sound)
    return center, radius
