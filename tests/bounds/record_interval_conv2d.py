"""The record of ``fusee.interval_conv2d``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fusee
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.bounds.layers import NO_NAN, layer_errors, make_box, relu_ends, stacked
from tests.harness.spec import Arguments, ErrorInput, Maker, OpSpec, Sample


def _oracle(
    center: Tensor,
    radius: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: Any = 0,
    dilation: int = 1,
    groups: int = 1,
    relu: bool = False,
) -> Tensor:
    options = (stride, padding, dilation, groups)
    box = F.conv2d(center, weight, bias, *options), F.conv2d(radius, weight.abs(), None, *options)
    return relu_ends(*box) if relu else torch.stack(box)


def _call(
    make: Maker,
    images: tuple[int, int, int, int],
    outputs: int,
    kernel: tuple[int, int],
    bias: bool = False,
    **options: Any,
) -> Arguments:
    given = make_box(make, *images)
    inputs = images[1] // options.get("groups", 1)
    scale = (inputs * kernel[0] * kernel[1]) ** -0.5
    given["weight"] = make.normal(outputs, inputs, *kernel, scale=scale)
    return {**given, **options, **({"bias": make.normal(outputs)} if bias else {})}


def _samples(make: Maker) -> Iterator[Sample]:
    yield Sample("small", _call(make, (2, 1, 3, 3), 2, (2, 2)), tiny=True)
    relu = _call(make, (1, 2, 3, 2), 2, (2, 1), bias=True, relu=True, padding=1)
    yield Sample("bias and relu", relu, tiny=True)
    yield Sample("groups", _call(make, (1, 2, 2, 2), 2, (1, 1), groups=2, relu=True), tiny=True)
    yield Sample("no images", _call(make, (0, 2, 3, 3), 2, (2, 2), bias=True, relu=True), tiny=True)
    yield Sample("stride", _call(make, (2, 3, 9, 8), 4, (3, 3), bias=True, stride=2, padding=1))
    yield Sample("dilation", _call(make, (1, 3, 9, 9), 5, (3, 2), dilation=2, padding="same"))
    last = _call(make, (2, 4, 6, 5), 6, (3, 3), bias=True, relu=True, padding=(1, 0))
    for name in ("center", "radius"):
        last[name] = last[name].contiguous(memory_format=torch.channels_last)
    yield Sample("channels last", last)


def _error_inputs(make: Maker) -> Iterator[ErrorInput]:
    given = _call(make, (2, 2, 3, 3), 2, (2, 2), bias=True)
    yield from layer_errors(given, 4)
    box = {name: given[name][0] for name in ("center", "radius")}
    yield ErrorInput("one image", {**given, **box}, ValueError, "center must be")


RECORDS = [
    OpSpec(
        name="interval_conv2d",
        function=stacked(fusee.interval_conv2d),
        samples=_samples,
        error_inputs=_error_inputs,
        oracle=_oracle,
        sized=lambda make, n: _call(make, (n, 2, 3, 3), 2, (2, 2), bias=True, relu=True),
        batch_dims={"center": 0, "radius": 0},
        differentiable=("center", "radius", "weight", "bias"),
        raw={},
        engine_ulps=32.0,
        half_inside=True,
        autocast_dtype=lambda dtype, cast: dtype if dtype == torch.float64 else cast,
        not_applicable={
            **NO_NAN,
            "recompilations": "torch's own convolution chooses by the size of the batch",
            "export": "no operator of ours is in a program without ReLU",
            **dict.fromkeys(
                ("reference", "raw_inputs_unwritten", "opcheck", "engine_kernels"),
                "torch's convolutions, and the operator of interval_batch_norm",
            ),
            **dict.fromkeys(
                ("thread_count", "called_from_threads", "traffic", "cuda_kernels"),
                "torch's convolutions take the time and order the sums",
            ),
        },
    )
]
