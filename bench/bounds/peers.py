"""What people use, or would write, instead of our layers of boxes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]


def pair_linear(
    center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor, magnitudes: Tensor
) -> Pair:
    """Two products, with the magnitudes made at each call."""
    return F.linear(center, weight, bias), F.linear(radius, weight.abs())


def cached_linear(
    center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor, magnitudes: Tensor
) -> Pair:
    """Two products, with magnitudes from before, which the next step of training makes wrong."""
    return F.linear(center, weight, bias), F.linear(radius, magnitudes)


def eager_relu(center: Tensor, radius: Tensor) -> Pair:
    """Both ends, and back."""
    lower, upper = (center - radius).relu(), (center + radius).relu()
    return (upper + lower) / 2, (upper - lower) / 2


def eager_margins(
    center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor, target: Tensor
) -> Tensor:
    """The rows' differences (rows, classes, in) and their magnitudes."""
    differences = weight - weight[target].unsqueeze(1)
    margins = torch.bmm(differences, center.unsqueeze(-1)).squeeze(-1)
    margins = margins + torch.bmm(differences.abs(), radius.unsqueeze(-1)).squeeze(-1)
    return margins + bias - bias[target].unsqueeze(-1)


class PlainBounds:
    """The rules in plain operators, center and radius, for an ``nn.Sequential``."""

    def __init__(self, model: nn.Sequential) -> None:
        self.model = model

    def __call__(self, lower: Tensor, upper: Tensor) -> Pair:
        center, radius = (upper + lower) / 2, (upper - lower) / 2
        for layer in self.model:
            if isinstance(layer, nn.Linear):
                center = F.linear(center, layer.weight, layer.bias)
                radius = F.linear(radius, layer.weight.abs())
            elif isinstance(layer, nn.Conv2d):
                options = (layer.stride, layer.padding)
                center = F.conv2d(center, layer.weight, layer.bias, *options)
                radius = F.conv2d(radius, layer.weight.abs(), None, *options)
            elif isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d):
                assert layer.running_mean is not None and layer.running_var is not None
                scale = layer.weight * torch.rsqrt(layer.running_var + layer.eps)
                shape = (-1, *[1] * (center.dim() - 2))
                shift = (layer.bias - layer.running_mean * scale).view(shape)
                center, radius = (
                    center * scale.view(shape) + shift,
                    radius * scale.abs().view(shape),
                )
            elif isinstance(layer, nn.ReLU):
                center, radius = eager_relu(center, radius)
            else:
                center, radius = layer(center), layer(radius)
        return center - radius, center + radius


def lirpa_bounds(model: nn.Module, shape: tuple[int, ...]) -> Callable[[Tensor, Tensor], Pair]:
    """auto_LiRPA's interval bounds."""
    lirpa: Any = importlib.import_module("auto_LiRPA")
    # Its option keeps the parameters, which are the model's own, as they are.
    options = {"ibp_relative": False}
    bounded = lirpa.BoundedModule(model, torch.zeros(shape), bound_opts=options)
    for parameter in bounded.parameters():
        parameter.requires_grad_()

    def bounds(lower: Tensor, upper: Tensor) -> Pair:
        norm = lirpa.PerturbationLpNorm(norm=float("inf"), x_L=lower, x_U=upper)
        x = lirpa.BoundedTensor((lower + upper) / 2, norm)
        low, high = bounded.compute_bounds(x=(x,), method="IBP")
        return low, high

    return bounds
