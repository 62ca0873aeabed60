"""The record of ``fusee.prox_group_envelope``. Optimality is in ``test_prox_group_envelope.py``, metrics
of elements in ``test_prox_metric.py``."""

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
from tests.prox.envelopes import (
    groups_of,
    number_errors,
    prox_oracle,
    shared_errors,
    weights_of,
)


def _given(make: Maker, *shape: int, k: Any = 2.5, lam: Any = 0.25, **others: Any) -> Arguments:
    """k and lam as tensors, with gradients."""
    numbers = {"k": make.tensor(k), "lam": make.tensor(lam)}
    return {"input": make.normal(*shape), **numbers, **others}


def _samples(make: Maker) -> Iterator[Sample]:
    plain = {"input": make.normal(5, 3), "k": 2, "lam": 0.3}
    yield Sample("numbers", plain, tiny=True)
    yield Sample("filters", _given(make, 5, 3), tiny=True)
    yield Sample("debiased", _given(make, 5, 3, debiased=True), tiny=True)
    one = {**_given(make, 5, 3), "k": make.tensor([1.5]), "lam": make.tensor([0.5])}
    yield Sample("tensors of one element", one, tiny=True, emulated=False)
    count = {**_given(make, 6), "k": make.tensor(3, torch.int64)}
    yield Sample("k an integer tensor", count, tiny=True)
    for k in (0.5, 1.25, 3.0):
        for debiased in (False, True):
            arguments = _given(make, 7, k=k, lam=0.5, debiased=debiased)
            name = f"single elements, {k=}, {debiased=}"
            yield Sample(name, arguments, tiny=True, emulated=k == 1.25)
    for dim in (0, 1, -1, (2, 1), (1, 2, 3), (0, 2), (), (0, 1, 2, 3)):
        arguments = _given(make, 3, 2, 2, 2, k=1.5, dim=dim)
        yield Sample(f"kernels, {dim=}", arguments, tiny=True, emulated=dim in (1, (0, 2)))
    for weights in ("size", "inverse_size", make.tensor([1.0, 0.5, 0.0, 2.0, 1.5])):
        name = weights if isinstance(weights, str) else "tensor"
        for debiased in (False, True):
            arguments = _given(make, 5, 3, weights=weights, debiased=debiased)
            if debiased:
                arguments["lam"] = 0.25
            emulated = name == "tensor" and debiased
            yield Sample(f"weights {name}, {debiased=}", arguments, tiny=True, emulated=emulated)
        metric = make.uniform(5, low=0.75, high=2.0)
        arguments = _given(make, 5, 3, weights=weights, metric=metric)
        yield Sample(f"weights {name}, metric", arguments, tiny=True, emulated=name == "tensor")
    for debiased in (False, True):
        metric = make.uniform(2, 3, low=0.75, high=2.0)
        arguments = _given(make, 2, 3, metric=metric, dim=(0, 1), debiased=debiased)
        name = f"metric of single elements, {debiased=}"
        yield Sample(name, arguments, tiny=True, emulated=not debiased)
    for name, changes in (
        ("k past the groups", {"k": 9.0}),
        ("k past the groups, debiased", {"k": 9.0, "debiased": True}),
        ("projection", {"lam": 2.0, "debiased": True}),
        ("k zero", {"k": 0.0}),
        ("k negative", {"k": -1.0}),
    ):
        arguments = _given(make, 5, 3, **changes)
        emulated = name in ("projection", "k zero")
        yield Sample(name, arguments, tiny=True, smooth=name != "k zero", emulated=emulated)
    for name, shape, dim in (
        ("scalar", (), 0),
        ("one element", (1,), 0),
        ("no groups", (0, 5), 0),
        ("empty groups", (4, 0), 0),
        ("nothing", (0,), ()),
    ):
        arguments = _given(make, *shape, dim=dim)
        # The oracle has no Jacobian without elements.
        yield Sample(name, arguments, tiny=True, smooth=name not in ("empty groups", "nothing"))
    zeros = _given(make, 6, 2, k=1.5)
    zeros["input"][1:3] = 0
    yield Sample("zero groups", zeros, tiny=True)
    few = _given(make, 6, 2, k=4.5)
    few["input"][1:4] = 0
    yield Sample("few groups", few, tiny=True, smooth=False)
    nothing = {"input": make.normal(5, 3), "k": 2, "lam": 0.0}
    yield Sample("lam zero", nothing, tiny=True)
    for debiased in (False, True):
        for shape, dim in (((513,), 0), ((70, 33), 1), ((31, 5, 3, 3), (0, 1))):
            # Numbers: the gradients in k and lam are sums that cancel, in the tiny samples less.
            arguments = {"input": make.normal(*shape), "k": 20.0, "lam": 0.25}
            arguments |= {"dim": dim, "debiased": debiased}
            yield Sample(f"{shape}, {dim=}, {debiased=}", arguments)
    wide = {"input": make.normal(301, 40), "k": 100.0, "lam": 0.25}
    wide["weights"] = make.uniform(301, low=0.5, high=2.0)
    yield Sample("weights, larger", wide)
    long = {"input": make.normal(3, 16500), "k": 1.5, "lam": 0.25, "weights": "inverse_size"}
    yield Sample("rows in several ranges", long)
    last = _given(make, 6, 4, 5, 7, k=2.0, dim=1)
    last["input"] = last["input"].contiguous(memory_format=torch.channels_last)
    yield Sample("channels last", last)


def _large(make: Maker) -> Iterator[Sample]:
    yield Sample("single elements", _given(make, 200001, k=50000.0))
    yield Sample("rows", _given(make, 3001, 100, k=500.0, debiased=True))
    yield Sample("columns", _given(make, 100, 3001, k=500.0, dim=1))
    yield Sample("long rows", _given(make, 3, 100001, k=1.5, weights="inverse_size"))


