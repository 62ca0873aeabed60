"""StableMax cross entropy of a linear layer, without its logits in memory."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusee._checks import (
    accumulate_dtype,
    autocast_product,
    check_beside,
    check_floating,
    require_values,
)
from fusee._op import Op, backward_follows, batch_first, is_readable
from fusee.losses import stablemax_cross_entropy as cross_entropy
from fusee.losses.stablemax_cross_entropy import (
    check_class_weight,
    check_ignore_index,
    check_number,
    check_reduction,
    check_target,
    raise_for_target,
    row_gradient,
    stablemax_cross_entropy,
)


def _logits(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    return F.linear(input, linear_weight, linear_bias).unsqueeze(2)


def _reference(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    input_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, ...]:
    logits = _logits(input, linear_weight, linear_bias)
    numbers = (ignore_index, reduction, label_smoothing, 0.0)
    loss, stats, info = cross_entropy._reference(logits, target.unsqueeze(1), weight, *numbers)
    loss, stats = (loss.squeeze(1) if reduction == 0 else loss), stats.squeeze(1)
    wanted = (input_grad, weight_grad, bias_grad)
    if not any(wanted):
        return loss, stats, info, *(input.new_empty(0) for _ in wanted)
    with torch.no_grad():
        g = row_gradient(torch.ones_like(loss), reduction, info[0], stats.shape[:1])
        saved = (target, linear_bias, weight, stats, ignore_index, label_smoothing)
        grads = _backward_reference(g, input, linear_weight, *saved, *wanted)
    return loss, stats, info, *grads


def _backward_reference(
    grad: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    stats: Tensor,
    ignore_index: int,
    label_smoothing: float,
    input_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    logits = _logits(input, linear_weight, linear_bias)
    g = cross_entropy._backward_reference(
        grad.unsqueeze(1),
        logits,
        target.unsqueeze(1),
        weight,
        stats.unsqueeze(1),
        ignore_index,
        label_smoothing,
        0.0,
    ).squeeze(2)
    nothing = input.new_empty(0)
    return (
        g @ linear_weight if input_grad else nothing,
        g.t() @ input if weight_grad else nothing.clone(),
        g.sum(0) if bias_grad else nothing.clone(),
    )


def _fake(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    input_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, ...]:
    torch._check(input.dim() == 2, lambda: f"input must be (rows, features), got {input.shape}")
    rows = input.shape[0]
    dtype = accumulate_dtype(input.dtype)
    loss = input.new_empty((rows,) if reduction == 0 else (), dtype=dtype)
    stats = input.new_empty((rows, 2), dtype=dtype)
    info = input.new_empty((2,), dtype=torch.float64)
    return loss, stats, info, *_fake_grads(input, linear_weight, input_grad, weight_grad, bias_grad)


def _fake_grads(
    input: Tensor, linear_weight: Tensor, input_grad: bool, weight_grad: bool, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    classes = linear_weight.shape[0]
    return (
        input.new_empty(input.shape if input_grad else (0,)),
        input.new_empty(linear_weight.shape if weight_grad else (0,)),
        input.new_empty((classes,) if bias_grad else (0,)),
    )


def _backward_fake(
    grad: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    stats: Tensor,
    ignore_index: int,
    label_smoothing: float,
    input_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_grads(input, linear_weight, input_grad, weight_grad, bias_grad)


# Under vmap the logits are formed, by one batched product, and the operators on logits take over.


def _batched_logits(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    logits = input @ linear_weight.mT
    return (logits if linear_bias is None else logits + linear_bias.unsqueeze(1)).unsqueeze(3)


def _vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    input, linear_weight, target, linear_bias = batch_first(info, in_dims[:4], args[:4])
    weight, ignore_index, reduction, label_smoothing, *wanted = args[4:]
    if any(wanted):
        raise NotImplementedError("under vmap the gradients are formed by the backward pass")
    (loss, stats, rows), _ = cross_entropy._vmap(
        info,
        (0, 0, in_dims[4], None, None, None, None),
        _batched_logits(input, linear_weight, linear_bias),
        target.unsqueeze(2),
        weight,
        *(ignore_index, reduction, label_smoothing, 0.0),
    )
    loss = loss.squeeze(2) if reduction == 0 else loss
    nothing = [loss.new_empty((info.batch_size, 0), dtype=input.dtype) for _ in wanted]
    return (loss, stats.squeeze(2), rows, *nothing), (0,) * 6


def _backward_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    grad, input, linear_weight, target, linear_bias = batch_first(info, in_dims[:5], args[:5])
    weight, _, ignore_index, label_smoothing, input_grad, weight_grad, bias_grad = args[5:]
    (stats,) = batch_first(info, in_dims[6:7], args[6:7])
    g, _ = cross_entropy._backward_vmap(
        info,
        (0, 0, 0, in_dims[5], 0),
        grad.unsqueeze(2),
        _batched_logits(input, linear_weight, linear_bias),
        target.unsqueeze(2),
        weight,
        stats.unsqueeze(2),
        *(ignore_index, label_smoothing, 0.0),
    )
    g = g.squeeze(3)
    nothing = g.new_empty((info.batch_size, 0))
    return (
        g @ linear_weight if input_grad else nothing,
        g.mT @ input if weight_grad else nothing,
        g.sum(1) if bias_grad else nothing,
    ), (0, 0, 0)


def _backward(ctx: Any, args: Any, constants: Any, grad: Tensor) -> Any:
    input, linear_weight, target, linear_bias, weight, ignore_index, reduction, smoothing, *made = (
        args
    )
    stats, info, *saved = constants
    wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
    if any(made) and not torch.is_grad_enabled():
        # Made in the forward pass for a gradient of one. Only a real tensor on the CPU tells whether the
        # factor is that, for nothing is read back from a device.
        unit = grad.device.type == "cpu" and is_readable(grad) and grad.item() == 1
        grads = [value if unit else value * grad.to(value.dtype) for value in saved]
    else:
        g = row_gradient(grad, reduction, info[0], stats.shape[:1])
        numbers = (ignore_index, smoothing, *wanted)
        grads = _linear_stablemax_cross_entropy_backward(
            g, input, linear_weight, target, linear_bias, weight, stats, *numbers
        )
    grad_input, grad_weight, grad_bias = (
        value if want else None for value, want in zip(grads, wanted, strict=True)
    )
    return grad_input, grad_weight, None, grad_bias, *(None,) * 7


_linear_stablemax_cross_entropy = Op(
    "linear_stablemax_cross_entropy",
    fake=_fake,
    reference=_reference,
    vmap=_vmap,
    differentiable=((0, 1, 3), (0,)),
    backward=_backward,
)
_linear_stablemax_cross_entropy_backward = Op(
    "linear_stablemax_cross_entropy_backward",
    fake=_backward_fake,
    reference=_backward_reference,
    vmap=_backward_vmap,
    differentiable=((0, 1, 2, 4), (0, 1, 2)),
)


def linear_stablemax_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""StableMax cross entropy of a linear layer, whose logits are never materialised.

    .. math:: \text{stablemax\_cross\_entropy}(x W^\top + b, y)

    In float32 and float64 some rows of the logits exist at a time (an eleventh, from 64 to 256), and
    where a reduced loss will be differentiated the gradients are formed with it. In the half types, and
    for unreduced losses in the backward pass, a block of classes exists at a time: StableMax has no
    maximum to subtract, so the blocks' sums add up without rescaling, and the gradient of
    ``linear_weight`` is one product. Gradients of higher order, ``torch.func`` transforms and ``vmap``
    form the logits.

    Args:
        input: (in_features), (N, in_features) or (..., in_features); float32, float64, bfloat16 or
            float16. The matrix products are torch's own in that dtype; the loss sums in float32.
        linear_weight: (C, in_features), of the dtype of ``input``.
        target: class indices with the shape of ``input`` without its last dimension; or probabilities
            (..., C), which are as large as the logits, so these are then materialised.
        linear_bias: (C), of the dtype of ``input``.
        weight, reduction, ignore_index, label_smoothing: as in
            :func:`fusee.stablemax_cross_entropy`.

    Returns:
        The loss, float64 for float64 inputs and float32 for all others; a scalar, or with
        ``reduction="none"`` the shape of ``target``'s class indices.

    Raises:
        As :func:`fusee.stablemax_cross_entropy`, and TypeError or ValueError where ``linear_weight``
        or ``linear_bias`` do not fit ``input`` in shape, dtype or device.

    Differentiable to any order and in forward mode, in ``input``, ``linear_weight`` and
    ``linear_bias``. Under autocast the layer runs in the autocast dtype, as ``F.linear`` does.
    Deterministic as far as torch's matrix product is, whose rounding may depend on the number of
    threads.

    Source: Prieto et al., "Grokking at the Edge of Numerical Stability", arXiv:2501.04697; the interface
    is that of ``torch.nn.functional.linear_cross_entropy``.

    Example:
        >>> import torch, fusee
        >>> hidden, head = torch.ones(2, 3), torch.eye(4, 3)
        >>> fusee.linear_stablemax_cross_entropy(hidden, head, torch.tensor([0, 3]))
        tensor(1.5993)
    """
    check_floating("input", input)
    check_floating("linear_weight", linear_weight)
    if input.dim() == 0:
        raise ValueError("input must have a dimension of features, got a scalar")
    if linear_weight.dim() != 2 or linear_weight.shape[1] != input.shape[-1]:
        raise ValueError(
            f"linear_weight must be (C, {input.shape[-1]}) for input {tuple(input.shape)}, "
            f"got {tuple(linear_weight.shape)}"
        )
    classes = linear_weight.shape[0]
    if classes == 0:
        raise ValueError("linear_weight must have at least one class, got none")
    tensors = {"linear_weight": linear_weight}
    if linear_bias is not None:
        check_floating("linear_bias", linear_bias)
        if linear_bias.shape != (classes,):
            raise ValueError(
                f"linear_bias must have one entry per class, shape ({classes},), "
                f"got {tuple(linear_bias.shape)}"
            )
        tensors["linear_bias"] = linear_bias
    for name, tensor in tensors.items():
        check_beside(name, tensor, "input", input)
    ignore_index = check_ignore_index(ignore_index)
    number = check_reduction(reduction)
    label_smoothing = check_number("label_smoothing", label_smoothing, 0.0, 1.0)

    if isinstance(target, Tensor) and target.is_floating_point():
        return stablemax_cross_entropy(
            F.linear(input, linear_weight, linear_bias),
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            dim=-1,
        )
    input, linear_weight, linear_bias = autocast_product(input, linear_weight, linear_bias)
    class_weight = check_class_weight(weight, classes, input)
    checked = check_target(target, input, input.dim() - 1, ignore_index)
    rows = math.prod(input.shape[:-1])
    # Gradients that are made in the forward pass save a product, and are added chunk by chunk, which
    # costs a GPU more than the product does.
    made: tuple[bool, ...] = (False,) * 3
    on_cpu = input.device.type == "cpu"
    if on_cpu and number != 0 and input.dtype in (torch.float32, torch.float64):
        made = backward_follows(input, linear_weight, linear_bias)
    loss, _, info, *_ = _linear_stablemax_cross_entropy(
        input.reshape(rows, input.shape[-1]),
        linear_weight,
        checked.reshape(rows),
        linear_bias,
        class_weight,
        ignore_index,
        number,
        label_smoothing,
        *made,
    )
    require_values(
        input,
        lambda: info[1],
        lambda: raise_for_target(checked, classes, ignore_index),
    )
    return loss.reshape(checked.shape) if number == 0 else loss


