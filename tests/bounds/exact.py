"""Boxes in exact rational arithmetic."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

Interval = tuple[Fraction, Fraction]


def fractions(tensor: Tensor) -> Any:
    """Nested lists of the exact numbers."""
    values = tensor.detach().double()
    assert torch.equal(values.to(tensor.dtype), tensor.detach())
    return [fractions(row) for row in values] if values.dim() else Fraction(values.item())


def linear(box: list[Interval], weight: Tensor, bias: Tensor | None) -> list[Interval]:
    """The exact image of a box in one linear layer."""
    shifts = [Fraction(0)] * len(weight) if bias is None else fractions(bias)
    results = []
    for row, shift in zip(fractions(weight), shifts, strict=True):
        lower = upper = shift
        for w, (low, high) in zip(row, box, strict=True):
            lower += w * (low if w > 0 else high)
            upper += w * (high if w > 0 else low)
        results.append((lower, upper))
    return results


def relu(box: list[Interval]) -> list[Interval]:
    return [(max(low, Fraction(0)), max(high, Fraction(0))) for low, high in box]


def network(model: nn.Sequential, box: list[Interval]) -> list[Interval]:
    """The exact bounds of linear layers and ReLU."""
    for layer in model:
        if isinstance(layer, nn.Linear):
            box = linear(box, layer.weight, layer.bias)
        else:
            assert isinstance(layer, nn.ReLU)
            box = relu(box)
    return box


def margins(
    box: list[Interval], weight: Tensor, bias: Tensor | None, target: int
) -> list[Fraction]:
    """The exact upper bounds of the differences to the target's output."""
    rows = fractions(weight)
    shifts = [Fraction(0)] * len(weight) if bias is None else fractions(bias)
    results = []
    for row, shift in zip(rows, shifts, strict=True):
        upper = shift - shifts[target]
        for w, of_target, (low, high) in zip(row, rows[target], box, strict=True):
            upper += max((w - of_target) * low, (w - of_target) * high)
        results.append(upper)
    return results


def intervals(center: Tensor, radius: Tensor) -> list[Interval]:
    """A row of boxes as exact intervals."""
    pairs = zip(fractions(center), fractions(radius), strict=True)
    return [(c - r, c + r) for c, r in pairs]


def contains(outer: list[Interval], inner: list[Interval]) -> bool:
    return all(a <= c and d <= b for (a, b), (c, d) in zip(outer, inner, strict=True))
