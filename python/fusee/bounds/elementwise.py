"""Boxes through functions of single elements, sums and averages."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusee.bounds.boxes import Box, next_above, next_below, of_two, rounding_of, to_box, to_ends


def _rounded(center: Tensor, radius: Tensor, dtype: torch.dtype) -> Box:
    """A box in ``dtype`` around one that was computed in float64, each number with at most three
    roundings."""
    limits = torch.finfo(torch.float64)
    lost = 4 * limits.eps * center.abs() + limits.tiny
    grown = next_above(radius * (1 + 4 * limits.eps)) + next_above(lost)
    return Box(*of_two(Box(center, next_above(grown)), dtype, True))


def _constant(value: Any, like: Tensor, sound: bool) -> Any:
    """What is no box: a tensor, or a number; where sound, in float64."""
    if isinstance(value, Tensor):
        return value.double() if sound else value
    return torch.as_tensor(value, dtype=torch.float64, device=like.device) if sound else value


def _sum(one: Any, other: Any, function: Callable[..., Tensor], alpha: float, sound: bool) -> Box:
    """The sum or the difference of two boxes, or of one and what is none."""
    if alpha != 1:
        raise NotImplementedError("no interval rule for a sum with alpha")
    like = (one if isinstance(one, Box) else other).center
    parts = []
    for value in (one, other):
        if isinstance(value, Box):
            parts.append(Box(*(part.double() for part in value)) if sound else value)
        else:
            parts.append(
                Box(
                    _constant(value, like, sound),
                    torch.zeros((), dtype=like.dtype, device=like.device),
                )
            )
    center = function(parts[0].center, parts[1].center)
    radius = (parts[0].radius + parts[1].radius).expand(center.shape)
    return _rounded(center, radius, like.dtype) if sound else Box(center, radius)


def add(one: Any, other: Any, *, alpha: float = 1, sound: bool = False) -> Box:
    return _sum(one, other, operator.add, alpha, sound)


def subtract(one: Any, other: Any, *, alpha: float = 1, sound: bool = False) -> Box:
    return _sum(one, other, operator.sub, alpha, sound)


def negate(box: Box, *, sound: bool = False) -> Box:
    return Box(-box.center, box.radius)


def _scaled(box: Box, scale: Any, function: Callable[..., Tensor], sound: bool) -> Box:
    """The box times or divided by what is no box."""
    scale = _constant(scale, box.center, sound)
    magnitude = scale.abs() if isinstance(scale, Tensor) else abs(scale)
    if not sound:
        return Box(function(box.center, scale), function(box.radius, magnitude))
    center, radius = (part.double() for part in box)
    return _rounded(function(center, scale), function(radius, magnitude), box.center.dtype)


def multiply(one: Any, other: Any, *, sound: bool = False) -> Box:
    if isinstance(one, Box) and isinstance(other, Box):
        raise NotImplementedError("no interval rule for the product of two boxes")
    box, scale = (one, other) if isinstance(one, Box) else (other, one)
    return _scaled(box, scale, torch.mul, sound)


def divide(one: Any, other: Any, *, rounding_mode: str | None = None, sound: bool = False) -> Box:
    if not isinstance(one, Box) or isinstance(other, Box) or rounding_mode is not None:
        raise NotImplementedError("no interval rule for a division by a box")
    return _scaled(one, other, torch.div, sound)


def monotone(function: Callable[[Tensor], Tensor], box: Box, sound: bool = False) -> Box:
    """Of a function that never falls, within four units in the last place of the exact one."""
    lower, upper = to_ends(box, sound)
    if not sound:
        # A rounded function may fall by a unit in the last place.
        return _of_ends(function(lower), function(upper))
    dtype = lower.dtype
    ends = (function(end.double()) for end in (lower, upper))
    slack = 2**-50 if dtype == torch.float64 else 2**-46
    below, above = ((end - slack * end.abs(), end + slack * end.abs()) for end in ends)
    tiny = torch.finfo(dtype).tiny
    return to_box(
        next_below(below[0].to(dtype)) - tiny, next_above(above[1].to(dtype)) + tiny, True
    )


def single_minimum(function: Callable[[Tensor], Tensor], where: float, box: Box) -> Box:
    """Of a function that falls before one point and rises after it."""
    lower, upper = to_ends(box, False)
    lowest = torch.minimum(torch.maximum(torch.full_like(lower, where), lower), upper)
    ends = function(lower), function(upper)
    least = torch.minimum(function(lowest), torch.minimum(*ends))
    return to_box(least, torch.maximum(*ends), False)


def _of_ends(one: Tensor, other: Tensor) -> Box:
    """The box between two ends in whatever order."""
    return Box(0.5 * one + 0.5 * other, (0.5 * other - 0.5 * one).abs())


def average(function: Callable[[Tensor], Tensor], box: Box, sound: bool = False) -> Box:
    """Of sums and averages, which no weight is negative in."""
    if not sound:
        # A divisor may be negative.
        return Box(function(box.center), function(box.radius).abs())
    dtype, shape = box.center.dtype, box.center.shape
    center, radius = box.center.double(), box.radius.double()
    result = function(center)
    # No result has more terms than this.
    per_sample = result.shape[:1] == shape[:1] and shape[0] > 0
    terms = center.numel() // shape[0] if per_sample else center.numel()
    relative, absolute = rounding_of(terms, torch.float64)
    covered = next_above(radius + next_above(relative * center.abs()))
    grown = next_above(function(covered).abs() + absolute)
    made = Box(result, next_above(grown * (1 + 3 * relative)))
    return Box(*of_two(made, dtype, True))
