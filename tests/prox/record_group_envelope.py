"""The record of ``fusee.group_envelope``. Values against other formulas are in
``test_group_envelope.py``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import fusee
import torch
from torch import Tensor

from tests.harness.spec import (
    Arguments,
    CudaKernel,
    ErrorInput,
    Maker,
    NanSample,
    OpSpec,
    Sample,
    Traffic,
)
from tests.prox.envelopes import envelope_oracle, shared_errors


def _given(make: Maker, *shape: int, k: Any = 2.5, **others: Any) -> Arguments:
    return {"input": make.normal(*shape), "k": make.tensor(k), **others}


def _samples(make: Maker) -> Iterator[Sample]:
    yield Sample("numbers", {"input": make.normal(5, 3), "k": 2}, tiny=True)
    one = {**_given(make, 5, 3), "k": make.tensor([1.5])}
    yield Sample("k of one element", one, tiny=True, emulated=False)
    count = {**_given(make, 6), "k": make.tensor(3, torch.int64)}
    yield Sample("k an integer tensor", count, tiny=True)
    for debiased in (False, True):
        for k in (0.5, 1.0, 2.5):
            arguments = _given(make, 7, k=k, debiased=debiased)
            name = f"single elements, {k=}, {debiased=}"
            yield Sample(name, arguments, tiny=True, emulated=k == 2.5)
        for dim in (0, 1, -1, (2, 1), (1, 2, 3), (0, 2), (0, 1, 2, 3)):
            arguments = _given(make, 3, 2, 2, 2, k=1.5, dim=dim, debiased=debiased)
            name, emulated = f"kernels, {dim=}, {debiased=}", dim in (1, (0, 2)) and not debiased
            yield Sample(name, arguments, tiny=True, emulated=emulated)
        for weights in ("size", "inverse_size", make.tensor([1.0, 0.5, 0.0, 2.0, 1.5])):
            name = weights if isinstance(weights, str) else "tensor"
            arguments = _given(make, 5, 3, weights=weights, debiased=debiased)
            emulated = name == "tensor"
            yield Sample(f"weights {name}, {debiased=}", arguments, tiny=True, emulated=emulated)
    yield Sample("one group", _given(make, 3, 2, k=0.5, dim=()), tiny=True)
    yield Sample("k past the groups", _given(make, 5, 3, k=9.0), tiny=True)
    for name, shape, dim in (
        ("scalar", (), 0),
        ("no groups", (0, 5), 0),
        ("empty groups", (4, 0), 0),
        ("nothing", (0,), ()),
    ):
        yield Sample(name, _given(make, *shape, k=0.5, dim=dim), tiny=True)
    zeros = _given(make, 6, 2, k=1.5)
    zeros["input"][1:3] = 0
    yield Sample("zero groups", zeros, tiny=True, smooth=False)
    for debiased in (False, True):
        for shape, dim in (((513,), 0), ((70, 33), 1), ((31, 5, 3, 3), (0, 1))):
            arguments = _given(make, *shape, k=20.0, dim=dim, debiased=debiased)
            yield Sample(f"{shape}, {dim=}, {debiased=}", arguments)
    wide = _given(make, 301, 40, k=100.0, weights=make.uniform(301, low=0.5, high=2.0))
    yield Sample("weights, larger", wide)
    long = _given(make, 3, 16500, k=1.5, weights="inverse_size")
    yield Sample("rows in several ranges", long)
    last = _given(make, 6, 4, 5, 7, k=2.0, dim=1)
    last["input"] = last["input"].contiguous(memory_format=torch.channels_last)
    yield Sample("channels last", last)


def _large(make: Maker) -> Iterator[Sample]:
    small = {"weights": "inverse_size"}  # so that half types can hold the value
    yield Sample("single elements", {**_given(make, 100001, k=25000.0), "debiased": True})
    yield Sample("rows", _given(make, 3001, 100, k=500.0, **small))
    yield Sample("columns", _given(make, 100, 3001, k=500.0, dim=1, **small))
    yield Sample("long rows", _given(make, 3, 100001, k=1.5, **small))


def _error_inputs(make: Maker) -> Iterator[ErrorInput]:
    yield from shared_errors({"input": make.normal(4, 3), "k": 2}, make)


def _nan_samples(make: Maker) -> Iterator[NanSample]:
    for debiased in (False, True):
        x = make.normal(1, 6)
        x[0, 3] = math.nan
        arguments = {"input": x, "k": 2.5, "dim": 1, "debiased": debiased}
        yield NanSample(arguments, torch.tensor(True, device=x.device))


# --- properties -----------------------------------------------------------------------------------


def _even(sample: Sample, output: Tensor) -> None:
    mirrored = fusee.group_envelope(**{**sample.arguments, "input": -sample.arguments["input"]})
    assert torch.equal(mirrored, output)


def _not_negative(sample: Sample, output: Tensor) -> None:
    """The debiased value is a difference."""
    size = sample.arguments["input"].double().square().sum()
    slack = 1e-15 * size.item() if sample.arguments.get("debiased") else 0.0
    assert output.item() >= -slack


# --- traffic --------------------------------------------------------------------------------------


def _bytes(arguments: Arguments) -> tuple[int, int]:
    """Forward reads the input and writes a norm for each group (of 4 bytes); backward reads the input
    and writes the gradient, and reads the norms where groups are not single elements."""
    x, dim = arguments["input"], arguments["dim"]
    size, groups = x.numel() * x.element_size(), 4 * x.shape[dim]
    return size + groups, 2 * size + (groups if x.dim() > 1 else 0)


def _of(*shape: int, dim: int = 0) -> Callable[[Maker], Arguments]:
    return lambda make: {**_given(make, *shape, k=shape[dim] / 4), "dim": dim}


_TRAFFIC = (
    Traffic("rows", _of(64, 768), (2, 2), _bytes),
    Traffic("rows in several ranges", _of(3, 40000), (2, 2), _bytes),
    Traffic("columns", _of(256, 32, 5, 5, dim=1), (2, 2), _bytes),
    Traffic("single elements", _of(4096), (1, 1), _bytes),
)
# The kernels of the root and of the slopes work on norms, a number for each group.
KERNELS = (
    CudaKernel("^row_products_kernel<", stores=False),
    CudaKernel("^short_row_products_kernel<", stores=False),
    CudaKernel("^column_products_kernel<", stores=False),
    CudaKernel("^envelope_gradient_kernel<"),
    CudaKernel("^envelope_single_gradient_kernel<"),
)


def _sized(make: Maker, n: int) -> Arguments:
    return {**_given(make, n, 7), "k": make.tensor([2.5])}


RECORDS = [
    OpSpec(
        name="group_envelope",
        function=fusee.group_envelope,
        samples=_samples,
        large=_large,
        error_inputs=_error_inputs,
        oracle=envelope_oracle,
        sized=_sized,
        batch_dims={"input": 0},
        differentiable=("input", "k"),
        raw={"group_envelope": (0, 2), "group_envelope_backward": (0, 1, 2, 3)},
        autocast_dtype=lambda dtype, cast: dtype,
        properties={"even": _even, "not negative": _not_negative},
        nan_samples=_nan_samples,
        not_batched=("weights",),
        traffic=_TRAFFIC,
        cuda_kernels=KERNELS,
        # The debiased value is a difference of two sums.
        engine_ulps=8.0,
        least_scale=1.0,
    )
]
