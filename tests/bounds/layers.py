"""What the records of layers of boxes share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tests.harness.spec import Arguments, ErrorInput, Maker


def stacked(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    """The function with its center and its radius in one tensor."""

    @functools.wraps(function)
    def both(**arguments: Any) -> Tensor:
        center, radius = function(**arguments)
        first = torch.arange(2, device=center.device).view(2, *[1] * center.dim()) == 0
        # torch.stack would have opinions on dtypes under autocast.
        return torch.where(first, center, radius)

    return both


def relu_ends(center: Tensor, radius: Tensor) -> Tensor:
    """ReLU of both ends of a box."""
    lower, upper = (center - radius).relu(), (center + radius).relu()
    return torch.stack([(upper + lower) / 2, (upper - lower) / 2])


def make_box(make: Maker, *shape: int) -> Arguments:
    """A box whose ends lie on both sides of zero in some elements."""
    return {"center": make.normal(*shape), "radius": make.uniform(*shape, low=0.1)}


def other_dtype(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float64 if tensor.dtype != torch.float64 else torch.float32)


def box_errors(given: Arguments) -> Iterator[ErrorInput]:
    """Boxes that are none."""
    c, r = given["center"], given["radius"]

    def error(name: str, kind: type[Exception], match: str, **changed: Any) -> ErrorInput:
        return ErrorInput(name, {**given, **changed}, kind, match)

    yield error("center not a tensor", TypeError, "center must be a Tensor", center=[1.0])
    yield error("center of integers", TypeError, "center must have dtype", center=c.long())
    yield error("radius not a tensor", TypeError, "radius must be a Tensor", radius=1.0)
    yield error("radius's shape", ValueError, "radius must have the shape of center", radius=r[:1])
    yield error("radius's dtype", TypeError, "radius must have the dtype", radius=other_dtype(r))
    yield error("radius's device", ValueError, "radius .*device", radius=r.to("meta"))
    negative, infinite = r.clone(), r.clone()
    negative.flatten()[0], infinite.flatten()[-1] = -1.0, torch.inf
    for name, value in (("negative", negative), ("infinite", infinite)):
        arguments = {**given, "radius": value}
        match = "radius must be finite and not negative"
        yield ErrorInput(f"{name} radius", arguments, ValueError, match, values=True)


def layer_errors(given: Arguments, dims: int) -> Iterator[ErrorInput]:
    """Boxes, weights and biases that do not go together."""
    yield from box_errors(given)
    w, bias = given["weight"], given["bias"]

    def error(name: str, kind: type[Exception], match: str, **changed: Any) -> ErrorInput:
        return ErrorInput(name, {**given, **changed}, kind, match)

    yield error("weight not a tensor", TypeError, "weight must be a Tensor", weight=None)
    dimensions = f"weight must have {dims} dimensions"
    yield error("weight a vector", ValueError, dimensions, weight=w.flatten())
    yield error("weight's dtype", TypeError, "weight must have the dtype", weight=other_dtype(w))
    yield error("weight's device", ValueError, "weight .*device", weight=w.to("meta"))
    yield error("weight too narrow", ValueError, "center must", weight=w[:, 1:])
    yield error("bias not a tensor", TypeError, "bias must be a Tensor", bias=1.0)
    yield error("bias too short", ValueError, "bias must have shape", bias=bias[1:])
    yield error("bias's dtype", TypeError, "bias must have the dtype", bias=other_dtype(bias))
    yield error("bias's device", ValueError, "bias .*device", bias=bias.to("meta"))


NO_NAN = dict.fromkeys(
    ("nan", "bad_values_in_compiled_code"),
    "a gradient of a product has none of what it is of: see test_interval_linear.py",
)


def random_box(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(shape), torch.rand(shape) + 0.1


def only_row(result: Tensor, row: int, expected: Tensor) -> None:
    """The row is NaN, and the others are as they were."""
    bad = torch.zeros_like(result, dtype=torch.bool)
    bad[row] = True
    assert torch.equal(result.isnan(), bad) and torch.equal(result[~bad], expected[~bad])
