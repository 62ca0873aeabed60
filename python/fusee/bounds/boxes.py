"""Boxes: their two forms, and rounding that never loses a point."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusee._checks import accumulate_dtype, check_floating, check_same_device, require_values

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Box(NamedTuple):
    """All x with |x - center| <= radius."""

    center: Tensor
    radius: Tensor


def next_above(x: Tensor) -> Tensor:
    """The next number above x, with the derivative of x; infinity and NaN stay."""
    value = x.detach()
    bits = (value + 0).view(_BITS[x.element_size()])
    stepped = torch.where(value < 0, bits - 1, bits + 1).view(x.dtype)
    step = torch.where(value.isfinite(), stepped - value, 0)
    return x + step


def next_below(x: Tensor) -> Tensor:
    """The next number below x, likewise."""
    return -next_above(-x)


def rounding_of(terms: int, dtype: torch.dtype) -> tuple[float, float]:
    """How far a sum of so many products in ``dtype``, in any order, may be from the exact one: relative
    to the sum of their magnitudes, and absolutely where the smallest are lost."""
    limits = torch.finfo(dtype)
    n = terms + 3
    lost = n * limits.eps / 2
    relative = lost / (1 - lost) * (1 + 2**-20) if lost < 0.25 else float("inf")
    return relative, 2 * n * limits.tiny


def box_relu(box: Box, sound: bool) -> Box:
    """ReLU at both ends. Where zero lies inside, center and radius come out equal, to the bit."""
    center, radius = box
    upper = center + radius
    half = next_above(0.5 * next_above(upper)) if sound else 0.5 * upper
    crossing = torch.where(upper <= 0, 0, half)
    active = center - radius > 0
    return Box(torch.where(active, center, crossing), torch.where(active, radius, crossing))


def box_relu_gradient(result: Box, grad: Box) -> Box:
    """The gradient of :func:`box_relu`, of its result and the gradient there. NaN lets them through."""
    active = ~(result.center - result.radius <= 0)
    crossing = result.center + result.radius > 0
    half = torch.where(crossing, 0.5 * (grad.center + grad.radius), 0)
    return Box(torch.where(active, grad.center, half), torch.where(active, grad.radius, half))


def checked_box(center: Tensor, radius: Tensor) -> Box:
    """The box with NaN for what is no radius, negative or infinite."""
    valid = (radius >= 0) & (radius < torch.inf)
    return Box(torch.where(valid, center, torch.nan), torch.where(valid, radius, torch.nan))


def of_two(result: Box, dtype: torch.dtype, sound: bool) -> tuple[Tensor, Tensor]:
    """A box in the dtype of the tensors; where sound, with the radius that its center then needs."""
    center = result.center.to(dtype)
    if not sound or dtype == result.center.dtype:
        return center, result.radius.to(dtype)
    moved = (result.center - center.to(result.center.dtype)).abs()
    needed = torch.where(moved > 0, next_above(result.radius + moved), result.radius)
    radius = needed.to(dtype)
    return center, torch.where(radius.to(needed.dtype) < needed, next_above(radius), radius)


def check_pair(name: str, first: Any, other_name: str, other: Any) -> None:
    """Raises unless both are floating tensors of one shape, dtype and device."""
    check_floating(name, first)
    check_floating(other_name, other)
    if other.shape != first.shape:
        raise ValueError(
            f"{other_name} must have the shape of {name} {tuple(first.shape)}, got "
            f"{tuple(other.shape)}"
        )
    if other.dtype != first.dtype:
        raise TypeError(
            f"{other_name} must have the dtype of {name} {first.dtype}, got {other.dtype}"
        )
    check_same_device(other_name, other, name, first)


def check_radius(radius: Tensor) -> bool:
    """Raises ValueError for radii that are negative or infinite, where values are read; returns whether
    they were."""
    if radius.numel() == 0:
        return True

    def violations() -> Tensor:
        least, most = torch.aminmax(radius)
        return (least < 0) | (most == torch.inf)

    def fail() -> None:
        raise ValueError(
            f"radius must be finite and not negative, got values from {radius.min().item()} to "
            f"{radius.max().item()}"
        )

    return require_values(radius, violations, fail)


def check_ends(lower: Tensor, upper: Tensor) -> None:
    """Raises ValueError for ends that are infinite or out of order, where values are read."""

    def violations() -> Tensor:
        return (lower > upper).sum() + lower.isinf().sum() + upper.isinf().sum()

    def fail() -> None:
        crossed = int((lower > upper).sum())
        if crossed:
            raise ValueError(f"lower must not be above upper, but is at {crossed} elements")
        raise ValueError("lower and upper must be finite, got infinite values")

    require_values(lower, violations, fail)


def to_box(lower: Tensor, upper: Tensor, sound: bool) -> Box:
    """:func:`center_radius` without checks."""
    if not sound:
        center, radius = 0.5 * lower + 0.5 * upper, 0.5 * upper - 0.5 * lower
        return Box(center, torch.where(radius < 0, torch.nan, radius))
    # Two halves may lose a bit each where they are subnormal; what the center is does not matter.
    center = 0.5 * lower + 0.5 * upper
    radius = next_above(torch.maximum(upper - center, center - lower))
    return Box(center, torch.where(upper < lower, torch.nan, radius))


def to_ends(box: Box, sound: bool) -> tuple[Tensor, Tensor]:
    """:func:`lower_upper` without checks."""
    lower, upper = box.center - box.radius, box.center + box.radius
    return (next_below(lower), next_above(upper)) if sound else (lower, upper)


def center_radius(lower: Tensor, upper: Tensor, *, sound: bool = False) -> tuple[Tensor, Tensor]:
    """The center and the radius of the box between two ends.

    Args:
        lower, upper: the ends, of one shape, dtype and device, ``lower <= upper``; float32, float64,
            bfloat16 or float16, in any unit.
        sound: whether the box of the results must contain both ends whatever the rounding. By default
            each end may be off by a unit in its last place.

    Returns:
        ``(center, radius)``, each of the shape and dtype of ``lower``.

    Raises:
        TypeError: an argument is not a dense floating-point tensor, or the dtypes differ.
        ValueError: shapes or devices differ; an end is infinite, or ``lower`` above ``upper`` (on CUDA
            and under compile such elements come back NaN). NaN goes through as NaN.

    Example:
        >>> import torch, fusee
        >>> fusee.center_radius(torch.tensor([0.0, -1.0]), torch.tensor([1.0, 3.0]))
        (tensor([0.5000, 1.0000]), tensor([0.5000, 2.0000]))
    """
    check_pair("lower", lower, "upper", upper)
    check_ends(lower, upper)
    center, radius = to_box(lower, upper, sound)
    return center, radius


def lower_upper(center: Tensor, radius: Tensor, *, sound: bool = False) -> tuple[Tensor, Tensor]:
    """The ends of a box, ``center - radius`` and ``center + radius``.

    Args:
        center, radius: of one shape, dtype and device; float32, float64, bfloat16 or float16.
        sound: whether to round outward, by one unit in the last place. By default an end is rounded to
            the nearest number.

    Returns:
        ``(lower, upper)``, each of the shape and dtype of ``center``.

    Raises:
        TypeError: an argument is not a dense floating-point tensor, or the dtypes differ.
        ValueError: shapes or devices differ; a radius is negative or infinite (on CUDA and under compile
            such elements come back NaN).

    Example:
        >>> import torch, fusee
        >>> fusee.lower_upper(torch.tensor([0.5, 1.0]), torch.tensor([0.5, 2.0]))
        (tensor([ 0., -1.]), tensor([1., 3.]))
    """
    check_pair("center", center, "radius", radius)
    check_radius(radius)
    return to_ends(checked_box(center, radius), sound)


def in_accumulate_dtype(*tensors: Tensor | None) -> list[Any]:
    """The tensors in the dtype in which half types are summed."""
    return [t if t is None else t.to(accumulate_dtype(t.dtype)) for t in tensors]
