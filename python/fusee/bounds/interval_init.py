"""Initial weights that keep the radius of a box as it is from layer to layer."""

from __future__ import annotations

import math
from typing import Any, TypeVar, cast

from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from fusee.bounds import rules
from fusee.bounds.elementwise import add
from fusee.bounds.interval_trace import Network
from fusee.bounds.options import check_model

Model = TypeVar("Model", bound=nn.Module)


def _fan_in(layer: Any) -> float:
    """How many weights lead to an output; of a transposed convolution, on average."""
    weight = layer.weight
    if getattr(layer, "transposed", False):
        return weight.numel() / layer.out_channels / math.prod(layer.stride)
    return weight[0].numel()


def _boxes(network: Network, node: fx.Node) -> list[fx.Node]:
    return [before for before in node.all_input_nodes if before in network.boxed]


def _after_sum(network: Network, node: fx.Node) -> bool:
    """Whether what a layer gets is a sum of two branches, maybe moved, pooled or through ReLU."""
    while len(_boxes(network, node)) == 1:
        (node,) = _boxes(network, node)
        if node.op == "call_module" and any(True for _ in network.module(node).parameters()):
            return False
        is_add = add in (rules.FUNCTIONS.get(node.target), rules.METHODS.get(str(node.target)))
        if is_add and len(_boxes(network, node)) == 2:
            return True
    return False


def interval_init_(model: Model) -> Model:
    r"""Draws weights with which boxes neither grow nor shrink from layer to layer, in place.

    .. math:: W_{ij} \sim \mathcal{N}\!\left(0,\; 2\pi / n^2\right), \qquad n = \text{fan-in}

    So E\|W\| n = 2: a radius doubles in a linear layer and is halved in ReLU. With the usual variance of
    2 / n it grows by the square root of n / π in each layer, and training with boxes begins with bounds
    that say nothing. A layer after a residual sum, whose radius is that of both branches, gets half of
    such weights.

    Args:
        model: a network from one tensor to one tensor, which ``torch.fx`` can trace. The weights of all
            its ``torch.nn`` linear layers and convolutions, transposed ones too, are drawn anew, but for
            the last in the order in which they are called. Biases and batch norm stay as they are.

    Returns:
        The model.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it cannot be traced, or has not one input and one output; a layer is not initialised
            (``LazyLinear``) or its weight is no parameter of its own (``parametrize``, ``weight_norm``).
            The model is then left as it was.

    Draws from torch's random generator; deterministic given that.

    Source: Shi et al., "Fast certified robust training with short warmup", 2021, section 3.2.

    Example:
        >>> import torch, fusee
        >>> _ = torch.manual_seed(0)
        >>> layers = [torch.nn.Linear(500, 500), torch.nn.ReLU(), torch.nn.Linear(500, 10)]
        >>> model = fusee.nn.interval_init_(torch.nn.Sequential(*layers))
        >>> round(model[0].weight.abs().mean().item() * 500, 1)
        2.0
    """
    check_model(model)
    network = Network(model)
    calls = [
        node
        for node in network.graph.nodes
        if node in network.boxed
        and node.op == "call_module"
        and isinstance(network.module(node), (nn.Linear, _ConvNd))
    ]
    layers: dict[nn.Module, bool] = {}
    for node in calls:
        layer = network.module(node)
        weight = layer._parameters.get("weight")
        if weight is None:
            raise ValueError(f"{node.target} has a weight that is no parameter; remove that first")
        if is_lazy(weight):
            raise ValueError(f"{node.target} is not initialised: run the model on a batch first")
        layers[layer] = layers.get(layer, False) or _after_sum(network, node)
    last = network.module(calls[-1]).weight if calls else None
    for layer, halved in layers.items():
        if layer.weight is last:  # or another layer that shares it
            continue
        deviation = math.sqrt(2 * math.pi) / _fan_in(layer)
        drawn = cast(Tensor, layer.weight)
        nn.init.normal_(drawn, 0.0, deviation / 2 if halved else deviation)
    return model
