"""Boxes through functions of single elements, sums and averages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusee.bounds.boxes import Box, next_above, next_below, of_two, rounding_of, to_box, to_ends


def _as_box(value: Any, like: Box) -> Box:
    if isinstance(value, Box):
        return value
    if not isinstance(value, Tensor):
        value = torch.as_tensor(value, dtype=like.center.dtype, device=like.center.device)
    return Box(value, torch.zeros_like(value))


def _sum(center: Tensor, radius: Tensor, sound: bool) -> Box:
    """A sum of two, whose radius covers the rounding of its center."""
    if not sound:
        return Box(center, radius)
    limits = torch.finfo(center.dtype)
    lost = next_above(limits.eps * center.abs()) + limits.tiny
    return Box(center, next_above(next_above(radius) + lost))


def add(one: Any, other: Any, *, alpha: float = 1, sound: bool = False) -> Box:
    if alpha != 1:
        raise NotImplementedError("no interval rule for add with alpha")
    like = one if isinstance(one, Box) else other
    one, other = _as_box(one, like), _as_box(other, like)
    return _sum(one.center + other.center, one.radius + other.radius, sound)


def negate(box: Box, sound: bool = False) -> Box:
    return Box(-box.center, box.radius)


def subtract(one: Any, other: Any, *, alpha: float = 1, sound: bool = False) -> Box:
    if alpha != 1:
        raise NotImplementedError("no interval rule for sub with alpha")
    like = one if isinstance(one, Box) else other
    one, other = _as_box(one, like), _as_box(other, like)
    return _sum(one.center - other.center, one.radius + other.radius, sound)


def _scaled(box: Box, scale: Any, function: Callable[..., Tensor], sound: bool) -> Box:
    """The box times or divided by what is no box: a tensor, or a number that is rounded to its dtype."""
    magnitude = scale.abs() if isinstance(scale, Tensor) else abs(scale)
    center, radius = function(box.center, scale), function(box.radius, magnitude)
    if not sound:
        return Box(center, radius)
    limits = torch.finfo(center.dtype)
    lost = next_above(2 * limits.eps * center.abs()) + limits.tiny
    return Box(center, next_above(next_above(radius * (1 + 4 * limits.eps) + limits.tiny) + lost))


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
        return to_box(function(lower), function(upper), False)
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
    return to_box(function(lowest), torch.maximum(function(lower), function(upper)), False)


def average(function: Callable[[Tensor], Tensor], box: Box, sound: bool = False) -> Box:
    """Of sums and averages, which no weight is negative in."""
    if not sound:
        return Box(function(box.center), function(box.radius))
    dtype, shape = box.center.dtype, box.center.shape
    center, radius = box.center.double(), box.radius.double()
    result = function(center)
    # No result has more terms than this.
    per_sample = result.shape[:1] == shape[:1] and shape[0] > 0
    terms = center.numel() // shape[0] if per_sample else center.numel()
    relative, absolute = rounding_of(terms, torch.float64)
    covered = next_above(radius + next_above(relative * center.abs()))
    grown = next_above(function(covered) + absolute)
    made = Box(result, next_above(grown * (1 + 3 * relative)))
    return Box(*of_two(made, dtype, True))
