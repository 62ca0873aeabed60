"""Cross entropy of the worst outputs that a box allows."""

from __future__ import annotations

from torch import Tensor, nn

from fusee._checks import accumulate_dtype, check_floating
from fusee.bounds.options import check_reduction


def robust_cross_entropy(margins: Tensor, reduction: str = "mean") -> Tensor:
    r"""An upper bound of the cross entropy of every point of a box.

    .. math:: \ell = \log\Big(1 + \sum_{j \ne y} e^{d_j}\Big)

    Cross entropy knows outputs by their differences to the target's alone, and rises with each; so upper
    bounds d of these differences give one of it. The sum is taken without overflow, however loose the
    bounds are.

    Args:
        margins: d (..., classes), as :func:`fusee.interval_margins` and
            :meth:`fusee.nn.IntervalModel.margins` give it: 0 at the target, which is the 1 of the
            formula. float32, float64, bfloat16 or float16; half types are summed in float32.
        reduction: ``"mean"``, ``"sum"``, or ``"none"``.

    Returns:
        A scalar, or (...) without reduction, of the dtype of ``margins``. The mean over no rows is NaN.

    Raises:
        TypeError: ``margins`` is not a dense floating-point tensor.
        ValueError: it has no classes, or ``reduction`` is unknown.

    Differentiable to any order and in forward mode. Deterministic.

    Source: Gowal et al., "On the effectiveness of interval bound propagation for training verifiably
    robust models", 2018, section 4; Wong and Kolter, "Provable defenses against adversarial examples via
    the convex outer adversarial polytope", 2018.

    Example:
        >>> import torch, fusee
        >>> fusee.robust_cross_entropy(torch.tensor([[0.0, -1.0], [1000.0, 0.0]]), reduction="none")
        tensor([3.1326e-01, 1.0000e+03])
    """
    check_floating("margins", margins)
    check_reduction(reduction)
    if margins.dim() == 0 or margins.shape[-1] == 0:
        raise ValueError(f"margins must have classes, got shape {tuple(margins.shape)}")
    losses = margins.to(accumulate_dtype(margins.dtype)).logsumexp(-1)
    if reduction == "mean":
        losses = losses.mean()
    elif reduction == "sum":
        losses = losses.sum()
    return losses.to(margins.dtype)


class RobustCrossEntropyLoss(nn.Module):
    """:func:`fusee.robust_cross_entropy` as a module.

    Args:
        reduction: as there.

    Example:
        >>> import torch, fusee
        >>> loss = fusee.nn.RobustCrossEntropyLoss()
        >>> loss(torch.tensor([[0.0, -1.0], [2.0, 0.0]]))
        tensor(1.2201)
    """

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = check_reduction(reduction)

    def forward(self, margins: Tensor) -> Tensor:
        return robust_cross_entropy(margins, self.reduction)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"
