"""What a user would write instead of our reparameterisations, from the formulas alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"arctan": torch.atan, "tanh": torch.tanh}


def over_channels(parameter: Tensor, weight: Tensor) -> Tensor:
    """One number of a channel, dimension 0 of the weight; or one for all."""
    return parameter.reshape(-1, *(1,) * (weight.dim() - 1))


def eager_compand(kind: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The one-line form, a f(v / b)."""
    function = FUNCTIONS[kind]

    def expression(input: Tensor, a: Tensor, b: Tensor) -> Tensor:
        a, b = over_channels(a, input), over_channels(b, input)
        return a * function(input / b)

    return expression


def eager_loop(
    inputs: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The one-line form with arctan, of each weight in turn."""
    return tuple(each * torch.atan(v / width) for v, each, width in zip(inputs, a, b, strict=True))