class LinearStableMaxCrossEntropyLoss(torch.nn.Module):
    """A linear layer and the StableMax cross entropy of its output, in the place of a head
    :class:`torch.nn.Linear` followed by :class:`fusee.nn.StableMaxCrossEntropyLoss`.

    Args:
        in_features: size of each input sample.
        num_classes: number of classes C.
        bias: whether the layer has an additive bias. Default False.
        weight: class weights (C), kept as a buffer ``class_weight``.
        reduction, ignore_index, label_smoothing: as in
            :func:`fusee.linear_stablemax_cross_entropy`.
        device, dtype: of the parameters.

    Shape: inputs (..., in_features) and targets (...); the loss is a scalar, or with
    ``reduction="none"`` (...). The parameters are ``weight`` (C, in_features) and ``bias`` (C),
    initialised as those of :class:`torch.nn.Linear`.
    """

    bias: Tensor | None
    class_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        bias: bool = False,
        weight: Tensor | None = None,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        layer = torch.nn.Linear(in_features, num_classes, bias, device=device, dtype=dtype)
        self.weight = layer.weight
        self.register_parameter("bias", layer.bias)
        self.register_buffer("class_weight", weight)
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return linear_stablemax_cross_entropy(
            input,
            self.weight,
            target,
            linear_bias=self.bias,
            weight=self.class_weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )

    def logits(self, input: Tensor) -> Tensor:
        """The layer's output (..., C), for inference."""
        return F.linear(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        classes, features = self.weight.shape
        return f"in_features={features}, num_classes={classes}, bias={self.bias is not None}"
