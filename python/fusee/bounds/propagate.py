"""One pass of boxes through a model."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusee.bounds.boxes import Box, check_ends, check_pair, next_above, to_box, to_ends
from fusee.bounds.interval_margins import check_targets, margins_of
from fusee.bounds.interval_program import Programs
from fusee.bounds.rules import linear_module


class IntervalOutput(NamedTuple):
    """What :meth:`IntervalModel.propagate` returns."""

    lower: Tensor | None
    """Lower ends of the outputs, or None where margins were asked for."""
    upper: Tensor | None
    """Upper ends, likewise."""
    margins: Tensor | None
    """Upper bounds of each class's output minus that of the target (batch, classes), where a target was
    given; see :func:`fusee.interval_margins`."""
    output: Tensor | None
    """The model's output for ``input``, where that was given."""
    before_relu: tuple[tuple[Tensor, Tensor], ...]
    """``(center, radius)`` before each ReLU, where asked for."""


def propagate(
    programs: Programs,
    ends: Box,
    target: Tensor | None = None,
    input: Tensor | None = None,
    *,
    before_relu: bool = False,
    sound: bool = False,
) -> IntervalOutput:
    """:meth:`IntervalModel.propagate` of the model of some programs."""
    lower, upper = ends
    check_pair("lower", lower, "upper", upper)
    if sound and lower.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"sound bounds must be float32 or float64, got {lower.dtype}")
    if input is not None:
        check_pair("lower", lower, "input", input)
    check_ends(lower, upper)
    program = programs.program(clean=input is not None, collect=before_relu)
    points = () if input is None else (input,)
    box, output, boxes = program(to_box(lower, upper, sound), sound, *points)
    head: Any = programs.network().last_layer()
    kept = tuple((part.center, part.radius) for part in boxes)
    if target is None:
        last = box if head is None else linear_module(head, box, sound=sound)
        return IntervalOutput(*to_ends(last, sound), None, output, kept)
    if head is None:
        margins = _of_ends(*to_ends(box, sound), target, sound)
    else:
        weight = head.weight  # once, as a parametrisation may compute it
        check_targets(target, box.center.shape[:-1], weight.shape[0])
        margins = margins_of(box, weight, head.bias, target, sound)
    return IntervalOutput(None, None, margins, output, kept)


def _of_ends(lower: Tensor, upper: Tensor, target: Tensor, sound: bool) -> Tensor:
    """The bounds of differences that follow from those of the outputs."""
    if lower.dim() != 2:
        raise ValueError(f"margins need outputs (batch, classes), got shape {tuple(lower.shape)}")
    check_targets(target, lower.shape[:-1], lower.shape[-1])
    index = target.unsqueeze(-1)
    margins = upper - lower.gather(-1, index)
    margins = next_above(margins) if sound else margins
    return margins.scatter(-1, index, 0.0)
