"""How tight interval bounds are: the radius that is needed over the one that they have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusee._checks import check_beside, check_floating
from fusee.bounds.boxes import Box, check_ends, check_pair, check_radius, in_accumulate_dtype
from fusee.bounds.interval_margins import check_targets, margins_of
from fusee.bounds.interval_program import build
from fusee.bounds.interval_trace import Network
from fusee.bounds.options import in_mode
from fusee.bounds.pgd_attack import check_outputs, network_of

_LEAST = 1e-8
"""What neither radius is below, as in the authors' code."""


def propagation_tightness(
    model: nn.Module,
    lower: Tensor,
    upper: Tensor,
    target: Tensor,
    input: Tensor | None = None,
    *,
    create_graph: bool = False,
) -> Tensor:
    r"""How tight interval bounds of a network of ReLU are near points, for each sample and class.

    .. math:: \tau_j = \frac{|e_j^T W_L D_{L-1} W_{L-1} \cdots D_1 W_1|\, \delta}
              {|e_j^T W_L|\, D_{L-1} |W_{L-1}| \cdots D_1 |W_1|\, \delta}, \qquad e_j = 1_j - 1_y

    D are the units whose value before ReLU is not negative at ``input``, δ = (upper - lower) / 2. Where
    these stay as they are in the box, the numerator is the radius that the difference of the outputs j
    and y really has, and the denominator that of its interval bound. 1 means that nothing is lost; at
    the usual initial weights τ falls with the width and exponentially with the depth, and training with
    boxes raises it.

    The model runs in evaluation mode, with the running statistics of batch norm, and then each of its
    modules is in the mode that it had. Biases do not matter.

    Args:
        model: a network whose output is (batch, classes), or a :class:`fusee.nn.IntervalModel` of one.
            Operations other than ReLU must be linear. Residual sums are added, as their bounds are.
        lower, upper: the ends of the boxes (batch, ...), in the unit of the model's input.
        target: the classes y (batch), int64.
        input: the points, of the shape and dtype of ``lower``. By default the centers of the boxes.
        create_graph: whether the result shall have a gradient in the parameters, to be raised by
            training.

    Returns:
        τ (batch, classes) of the dtype of the output. NaN at the target, so that a mean must be that of
        the others: ``.nanmean()`` is what the authors report. Numerator and denominator are at least
        1e-8, as in their code. Up to rounding, τ is at most 1. Where the last layer is no linear one,
        the bound of a difference is that of both outputs.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: shapes or devices differ, an end is infinite, ``lower`` is above ``upper``, the model
            cannot be traced, or its output is not (batch, classes).
        IndexError: a target is no class.
        NotImplementedError: an operation is neither ReLU nor linear, or has no rule.

    One pass forward, and one back for each class. The gradients of parameters are not touched.
    Deterministic.

    Source: Mao et al., "Understanding certified training with interval bound propagation", 2024.

    Example:
        >>> import torch, fusee
        >>> one, two = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
        >>> _ = one.weight.data.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        >>> _ = two.weight.data.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
        >>> x = torch.ones(1, 2)
        >>> model = torch.nn.Sequential(one, torch.nn.ReLU(), two)
        >>> fusee.propagation_tightness(model, x - 0.1, x + 0.1, torch.tensor([0]))
        tensor([[   nan, 0.5000]])
    """
    network = network_of(model)
    check_pair("lower", lower, "upper", upper)
    if input is not None:
        check_pair("lower", lower, "input", input)
    check_ends(lower, upper)
    radius = 0.5 * upper - 0.5 * lower
    with in_mode(network, False), torch.enable_grad():
        traced = Network(network)
        program = build(traced, clean=False, collect=False, local=True)
        points = (0.5 * lower + 0.5 * upper if input is None else input).detach()
        points.requires_grad_()
        parameters: dict[str, Tensor] = dict(program.named_parameters())
        if not create_graph:
            # Their gradients are not wanted.
            parameters = {name: value.detach() for name, value in parameters.items()}
            radius = radius.detach()
        box, _, _ = torch.func.functional_call(
            program, parameters, (Box(points, radius), False), strict=False
        )
        head: Any = traced.last_layer()
        output = box.center
        if head is not None:
            weight = head.weight if create_graph else head.weight.detach()
            output = nn.functional.linear(output, weight)
        check_outputs(output, len(lower))
        classes = output.shape[1]
        check_targets(target, (len(lower),), classes)
        is_target = target.unsqueeze(1) == torch.arange(classes, device=target.device)
        if head is None:
            bound = box.radius + box.radius.gather(1, target.unsqueeze(1))
        else:
            bound = margins_of(Box(torch.zeros_like(box.center), box.radius), weight, None, target)
        needed = []
        for j in range(classes):
            difference = -is_target.to(output.dtype)
            difference[:, j] += 1
            (slope,) = torch.autograd.grad(
                output, points, difference, retain_graph=True, create_graph=create_graph
            )
            needed.append((slope.abs() * radius).flatten(1).sum(1))
        radii = in_accumulate_dtype(torch.stack(needed, 1), bound)
        tightness = radii[0].clamp(min=_LEAST) / radii[1].clamp(min=_LEAST)
        result = torch.where(is_target, torch.nan, tightness).to(output.dtype)
        return result if create_graph else result.detach()


def linear_tightness(weights: Sequence[Tensor], radius: Tensor) -> Tensor:
    r"""How tight interval bounds of a product of matrices are, for each output.

    .. math:: \tau = \frac{|W_L \cdots W_1|\, \delta}{|W_L| \cdots |W_1|\, \delta}

    For random normal weights the mean numerator over the mean denominator is the product over the hidden
    layers, of d units each, of

    .. math:: \frac{\sqrt{\pi}\; \Gamma((d + 1) / 2)}{d\; \Gamma(d / 2)} \approx \sqrt{\frac{\pi}{2d}}

    Two layers have τ = 1 exactly where, for each input and output, all products of weights along the
    paths have one sign.

    Args:
        weights: W₁ to W_L, each (out, in), in the order in which they are applied; float32, float64,
            bfloat16 or float16.
        radius: δ (..., in), of their dtype and device, not negative.

    Returns:
        τ (..., out) in [0, 1] up to rounding; 1 where the bound's radius is 0.

    Raises:
        TypeError: an argument is not a dense floating-point tensor, or the dtypes differ.
        ValueError: shapes or devices do not fit, there is no weight, or a radius is negative or
            infinite.

    Differentiable in all tensors. Deterministic.

    Source: Mao et al., "Understanding certified training with interval bound propagation", 2024.

    Example:
        >>> import torch, fusee
        >>> weight = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
        >>> fusee.linear_tightness([weight, weight], torch.ones(2))
        tensor([0.5000, 0.5000])
    """
    check_floating("radius", radius)
    if len(weights) == 0:
        raise ValueError("weights must have a matrix, got none")
    features = radius.shape[-1] if radius.dim() else None
    for i, weight in enumerate(weights):
        name = f"weights[{i}]"
        check_floating(name, weight)
        if weight.dim() != 2 or weight.shape[1] != features:
            raise ValueError(f"{name} must be (out, {features}), got {tuple(weight.shape)}")
        check_beside(name, weight, "radius", radius)
        features = weight.shape[0]
    check_radius(radius)
    bound = radius
    for weight in weights:
        bound = bound @ weight.abs().mT
    product = weights[0]
    for weight in weights[1:]:
        product = weight @ product
    needed = radius @ product.abs().mT
    return torch.where(bound > 0, needed / torch.where(bound > 0, bound, 1), 1)