def _error_inputs(make: Maker) -> Iterator[ErrorInput]:
    given = {"input": make.normal(4, 3), "k": 2, "lam": 0.5}
    yield from shared_errors(given, make)
    yield from number_errors("lam", given, make)
    yield ErrorInput("lam nan", {**given, "lam": math.nan}, ValueError, "lam must not be negative")
    yield ErrorInput("lam -1", {**given, "lam": -1.0}, ValueError, "lam must not be negative")
    negative = {**given, "lam": make.tensor(-0.5)}
    message = "lam must be not negative, got -0.5"
    yield ErrorInput("lam negative", negative, ValueError, message, values=True)
    for bad in (1.0, "size"):
        yield ErrorInput(f"metric {bad}", {**given, "metric": bad}, TypeError, "metric must be a")
    for shape in ((), (3,), (3, 4), (4, 1)):
        wrong = {**given, "metric": make.uniform(*shape)}
        yield ErrorInput(f"metric {shape}", wrong, ValueError, r"metric must have shape \(4,\)")
    for value in (0.0, -1.0, math.nan, math.inf):
        message = "metric must be positive and finite, got"
        wrong = {**given, "metric": make.tensor([1.0, value, 1.0, 1.0])}
        yield ErrorInput(f"metric of {value}", wrong, ValueError, message, values=True)


def _nan_samples(make: Maker) -> Iterator[NanSample]:
    for others in ({}, {"debiased": True}, {"debiased": True, "lam": 3.0}):
        x = make.normal(1, 6)
        x[0, 3] = math.nan
        arguments = {"input": x, "k": 2.5, "lam": 0.25, "dim": 1, **others}
        yield NanSample(arguments, torch.ones_like(x, dtype=torch.bool))


# --- properties -----------------------------------------------------------------------------------


def _odd(sample: Sample, output: Tensor) -> None:
    mirrored = fusee.prox_group_envelope(
        **{**sample.arguments, "input": -sample.arguments["input"]}
    )
    assert torch.equal(mirrored, -output)


def _shrinks(sample: Sample, output: Tensor) -> None:
    """Nothing grows, but for the rounding of a scale, or changes its sign."""
    x = sample.arguments["input"]
    slack = 1 + 8 * torch.finfo(x.dtype).eps
    assert bool((output.double().abs() <= x.double().abs() * slack).all())
    assert bool((output * x >= 0).all())


def _enough_groups(sample: Sample, output: Tensor) -> None:
    """At least as many groups survive as are free."""
    arguments = sample.arguments
    dim = arguments.get("dim", 0)
    before, after = (groups_of(x, dim)[0] for x in (arguments["input"], output))
    counted = weights_of(arguments.get("weights"), before.double()) > 0
    nonzero = ((before != 0).any(1) & counted).sum().item()
    free = min(math.floor(max(float(arguments["k"]), 0)), nonzero)
    assert ((after != 0).any(1) & counted).sum().item() >= free


# --- traffic --------------------------------------------------------------------------------------


def _bytes(arguments: Arguments) -> tuple[int, int]:
    """Nothing can be scaled before all norms are known, so forward reads the input twice, writes the
    result and a norm for each group (of 4 bytes); backward reads the input and the gradient twice and
    writes the gradient, and reads the norms where groups are not single elements."""
    x, dim = arguments["input"], arguments["dim"]
    size, groups = x.numel() * x.element_size(), 4 * x.shape[dim]
    return 3 * size + groups, 5 * size + (groups if x.dim() > 1 else 0)


def _of(*shape: int, dim: int = 0) -> Callable[[Maker], Arguments]:
    return lambda make: {**_given(make, *shape, k=shape[dim] / 4), "dim": dim}


_TRAFFIC = (
    Traffic("rows", _of(64, 768), (3, 3), _bytes),
    Traffic("rows in several ranges", _of(3, 40000), (3, 3), _bytes),
    Traffic("short rows", _of(2048, 63), (3, 3), _bytes),
    Traffic("columns", _of(256, 32, 5, 5, dim=1), (3, 3), _bytes),
    Traffic("single elements", _of(4096), (2, 2), _bytes),
)
# The kernels of the roots work on norms, a number for each group.
KERNELS = (
    CudaKernel("^row_products_kernel<", stores=False),
    CudaKernel("^short_row_products_kernel<", stores=False),
    CudaKernel("^column_products_kernel<", stores=False),
    CudaKernel("^prox_scale_kernel<"),
    CudaKernel("^prox_single_kernel<"),
    CudaKernel("^prox_gradient_kernel<"),
    CudaKernel("^prox_single_gradient_kernel<"),
)


def _sized(make: Maker, n: int) -> Arguments:
    return {**_given(make, n, 7), "k": make.tensor([2.5]), "lam": make.tensor([0.25])}


RECORDS = [
    OpSpec(
        name="prox_group_envelope",
        function=fusee.prox_group_envelope,
        samples=_samples,
        large=_large,
        error_inputs=_error_inputs,
        oracle=prox_oracle,
        sized=_sized,
        batch_dims={"input": 0},
        differentiable=("input", "k", "lam"),
        raw={"prox_group_envelope": (0, 3, 4), "prox_group_envelope_backward": (0, 1, 6, 7)},
        autocast_dtype=lambda dtype, cast: dtype,
        properties={"odd": _odd, "shrinks": _shrinks, "enough groups": _enough_groups},
        nan_samples=_nan_samples,
        not_batched=("weights",),
        traffic=_TRAFFIC,
        cuda_kernels=KERNELS,
        # The gradients in k and lam are sums whose terms cancel.
        engine_ulps=8.0,
        least_scale=1.0,
    )
]
