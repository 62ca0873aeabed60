"""The records of ``fusee.interval_relu`` and ``fusee.interval_batch_norm``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fusee
import torch
from torch import Tensor

from tests.bounds.layers import NO_NAN, box_errors, make_box, relu_ends, stacked
from tests.harness.spec import Arguments, CudaKernel, ErrorInput, Maker, OpSpec, Sample, Traffic


def _relu_samples(make: Maker) -> Iterator[Sample]:
    for shape in ((5,), (2, 3), (), (0,), (2, 0, 3), (1, 2, 2, 2)):
        yield Sample(f"shape {shape}", make_box(make, *shape), tiny=True)
    yield Sample("long", make_box(make, 3, 1025))
    exact = make.tensor([[1.0, -1.0, 0.0, 0.0, 3.0, 2.0]])
    ends = {"center": exact, "radius": make.tensor([[1.0, 1.0, 0.0, 2.0, 0.0, 5.0]])}
    yield Sample("ends at zero", ends, smooth=False)


def _relu_large(make: Maker) -> Iterator[Sample]:
    yield Sample("many", make_box(make, 70000))


def _relu_traffic(make: Maker) -> Arguments:
    return make_box(make, 16, 512)


def _relu_bytes(arguments: Arguments) -> tuple[int, int]:
    """Both are read and written; backward reads both results, both gradients, and writes two."""
    n, size = arguments["center"].numel(), arguments["center"].element_size()
    return 4 * n * size, 6 * n * size


RELU = OpSpec(
    name="interval_relu",
    function=stacked(fusee.interval_relu),
    samples=_relu_samples,
    error_inputs=lambda make: box_errors(make_box(make, 3, 4)),
    oracle=relu_ends,
    sized=lambda make, n: make_box(make, n, 3),
    batch_dims={"center": 0, "radius": 0},
    differentiable=("center", "radius"),
    raw={"interval_affine": (0, 1, 2, 3), "interval_affine_backward": (0, 1, 2, 3, 4)},
    large=_relu_large,
    traffic=(Traffic("elements", _relu_traffic, (1, 1), _relu_bytes),),
    cuda_kernels=(CudaKernel(r"\bby_channel<"), CudaKernel(r"\bby_column<(2|4|8),")),
    not_applicable=NO_NAN,
    autocast_dtype=lambda dtype, cast: dtype,
)


def _norm_oracle(
    center: Tensor,
    radius: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    relu: bool = False,
) -> Tensor:
    shape = (-1, *[1] * (center.dim() - 2))
    scale = 1 / (var + eps).sqrt()
    scale = (scale if weight is None else scale * weight).view(shape)
    moved = (center - mean.view(shape)) * scale
    box = moved if bias is None else moved + bias.view(shape), scale.abs() * radius
    return relu_ends(*box) if relu else torch.stack(box)


def _norm(make: Maker, shape: tuple[int, ...], affine: bool, relu: bool) -> Arguments:
    channels = shape[1]
    given = {**make_box(make, *shape), "relu": relu}
    given |= {"mean": make.normal(channels), "var": make.uniform(channels, low=0.5, high=2.0)}
    if affine:
        given |= {"weight": make.normal(channels), "bias": make.normal(channels)}
    return given


def _norm_samples(make: Maker) -> Iterator[Sample]:
    yield Sample("features", _norm(make, (3, 2), True, False), tiny=True)
    yield Sample("relu", _norm(make, (2, 3), True, True), tiny=True)
    yield Sample("images", _norm(make, (2, 2, 1, 3), False, True), tiny=True)
    yield Sample("no rows", _norm(make, (0, 2, 3), True, True), tiny=True)
    yield Sample("more images", _norm(make, (3, 5, 7, 6), True, True))
    yield Sample("many channels", _norm(make, (17, 130), True, False))
    last = _norm(make, (2, 6, 5, 4), True, True)
    for name in ("center", "radius"):
        last[name] = last[name].contiguous(memory_format=torch.channels_last)
    yield Sample("channels last", last)


def _norm_errors(make: Maker) -> Iterator[ErrorInput]:
    given = _norm(make, (3, 2), True, True)
    yield from box_errors(given)

    def error(name: str, match: str, **changed: Any) -> ErrorInput:
        return ErrorInput(name, {**given, **changed}, ValueError, match)

    for name in ("mean", "var", "weight", "bias"):
        yield error(f"{name} too short", f"{name} must have shape", **{name: given[name][1:]})
    box = {name: given[name][0] for name in ("center", "radius")}
    yield error("no channels", "center must have at least two dimensions", **box)


def _norm_large(make: Maker) -> Iterator[Sample]:
    yield Sample("images", _norm(make, (9, 7, 33, 35), True, True))
    yield Sample("features", _norm(make, (600, 130), True, True))


NORM = OpSpec(
    name="interval_batch_norm",
    function=stacked(fusee.interval_batch_norm),
    samples=_norm_samples,
    error_inputs=_norm_errors,
    oracle=_norm_oracle,
    sized=lambda make, n: _norm(make, (n, 3), True, True),
    batch_dims={"center": 0, "radius": 0},
    differentiable=("center", "radius", "mean", "var", "weight", "bias"),
    raw={"interval_affine": (0, 1, 2, 3), "interval_affine_backward": (0, 1, 2, 3, 4)},
    large=_norm_large,
    engine_ulps=16.0,
    half_inside=True,
    least_scale=1.0,
    not_applicable={
        **NO_NAN,
        **dict.fromkeys(("traffic", "cuda_kernels"), "the kernels are those of interval_relu"),
    },
    autocast_dtype=lambda dtype, cast: dtype,
)

RECORDS = [RELU, NORM]
