"""The record of ``fusee.interval_linear``."""

from __future__ import annotations

from collections.abc import Iterator

import fusee
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.bounds.layers import NO_NAN, layer_errors, make_box, relu_ends, stacked
from tests.harness.spec import Arguments, CudaKernel, ErrorInput, Maker, OpSpec, Sample, Traffic


def _oracle(
    center: Tensor,
    radius: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    box = F.linear(center, weight, bias), F.linear(radius, weight.abs())
    return relu_ends(*box) if relu else torch.stack(box)


def _call(
    make: Maker, shape: tuple[int, ...], n: int, k: int, bias: bool = False, relu: bool = False
) -> Arguments:
    given = make_box(make, *shape, k)
    given["weight"] = make.normal(n, k, scale=max(k, 1) ** -0.5)
    return {**given, "relu": relu, **({"bias": make.normal(n)} if bias else {})}


def _samples(make: Maker) -> Iterator[Sample]:
    yield Sample("small", _call(make, (3,), 4, 5), tiny=True)
    yield Sample("bias and relu", _call(make, (4,), 3, 2, bias=True, relu=True), tiny=True)
    yield Sample("one box", _call(make, (), 2, 3, relu=True), tiny=True)
    yield Sample("leading dimensions", _call(make, (2, 1, 2), 3, 2, bias=True), tiny=True)
    yield Sample("no rows", _call(make, (0,), 2, 3, bias=True), tiny=True)
    yield Sample("no inputs", _call(make, (2,), 3, 0, bias=True, relu=True), tiny=True)
    yield Sample("no outputs", _call(make, (2,), 0, 3), tiny=True)
    for rows, n, k in (
        (1, 33, 130),
        (2, 70, 64),
        (5, 16, 17),
        (17, 40, 24),
        (70, 9, 65),
        (33, 65, 8),
    ):
        bias, relu = rows % 2 == 1, rows > 4
        yield Sample(f"{rows} x {k} to {n}", _call(make, (rows,), n, k, bias, relu))
    pruned = _call(make, (6,), 8, 12, bias=True)
    pruned["weight"][::2] = 0
    yield Sample("weights of zero", pruned, smooth=False)
    point = _call(make, (3,), 4, 5, bias=True)
    yield Sample("a point", {**point, "radius": torch.zeros_like(point["radius"])}, smooth=False)


def _error_inputs(make: Maker) -> Iterator[ErrorInput]:
    yield from layer_errors(_call(make, (3,), 4, 2, bias=True), 2)


def _large(make: Maker) -> Iterator[Sample]:
    yield Sample("rows", _call(make, (600,), 48, 64, bias=True, relu=True))
    yield Sample("outputs", _call(make, (3,), 2000, 64))
    yield Sample("inputs", _call(make, (40,), 96, 1100, bias=True))


def _sized(make: Maker, n: int) -> Arguments:
    return _call(make, (n,), 4, 3, bias=True, relu=True)


def _bytes(arguments: Arguments) -> tuple[int, int]:
    """Forward reads three and writes two. Backward has two kernels, as the gradient of the weight needs
    all rows: one reads both gradients and the weight and writes the box's, the other reads both
    gradients, the box and the weight and writes the weight's. With ReLU one before them reads both
    gradients and results, and writes the gradients of what went into it, and of the bias."""
    c, w = arguments["center"], arguments["weight"]
    inputs, weights = 2 * c.numel(), w.numel()
    outputs = 2 * c.shape[0] * w.shape[0]
    bias = w.shape[0] if "bias" in arguments else 0
    of_relu = 3 * outputs if arguments["relu"] else 0
    forward = inputs + weights + outputs + bias
    backward = 2 * inputs + 3 * weights + 2 * outputs + of_relu + bias
    return c.element_size() * forward, c.element_size() * backward


def _traffic(make: Maker) -> Arguments:
    return _call(make, (32,), 32, 32)


def _with_relu(make: Maker) -> Arguments:
    return _call(make, (32,), 32, 32, bias=True, relu=True)


def _contains(sample: Sample, output: Tensor) -> None:
    """Corners of the box go to points within the result, up to rounding."""
    given = {**sample.arguments}
    center, radius, weight = (given[name].double() for name in ("center", "radius", "weight"))
    bias = given.get("bias")
    image = output[0].double(), output[1].double()
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, center.shape, generator=generator).to(center) * 2 - 1
    point = F.linear(center + signs * radius, weight, None if bias is None else bias.double())
    point = point.relu() if given["relu"] else point
    slack = 64 * torch.finfo(output.dtype).eps * (1 + image[0].abs() + image[1])
    assert ((point - image[0]).abs() <= image[1] + slack).all()


RECORDS = [
    OpSpec(
        name="interval_linear",
        function=stacked(fusee.interval_linear),
        samples=_samples,
        error_inputs=_error_inputs,
        oracle=_oracle,
        sized=_sized,
        batch_dims={"center": 0, "radius": 0},
        differentiable=("center", "radius", "weight", "bias"),
        raw={
            "interval_linear": (0, 1, 2, 3),
            "interval_linear_backward": (0, 1, 2, 3, 4),
        },
        large=_large,
        properties={"contains": _contains},
        traffic=(
            Traffic("rows", _traffic, (1, 2), _bytes),
            Traffic("ReLU and bias", _with_relu, (1, 3), _bytes),
        ),
        cuda_kernels=(
            CudaKernel(r"\bbox_product<", tensor_cores=r"BoxProduct<(BFloat16|Half|Tf32),"),
            CudaKernel(r"\bfew_boxes<", stores=False),
        ),
        engine_ulps=32.0,
        not_applicable=NO_NAN,
        half_inside=True,
        autocast_dtype=lambda dtype, cast: dtype if dtype == torch.float64 else cast,
    )
]
