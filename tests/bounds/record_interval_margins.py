"""The record of ``fusee.interval_margins``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fusee
import torch
from torch import Tensor

from tests.bounds.layers import NO_NAN, layer_errors, make_box
from tests.harness.spec import Arguments, ErrorInput, Maker, OpSpec, Sample


def _oracle(
    center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor
) -> Tensor:
    differences = weight - weight[target].unsqueeze(-2)
    margins = (differences * center.unsqueeze(-2)).sum(-1)
    margins = margins + (differences.abs() * radius.unsqueeze(-2)).sum(-1)
    return margins if bias is None else margins + bias - bias[target].unsqueeze(-1)


def _call(make: Maker, shape: tuple[int, ...], n: int, k: int, bias: bool = False) -> Arguments:
    given = make_box(make, *shape, k)
    given["weight"] = make.normal(n, k, scale=max(k, 1) ** -0.5)
    given["bias"] = make.normal(n) if bias else None
    return {**given, "target": make.integers(n, *shape)}


def _samples(make: Maker) -> Iterator[Sample]:
    yield Sample("small", _call(make, (3,), 4, 5), tiny=True)
    yield Sample("bias", _call(make, (4,), 3, 2, bias=True), tiny=True)
    yield Sample("one box", _call(make, (), 2, 3, bias=True), tiny=True)
    yield Sample("leading dimensions", _call(make, (2, 1, 2), 3, 2, bias=True), tiny=True)
    yield Sample("one class", _call(make, (2,), 1, 3, bias=True), tiny=True)
    yield Sample("no rows", _call(make, (0,), 2, 3, bias=True), tiny=True)
    yield Sample("no inputs", _call(make, (2,), 3, 0, bias=True), tiny=True)
    for rows, n, k in ((1, 10, 130), (9, 10, 64), (33, 21, 17)):
        yield Sample(f"{rows} x {k} to {n}", _call(make, (rows,), n, k, bias=True))
    same = _call(make, (5,), 4, 6)
    same["weight"][1] = same["weight"][0]
    yield Sample("equal rows", same, smooth=False)


def _error_inputs(make: Maker) -> Iterator[ErrorInput]:
    given = _call(make, (3,), 4, 2, bias=True)
    yield from layer_errors(given, 2)

    def error(name: str, kind: type[Exception], match: str, value: Any) -> ErrorInput:
        return ErrorInput(name, {**given, "target": value}, kind, match)

    target = given["target"]
    yield error("target not a tensor", TypeError, "target must be a Tensor", 1)
    yield error("target of floats", TypeError, "target must have dtype int64", target.float())
    yield error("target's shape", ValueError, "target must have shape", target[1:])
    for name, value in (("negative", -1), ("too large", 4)):
        changed = target.clone()
        changed[1] = value
        arguments = {**given, "target": changed}
        yield ErrorInput(f"{name} target", arguments, IndexError, "target must be in", values=True)


def _large(make: Maker) -> Iterator[Sample]:
    yield Sample("rows", _call(make, (300,), 10, 64, bias=True))
    yield Sample("classes", _call(make, (20,), 200, 40, bias=True))


def _target_is_zero(sample: Sample, output: Tensor) -> None:
    if output.numel():
        of_target = output.gather(-1, sample.arguments["target"].unsqueeze(-1))
        assert bool((of_target == 0).all())


RECORDS = [
    OpSpec(
        name="interval_margins",
        function=fusee.interval_margins,
        samples=_samples,
        error_inputs=_error_inputs,
        oracle=_oracle,
        sized=lambda make, n: _call(make, (n,), 4, 3, bias=True),
        batch_dims={"center": 0, "radius": 0, "target": 0},
        differentiable=("center", "radius", "weight", "bias"),
        raw={
            "interval_margins": (0, 1, 2, 3),
            "interval_margins_backward": (0, 1, 2, 3),
        },
        large=_large,
        properties={"target is zero": _target_is_zero},
        engine_ulps=32.0,
        half_inside=True,
        least_scale=1.0,
        not_applicable={
            **NO_NAN,
            **dict.fromkeys(
                ("traffic", "cuda_kernels"),
                "the weight is read again for each row, from the nearest cache that holds it",
            ),
        },
        autocast_dtype=lambda dtype, cast: dtype if dtype == torch.float64 else cast,
    )
]
