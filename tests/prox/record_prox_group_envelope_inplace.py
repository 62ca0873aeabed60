"""The record of ``fusee.optim.prox_group_envelope_``, seen as a function that returns the result.

Lists of tensors, scopes of several, tables, layouts and the number of launches are in
``test_prox_group_envelope_inplace.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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
)
from tests.prox.envelopes import prox_oracle


def _oracle(input: Tensor, k: Any, lam: Any, **options: Any) -> Tensor:
    if options.get("metric") is not None:
        options["metric"] = options["metric"][:, 0]
    return prox_oracle(input, k, lam, **options)


def _applied(input: Any, k: Any, lam: Any, **options: Any) -> Tensor:
    """The result on a copy, so that a sample can be used again."""
    result = input.clone() if isinstance(input, Tensor) else input
    fusee.optim.prox_group_envelope_(result, k, lam, **options)
    return result


def _given(make: Maker, *shape: int, k: Any = 2.5, lam: Any = 0.25, **others: Any) -> Arguments:
    return {"input": make.normal(*shape), "k": k, "lam": lam, **others}


def _samples(make: Maker) -> Iterator[Sample]:
    yield Sample("vector", _given(make, 7), tiny=True)
    yield Sample("filters", _given(make, 5, 3), tiny=True)
    numbers = {"k": make.tensor([2.5]), "lam": make.tensor(0.25)}
    yield Sample("tensors", {**_given(make, 5, 3), **numbers}, tiny=True)
    yield Sample("debiased", _given(make, 5, 3, debiased=True), tiny=True)
    yield Sample("projection", _given(make, 5, 3, lam=2.0, debiased=True), tiny=True)
    for dim in (0, 1, (1, 2, 3), (0, 2), (), (0, 1, 2, 3)):
        yield Sample(f"kernels, {dim=}", _given(make, 3, 2, 2, 2, k=1.5, dim=dim), tiny=True)
    numbers = make.uniform(5, low=0.5, high=2.0)
    for name, weights in (("size",) * 2, ("inverse_size",) * 2, ("a tensor", numbers)):
        arguments = _given(make, 5, 3, lam=0.2, weights=weights)
        yield Sample(f"weights {name}", arguments, tiny=True)
    for changes in ({"k": 9.0}, {"k": 0.0}, {"k": -1}, {"lam": 0.0}):
        yield Sample(f"{changes}", _given(make, 5, 3, **changes), tiny=True)
    for shape in ((), (1,), (0, 5), (4, 0)):
        yield Sample(f"{shape}", _given(make, *shape), tiny=True)
    for shape, dim in (((513,), 0), ((70, 33), 1), ((31, 5, 3, 3), (0, 1)), ((9, 1500), 0)):
        for debiased in (False, True):
            arguments = _given(make, *shape, k=6.0, dim=dim, debiased=debiased)
            yield Sample(f"{shape}, {dim=}, {debiased=}", arguments)
    for debiased in (False, True):
        metric = make.uniform(5, 3, low=0.75, high=2.0)
        # One number a group: the metrics that the oracle knows.
        metric = metric[:, :1].expand(5, 3).contiguous()
        arguments = _given(make, 5, 3, metric=metric, debiased=debiased)
        yield Sample(f"metric, {debiased=}", arguments, tiny=True)
    yield Sample("long rows", _given(make, 3, 40000, k=1.5))
    last = _given(make, 6, 4, 5, 7, k=2.0, dim=1)
    last["input"] = last["input"].contiguous(memory_format=torch.channels_last)
    yield Sample("channels last", last)


def _large(make: Maker) -> Iterator[Sample]:
    yield Sample("single elements", _given(make, 200001, k=50000.0))
    yield Sample("rows", _given(make, 3001, 100, k=500.0, debiased=True))
    yield Sample("columns", _given(make, 100, 3001, k=500.0, dim=1))


def _error_inputs(make: Maker) -> Iterator[ErrorInput]:
    x = make.normal(4, 3)
    given = {"input": x, "k": 2, "lam": 0.5}

    def error(name: str, kind: type[Exception], match: str, **changed: Any) -> ErrorInput:
        return ErrorInput(name, {**given, **changed}, kind, match)

    yield error("none", ValueError, "tensors must hold one tensor", input=[])
    yield error("a number", TypeError, r"tensors\[0\] must be a Tensor", input=[1.0])
    yield error("integers", TypeError, r"tensors\[0\] must have dtype", input=[x.long()])
    devices = [x, x.to("meta")]
    yield error("devices", ValueError, r"tensors\[1\] must be on the same device", input=devices)
    yield error("twice", ValueError, "tensors must not hold the same tensor twice", input=[x, x])
    yield error("dim", IndexError, "dim must be in", dim=2)
    yield error("dim and table", ValueError, "dim must not be given", dim=1, groups=[])
    yield error("scope", ValueError, "scope must be 'tensor' or 'all', got 'layer'", scope="layer")
    yield error("a table", TypeError, "groups must be GroupTables, got int", groups=[1])
    table = fusee.GroupTable.blocks(x, (2, 3))
    yield error("tables", ValueError, "scope must be left out", scope="all", groups=table)
    fewer = [x, x.clone()]
    yield error("tensors", ValueError, "tensors must be those of groups", groups=table, input=fewer)
    yield error("weights", ValueError, "weights must be 'size'", weights="sizes")
    yield error("weights 1", TypeError, "weights must be 'size', 'inverse_size' or", weights=1.0)
    counts = make.integers(5, 4)
    yield error("counts", TypeError, "weights must have dtype .*, got torch.int64", weights=counts)
    elsewhere = make.uniform(4).to("meta")
    yield error("device", ValueError, "weights must be on the same device as", weights=elsewhere)
    yield error("shape", ValueError, r"weights must have shape \(4,\)", weights=make.uniform(3))
    two = {"input": fewer, "weights": make.uniform(4)}
    yield error("one weights", ValueError, "weights must be a string or None", **two)
    for name in ("k", "lam"):
        yield error(f"{name} a string", TypeError, f"{name} must be of numbers", **{name: ["1"]})
        yield error(f"two {name}", ValueError, f"{name} must have one element", **{name: [1, 2]})
        message = f"{name} must be real"
        yield error(f"{name} bool", TypeError, message, **{name: make.tensor([1], torch.bool)})
    ones = torch.ones_like(x)
    yield error("metrics", ValueError, "metric must be as many as tensors", metric=[ones, ones])
    yield error("metric 1", TypeError, r"metric\[0\] must be a Tensor", metric=[1.0])
    message = r"metric\[0\] must have the shape of tensors\[0\]"
    yield error("shape of metric", ValueError, message, metric=ones[:, :1])
    for bad in (0.0, math.nan, math.inf):
        wrong = {**given, "metric": ones.clone().index_fill_(0, make.tensor([1], torch.int64), bad)}
        message = r"metric\[0\] must be positive and finite, got"
        yield ErrorInput(f"metric of {bad}", wrong, ValueError, message, values=True)
    yield error("k nan", ValueError, "k must not be NaN", k=math.nan)
    yield error("lam nan", ValueError, "lam must not be negative", lam=math.nan)
    yield error("lam -1", ValueError, "lam must not be negative", lam=-1)
    message = "lam must be not negative, got -0.5"
    wrong = {**given, "lam": make.tensor(-0.5)}
    yield ErrorInput("lam negative", wrong, ValueError, message, values=True)
    for name, wanted in (("k", "not NaN"), ("lam", "not negative")):
        wrong = {**given, name: make.tensor([math.nan])}
        message = f"{name} must be {wanted}, got nan"
        yield ErrorInput(f"{name} a tensor of nan", wrong, ValueError, message, values=True)
    for bad in (-1.0, math.nan, math.inf):
        wrong = {**given, "weights": make.tensor([1.0, bad, 1.0, 0.5])}
        message = "weights must be finite and not negative, got"
        yield ErrorInput(f"weights of {bad}", wrong, ValueError, message, values=True)


def _nan_samples(make: Maker) -> Iterator[NanSample]:
    for others in ({}, {"debiased": True}, {"debiased": True, "lam": 3.0}):
        x = make.normal(1, 6)
        x[0, 3] = math.nan
        arguments = {"input": x, "k": 2.5, "lam": 0.25, "dim": 1, **others}
        yield NanSample(arguments, torch.ones_like(x, dtype=torch.bool))


def _sized(make: Maker, n: int) -> Arguments:
    return _given(make, n, 7)


_NO_DERIVATIVES = (
    "gradients gradient_layouts gradcheck gradgradcheck third_order retain_graph checkpoint "
    "no_grad each_gradient_alone func_grad jacrev jacfwd jvp dual_numbers hessian "
    "per_sample_gradients transforms_on_float32 transforms_in_compiled_code "
    "second_order_of_compiled_code"
)
_IN_PLACE = "reference raw_inputs_unwritten opcheck strides_of_fake documentation"
_NOT_APPLICABLE = {
    **dict.fromkeys(_NO_DERIVATIVES.split(), "an optimiser's step has no derivative"),
    **dict.fromkeys(
        _IN_PLACE.split(),
        "it writes to lists of tensors: see test_prox_group_envelope_inplace.py",
    ),
    "traffic": "measured over lists of tensors in test_prox_group_envelope_inplace.py",
    **dict.fromkeys(
        ("vmap", "vmap_of_vmap", "unchecked_values"),
        "it writes to its arguments, which vmap cannot",
    ),
}

RECORDS = [
    OpSpec(
        name="prox_group_envelope_",
        function=_applied,
        samples=_samples,
        error_inputs=_error_inputs,
        oracle=_oracle,
        sized=_sized,
        batch_dims={"input": 0},
        differentiable=(),
        raw={"prox_group_envelope_": (), "prox_group_envelope_metric_": ()},
        autocast_dtype=lambda dtype, cast: dtype,
        nan_samples=_nan_samples,
        large=_large,
        least_scale=1.0,
        cuda_kernels=(
            CudaKernel("squares_kernel", stores=False),
            CudaKernel("scale_tensors_kernel"),
            CudaKernel("metric_sums_kernel", stores=False),
            CudaKernel("metric_scale_kernel"),
        ),
        not_applicable=_NOT_APPLICABLE,
    )
]
