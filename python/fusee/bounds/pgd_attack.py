"""Points of a box where a network errs most, by projected gradient ascent."""

from __future__ import annotations

from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusee._checks import accumulate_dtype, check_floating
from fusee.bounds.boxes import check_ends, check_pair
from fusee.bounds.interval_margins import check_targets
from fusee.bounds.interval_model import IntervalModel
from fusee.bounds.options import check_count, check_model, check_number, in_mode


def network_of(model: nn.Module) -> nn.Module:
    """The network that an :class:`IntervalModel` stands beside, or the model itself."""
    check_model(model)
    return model.model if isinstance(model, IntervalModel) else model


def check_outputs(output: Tensor, samples: int) -> None:
    """Raises unless there is a row of classes for each sample."""
    if output.dim() != 2 or output.shape[0] != samples or output.shape[1] == 0:
        raise ValueError(f"model must return ({samples}, classes), got shape {tuple(output.shape)}")


def _losses(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.to(accumulate_dtype(output.dtype)), target, reduction="none")


def reads_right(output: Tensor, target: Tensor) -> Tensor:
    """Whether the target's output is above all others."""
    below = output < output.gather(1, target.unsqueeze(1))
    return below.sum(1) == output.shape[1] - 1


class _Worst:
    """The worst point met of each sample: one that is read wrong before one that is not, and then by
    its loss."""

    def __init__(self, points: Tensor) -> None:
        self.points = points
        self.loss = torch.full((len(points),), -inf, device=points.device)
        self.wrong = torch.zeros(len(points), dtype=torch.bool, device=points.device)

    def meet(self, points: Tensor, output: Tensor, target: Tensor) -> Tensor:
        """Keeps the worse of each; returns the losses."""
        losses = _losses(output, target)
        found = losses.detach()
        wrong = ~reads_right(output.detach(), target)
        worse = (wrong & ~self.wrong) | ((wrong == self.wrong) & (found > self.loss))
        of_sample = worse.reshape(-1, *(1,) * (points.dim() - 1))
        self.points = torch.where(of_sample, points.detach(), self.points)
        self.loss = torch.where(worse, found, self.loss)
        self.wrong = self.wrong | wrong
        return losses


def pgd_attack(
    model: nn.Module,
    input: Tensor,
    target: Tensor,
    lower: Tensor,
    upper: Tensor,
    *,
    steps: int = 10,
    step_size: float | None = None,
    restarts: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Points in boxes where cross entropy is large, by projected gradient ascent.

    .. math:: x \leftarrow \min(\max(x + \alpha \operatorname{sign} \nabla_x \ell(x), l), u)

    Each restart begins at a random point of the box. Returned is, for each sample, the worst among all
    points that were met, ``input`` too: the one of largest loss of those that are read wrong, or of all.

    The model runs in evaluation mode, and then each of its modules is in the mode that it had.
    Statistics of batch norm and the gradients of parameters are not touched.

    Args:
        model: a network whose output is (batch, classes), or a :class:`fusee.nn.IntervalModel` of one.
        input: (batch, ...), moved into the box where it is outside.
        target: the classes y (batch), int64.
        lower, upper: l and u, the ends of the boxes, of the shape, dtype and device of ``input``.
        steps: how many in each restart.
        step_size: α, in the unit of the input. By default 2.5 / ``steps`` of the radius of the box,
            which may differ among elements.
        restarts: how many times to begin.
        generator: for the first points; of the device of the input.

    Returns:
        Points of the shape and dtype of ``input``, inside the boxes, without gradient.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: shapes or devices differ, an end is infinite, ``lower`` is above ``upper``, the
            output is not (batch, classes), or a number is not positive.
        IndexError: a target is no class.

    Deterministic as far as the model is, given the generator.

    Source: Madry et al., "Towards deep learning models resistant to adversarial attacks", 2018.

    Example:
        >>> import torch, fusee
        >>> model = torch.nn.Linear(2, 2)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> x, y = torch.tensor([[0.5, 0.25]]), torch.tensor([0])
        >>> fusee.nn.pgd_attack(model, x, y, x - 0.125, x + 0.125)
        tensor([[0.3750, 0.3750]])
    """
    network = network_of(model)
    check_floating("input", input)
    check_pair("input", input, "lower", lower)
    check_pair("lower", lower, "upper", upper)
    check_count("steps", steps)
    check_count("restarts", restarts)
    if step_size is not None and not 0 < check_number("step_size", step_size, 0, inf) < inf:
        raise ValueError(f"step_size must be positive and finite, got {step_size}")
    check_ends(lower, upper)
    lower, upper = lower.detach(), upper.detach()
    step = 1.25 * (upper - lower) / steps if step_size is None else step_size
    start = input.detach().clamp(lower, upper)
    worst = _Worst(start)
    with in_mode(network, False), torch.no_grad():
        output = network(start.clone())  # which may write to it
        check_outputs(output, len(input))
        check_targets(target, (len(input),), output.shape[1])
        worst.meet(start, output, target)
        for _ in range(restarts):
            noise = torch.rand(
                input.shape, generator=generator, dtype=input.dtype, device=input.device
            )
            points = (lower + noise * (upper - lower)).clamp(lower, upper)
            for _ in range(steps):
                with torch.enable_grad():
                    points.requires_grad_()
                    losses = worst.meet(points, network(points.clone()), target)
                    (slope,) = torch.autograd.grad(losses.sum(), points)
                points = (points.detach() + step * slope.sign()).clamp(lower, upper)
            worst.meet(points, network(points.clone()), target)
    return worst.points
