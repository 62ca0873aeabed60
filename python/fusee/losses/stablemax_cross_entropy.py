"""Cross entropy of StableMax, with the interface of ``torch.nn.functional.cross_entropy``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusee._checks import (
    accumulate_dtype,
    check_dim,
    check_floating,
    check_same_device,
    check_tensor,
    require_values,
)
from fusee._op import Op, batch_outer, fold_batch, unfold_batch
from fusee._rows import fold_rows
from fusee.losses.stablemax import reciprocal, slope, stable_exp, symlog

REDUCTIONS = ("none", "mean", "sum")
"""In the order of the operators' numbers for them."""


# --- the reference, in plain torch operators ---------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """The coefficients of (outer, classes, inner) logits; see csrc/losses/stablemax_cross_entropy.h."""

    coefficients: Tensor
    own: Tensor  # where the pivot stands
    total: Tensor  # K
    remainder: Tensor  # K - c_t
    ignored: Tensor
    invalid: Tensor
    divisor: Tensor  # what the row adds to the divisor of a mean


def _coefficients(
    x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> _Row:
    classes = x.shape[1]
    smooth = label_smoothing / classes
    w = x.new_ones(classes) if weight is None else weight
    w = torch.where(w >= 0, w, math.nan).view(1, -1, 1)
    index = torch.arange(classes, device=x.device).view(1, -1, 1)
    if target.is_floating_point():
        c = w * ((1 - label_smoothing) * target + smooth)
        own = index == c.detach().argmax(1, keepdim=True)
        ignored = torch.zeros_like(x[:, :1], dtype=torch.bool)
        invalid, divisor = ignored, torch.ones_like(x[:, :1])
    else:
        y = target.unsqueeze(1)
        ignored = y == ignore_index
        invalid = ~ignored & ((y < 0) | (y >= classes))
        own = (index == y) & ~ignored
        c = torch.where(own, (1 - label_smoothing) * w + smooth * w, smooth * w)
        divisor = torch.where(own, w, 0).sum(1, keepdim=True)
    total = c.sum(1, keepdim=True)
    remainder = torch.where(own, 0, c).sum(1, keepdim=True)
    return _Row(c, own, total, remainder, ignored, invalid, divisor)


def _reference(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:
    x = input.to(accumulate_dtype(input.dtype))
    row = _coefficients(x, target, weight, ignore_index, label_smoothing)
    # A row without a loss takes part as zeros, whatever it holds, with its first class as pivot.
    lost = row.ignored | row.invalid
    x = torch.where(lost, 0, x)
    own = torch.where(lost, torch.arange(x.shape[1], device=x.device).view(1, -1, 1) == 0, row.own)
    s = stable_exp(x)
    s_t = torch.where(own, s, 0).sum(1, keepdim=True)
    rest = torch.where(own, 0, s).sum(1, keepdim=True)
    odds = (rest / s_t).log1p()
    symlog_t = torch.where(own, symlog(x), 0).sum(1, keepdim=True)
    c = row.coefficients
    spread = torch.where(c == 0, 0, c * (symlog_t - symlog(x))).sum(1, keepdim=True)
    loss = row.total * odds + spread
    if z_loss != 0:
        loss = loss + z_loss * (odds + symlog_t).square()
    loss = torch.where(row.invalid, math.nan, torch.where(row.ignored, 0, loss)).squeeze(1)
    saved_sum, saved_rest = rest + s_t, 1 / (1 + s_t / rest)
    stats = torch.stack([saved_sum.where(~lost, 1), saved_rest.where(~lost, 0)], -1).squeeze(1)
    info = torch.stack([row.divisor.sum(), row.invalid.sum().to(x.dtype)]).double()
    if reduction == 1:
        loss = loss.sum() / row.divisor.sum()
    elif reduction == 2:
        loss = loss.sum()
    return loss, stats, info


def _backward_reference(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    # Row sums are recomputed from the input, so that this function has its whole derivative in it.
    x = input.to(accumulate_dtype(input.dtype))
    row = _coefficients(x, target, weight, ignore_index, label_smoothing)
    x = torch.where(row.ignored | row.invalid, 0, x)
    own = row.own
    s, r = stable_exp(x), reciprocal(x)
    s_t = torch.where(own, s, 0).sum(1, keepdim=True)
    rest = torch.where(own, 0, s).sum(1, keepdim=True)
    total_sum = rest + s_t
    z = 2 * z_loss * total_sum.log() if z_loss != 0 else 0.0
    result = (row.total + z) * slope(x) / total_sum - row.coefficients * r
    share = 1 / (1 + s_t / rest)
    # Where the pivot holds most of the sum, its derivative would cancel.
    pivot = row.remainder - row.total * share + z * s_t / total_sum
    result = grad.unsqueeze(1) * torch.where(own & (share < 0.5), pivot * r, result)
    result = torch.where(row.invalid, math.nan, torch.where(row.ignored, 0, result))
    return result.to(input.dtype)


# --- the operators -----------------------------------------------------------------------------------


def _fake(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(input.dim() == 3, lambda: f"input must be (outer, n, inner), got {input.shape}")
    outer, _, inner = input.shape
    dtype = accumulate_dtype(input.dtype)
    loss = input.new_empty((outer, inner) if reduction == 0 else (), dtype=dtype)
    stats = input.new_empty((outer, inner, 2), dtype=dtype)
    return loss, stats, input.new_empty((2,), dtype=torch.float64)


def _backward_fake(grad: Tensor, input: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def _fold_weight(info: Any, dim: int | None, weight: Tensor | None) -> None:
    if weight is not None and dim is not None:
        raise NotImplementedError("vmap over the class weights of stablemax_cross_entropy")


def _vmap(
    info: Any,
    in_dims: Any,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    z_loss: float,
) -> Any:
    _fold_weight(info, in_dims[2], weight)
    x, y = fold_batch(info, in_dims[:2], (input, target))
    numbers = (ignore_index, 0, label_smoothing, z_loss)
    loss, stats, _ = torch.ops.fusee.stablemax_cross_entropy(x, y, weight, *numbers)
    outer = batch_outer((input,), in_dims)
    loss, stats = unfold_batch(info, loss, outer), unfold_batch(info, stats, outer)
    # What a row adds to the divisor, and whether its target is out of range, per item of the batch.
    divisor, invalid = torch.ones_like(loss), torch.zeros_like(loss)
    if not y.is_floating_point():
        y = unfold_batch(info, y, outer)
        classes = x.shape[1]
        ignored = y == ignore_index
        inside = (y >= 0) & (y < classes) & ~ignored
        invalid = (~inside & ~ignored).to(loss.dtype)
        divisor = inside.to(loss.dtype)
        if weight is not None:
            divisor = divisor * weight[y.clamp(0, classes - 1)]
    rows = (1, 2)
    infos = torch.stack([divisor.sum(rows), invalid.sum(rows)], -1).double()
    if reduction != 0:
        loss = loss.sum(rows)
    if reduction == 1:
        loss = loss / infos[:, 0].to(loss.dtype)
    return (loss, stats, infos), (0, 0, 0)


def _backward_vmap(
    info: Any,
    in_dims: Any,
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    *numbers: Any,
) -> Any:
    _fold_weight(info, in_dims[3], weight)
    dims = (*in_dims[:3], in_dims[4])
    g, x, y, saved = fold_batch(info, dims, (grad, input, target, stats))
    result = torch.ops.fusee.stablemax_cross_entropy_backward(g, x, y, weight, saved, *numbers)
    return unfold_batch(info, result, batch_outer((grad,), in_dims)), 0


def row_gradient(grad: Tensor, reduction: int, divisor: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of every row's loss, given that of the reduced loss."""
    if reduction == 1:
        grad = grad / divisor.to(grad.dtype)
    return grad if reduction == 0 else grad.expand(shape)


def _backward(ctx: Any, args: Any, constants: Any, grad: Tensor) -> Any:
    input, target, weight, ignore_index, reduction, label_smoothing, z_loss = args
    stats, info = constants
    g = row_gradient(grad, reduction, info[0], stats.shape[:2])
    grad_input = grad_target = None
    if ctx.needs_input_grad[0]:
        grad_input = _stablemax_cross_entropy_backward(
            g, input, target, weight, stats, ignore_index, label_smoothing, z_loss
        )
    if ctx.needs_input_grad[1]:
        # d loss / d q_j = -(1 - eps) w_j log p_j
        log_p = _log_probabilities(input)
        w = 1.0 if weight is None else weight.view(1, -1, 1)
        grad_target = (label_smoothing - 1) * w * log_p * g.unsqueeze(1)
    return grad_input, grad_target, None, None, None, None, None


def _log_probabilities(input: Tensor) -> Tensor:
    from fusee.losses.stablemax import _stablemax

    return _stablemax(input.to(accumulate_dtype(input.dtype)), True)[0]


_stablemax_cross_entropy = Op(
    "stablemax_cross_entropy",
    fake=_fake,
    reference=_reference,
    vmap=_vmap,
    differentiable=((0, 1), (0,)),
    backward=_backward,
)
_stablemax_cross_entropy_backward = Op(
    "stablemax_cross_entropy_backward",
    fake=_backward_fake,
    reference=_backward_reference,
    vmap=_backward_vmap,
    differentiable=((0, 1, 2), (0,)),
)


# --- the public function -----------------------------------------------------------------------------


def check_reduction(reduction: Any) -> int:
    """The operators' number for a reduction."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    return REDUCTIONS.index(reduction)


def check_number(name: str, value: Any, low: float, high: float) -> float:
    """A plain number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {value}")
    return float(value)


def check_ignore_index(ignore_index: Any) -> int:
    """A plain integer."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    return ignore_index


def check_class_weight(weight: Any, classes: int, input: Tensor) -> Tensor | None:
    """Class weights in the accumulation dtype."""
    if weight is None:
        return None
    check_floating("weight", weight)
    check_same_device("weight", weight, "input", input)
    if weight.shape != (classes,):
        raise ValueError(
            f"weight must have one entry per class, shape ({classes},), got {tuple(weight.shape)}"
        )
    if weight.requires_grad:
        raise ValueError("weight must not require a gradient: the loss has none in it")

    def negative() -> None:
        raise ValueError(f"weight must not be negative, got {weight.min().item()}")

    require_values(weight, lambda: (weight < 0).any(), negative)
    return weight.detach().to(accumulate_dtype(input.dtype))


def check_target(target: Any, input: Tensor, dim: int, ignore_index: int) -> Tensor:
    """Class indices as int64, or probabilities in the accumulation dtype."""
    check_tensor("target", target)
    check_same_device("target", target, "input", input)
    rest = (*input.shape[:dim], *input.shape[dim + 1 :])
    if target.is_floating_point():
        if target.shape != input.shape:
            raise ValueError(
                f"target with probabilities must have the shape of input {tuple(input.shape)}, "
                f"got {tuple(target.shape)}"
            )
        if ignore_index >= 0:
            raise ValueError(
                f"ignore_index must be negative when target has probabilities, got {ignore_index}"
            )
        return target.to(accumulate_dtype(input.dtype))
    if target.dtype == torch.bool or target.is_complex():
        raise TypeError(f"target must hold class indices or probabilities, got {target.dtype}")
    if target.shape != rest:
        raise ValueError(
            f"target with class indices must have the shape of input without its classes "
            f"{tuple(rest)}, got {tuple(target.shape)}"
        )
    return target.long()


def raise_for_target(target: Tensor, classes: int, ignore_index: int) -> None:
    """Names the first class index out of range."""
    outside = ((target < 0) | (target >= classes)) & (target != ignore_index)
    value = target[outside][0].item()
    raise IndexError(f"target must be in [0, {classes - 1}] or {ignore_index=}, got {value}")


def stablemax_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    dim: int = 1,
) -> Tensor:
    r"""Cross entropy between the :func:`fusee.stablemax` of logits and a target.

    .. math:: \ell_i = \sum_j c_{ij} (\log S_i - \log s(x_{ij})) + z (\log S_i)^2, \qquad
              S_i = \sum_j s(x_{ij})

    where :math:`c_i` is the one-hot (or given) distribution, smoothed and times the class weights. It is
    computed as :math:`\log(1 + (S - s_y) / s_y)`, so a float32 loss and its gradient stay right, and
    above zero, however confident the model is; no float64 is needed.

    Args:
        input: logits (C), (N, C) or (N, C, d1, ..., dk), or with the classes in dimension ``dim``; any
            strides; float32, float64, bfloat16 or float16. Mask a class with ``-inf``.
        target: class indices of any integer dtype, with the shape of ``input`` without its classes; or
            probabilities of a floating dtype with the shape of ``input``, which may require gradients.
        weight: a weight (C) >= 0 for each class. It has no gradient.
        ignore_index: rows with this target have loss and gradient zero and do not count in a mean.
            Any integer. For probabilities it must stay negative.
        reduction: ``"none"``, ``"mean"`` (over rows that are not ignored, by their targets' class
            weights; NaN if there are none) or ``"sum"``.
        label_smoothing: in [0, 1], the part of the target that is spread evenly over the classes.
        z_loss: factor z >= 0 of the squared log normaliser, which pulls S towards one. It is added to
            each row's loss before the reduction. Default 0.
        dim: the dimension of the classes, e.g. -1 for (B, T, V) logits. A one-dimensional input has
            them in dimension 0 whatever ``dim`` says.

    Returns:
        The loss, float64 for float64 logits and float32 for all others (torch's would be half for
        half logits): a scalar, or with ``"none"`` the shape of ``input`` without its classes.

    Raises:
        TypeError: a tensor or number of the wrong type.
        ValueError: shapes that do not fit, tensors on different devices, no classes, an unknown
            reduction, a number out of range, a negative class weight, a weight that requires grad.
        IndexError: ``dim`` or a class index out of range. In compiled code and on CUDA rows with such
            an index are NaN instead, and so is what negative class weights touch; with
            ``FUSEE_CHECK_VALUES=1`` in the environment they raise there too.

    Differentiable to any order and in forward mode, in ``input`` and probability targets. Beside its
    arguments it saves 8 bytes a row (16 in float64). Deterministic: the same bits on the same engine,
    whatever the number of threads. NaN spreads over its row.

    Source: Prieto et al., "Grokking at the Edge of Numerical Stability", arXiv:2501.04697.

    Example:
        >>> import torch, fusee
        >>> logits = torch.tensor([[2.0, 0.0, -1.0]])
        >>> fusee.stablemax_cross_entropy(logits, torch.tensor([0]))
        tensor(0.4055)
    """
    check_floating("input", input)
    if input.dim() == 0:
        raise ValueError("input must have a dimension of classes, got a scalar")
    dim = 0 if input.dim() == 1 else check_dim(dim, input.dim())
    classes = input.shape[dim]
    if classes == 0:
        raise ValueError(f"input must have at least one class, got shape {tuple(input.shape)}")
    ignore_index = check_ignore_index(ignore_index)
    number = check_reduction(reduction)
    label_smoothing = check_number("label_smoothing", label_smoothing, 0.0, 1.0)
    z_loss = check_number("z_loss", z_loss, 0.0, math.inf)
    class_weight = check_class_weight(weight, classes, input)
    checked = check_target(target, input, dim, ignore_index)

    rows = fold_rows(input, dim)
    outer, _, inner = rows.folded.shape
    if checked.is_floating_point():
        # Folded in the order of the logits, whatever the target's own strides.
        folded_target = checked.movedim(dim, rows.position).reshape(rows.folded.shape)
    else:
        folded_target = checked.reshape(outer, inner)
    loss, _, info = _stablemax_cross_entropy(
        rows.folded, folded_target, class_weight, ignore_index, number, label_smoothing, z_loss
    )
    require_values(
        input,
        lambda: info[1],
        lambda: raise_for_target(checked, classes, ignore_index),
    )
    rest = (*input.shape[:dim], *input.shape[dim + 1 :])
    return loss.reshape(rest) if number == 0 else loss


class StableMaxCrossEntropyLoss(torch.nn.Module):
    """:func:`fusee.stablemax_cross_entropy` as a module, in the place of
    :class:`torch.nn.CrossEntropyLoss`.

    Args:
        weight: class weights (C), kept as a buffer.
        ignore_index, reduction, label_smoothing, z_loss, dim: as in the function.

    Shape: logits (N, C, d1, ..., dk) and targets (N, d1, ..., dk), or as ``dim`` says.
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        dim: int = 1,
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.dim = dim

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return stablemax_cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            dim=self.dim,
        )

    def extra_repr(self) -> str:
        return (
            f"reduction={self.reduction!r}, label_smoothing={self.label_smoothing}, dim={self.dim}"
        )
