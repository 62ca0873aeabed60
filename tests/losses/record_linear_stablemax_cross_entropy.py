"""The record of ``fusee.linear_stablemax_cross_entropy``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fusee
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.harness.measure import accumulation
from tests.harness.spec import Arguments, ErrorInput, Maker, OpSpec, Sample
from tests.losses.record_stablemax_cross_entropy import cross_entropy_of_symlog

FEATURES = 6


def _oracle(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    **options: Any,
) -> Tensor:
    logits = F.linear(input, linear_weight, linear_bias)
    if logits.dtype != torch.float64:
        logits = logits.float()
        if options.get("weight") is not None:
            options["weight"] = options["weight"].float()
        target = target.float() if target.is_floating_point() else target
    return cross_entropy_of_symlog(logits, target, dim=-1, **options)


def _call(
    make: Maker, *shape: int, classes: int = 5, features: int = FEATURES, **options: Any
) -> Arguments:
    return {
        "input": make.normal(*shape, features),
        "linear_weight": make.normal(classes, features),
        "target": make.integers(classes, *shape),
        **options,
    }


def _samples(make: Maker) -> Iterator[Sample]:
    def bias(classes: int = 5) -> Tensor:
        return make.normal(classes)

    yield Sample("mean", _call(make, 4), tiny=True)
    yield Sample("bias, sum", _call(make, 4, linear_bias=bias(), reduction="sum"), tiny=True)
    yield Sample("none", _call(make, 4, reduction="none"), tiny=True)
    yield Sample("sequences", _call(make, 2, 3, linear_bias=bias(), reduction="none"), tiny=True)
    yield Sample("one dimension", _call(make), tiny=True)
    weight = make.uniform(5, low=0.1)
    options = {"weight": weight, "label_smoothing": 0.2}
    yield Sample("weights and smoothing", _call(make, 4, **options), tiny=True)
    yield Sample("all smooth", _call(make, 4, label_smoothing=1.0, reduction="sum"), tiny=True)
    yield Sample("a class ignored", _call(make, 6, ignore_index=1, reduction="none"), tiny=True)
    soft = {**_call(make, 4), "target": make.uniform(4, 5)}
    yield Sample("probabilities", soft, tiny=True)
    yield Sample("no rows", _call(make, 0, linear_bias=bias(), reduction="sum"), tiny=True)
    yield Sample("no features", _call(make, 3, features=0, linear_bias=bias()), tiny=True)
    wide = {"reduction": "none", "linear_bias": bias(1000)}
    yield Sample("wide", _call(make, 9, classes=1000, features=33, **wide))
    yield Sample("many rows", _call(make, 301, classes=11, features=40))


def _error_inputs(make: Maker) -> Iterator[ErrorInput]:
    given = _call(make, 3)
    x, w, y = given["input"], given["linear_weight"], given["target"]

    def error(
        name: str, kind: type[Exception], match: str, values: bool = False, **changed: Any
    ) -> ErrorInput:
        return ErrorInput(name, {**given, **changed}, kind, match, values)

    yield error("input not a tensor", TypeError, "input must be a Tensor", input=[1.0])
    yield error("input of integers", TypeError, "input must have dtype", input=y)
    yield error("input a scalar", ValueError, "input must have a dimension", input=x[0, 0])
    yield error("weight's features", ValueError, "linear_weight must be", linear_weight=w[:, :4])
    yield error("weight's dimensions", ValueError, "linear_weight must be", linear_weight=w[0])
    yield error("weight's dtype", TypeError, "linear_weight must have", linear_weight=w.double())
    device = w.to("meta")
    yield error("weight's device", ValueError, "linear_weight .*device", linear_weight=device)
    yield error("no classes", ValueError, "linear_weight must have at", linear_weight=w[:0])
    yield error("bias too short", ValueError, r"linear_bias .*\(5,\)", linear_bias=w[:4, 0])
    bias = w[:, 0].double()
    yield error("bias's dtype", TypeError, "linear_bias must have the dtype", linear_bias=bias)
    yield error("target too short", ValueError, "target", target=y[:2])
    yield error("target of bool", TypeError, "target", target=y > 0)
    yield error("class weights", ValueError, "weight must have one entry", weight=w[:4, 0].abs())
    yield error("reduction", ValueError, "reduction must be one of", reduction="avg")
    yield error("smoothing", ValueError, "label_smoothing .*1.5", label_smoothing=1.5)
    yield error("ignore_index", TypeError, "ignore_index", ignore_index=None)
    high = make.tensor([1, 5, 0], torch.int64)
    yield error("target too high", IndexError, r"target must be in \[0, 4\]", True, target=high)
    negative = w[:, 0].abs() - 100
    yield error("negative weight", ValueError, "weight must not be neg", True, weight=negative)


def _large(make: Maker) -> Iterator[Sample]:
    yield Sample("rows", _call(make, 700, classes=1000, features=32))
    yield Sample("classes", _call(make, 40, classes=50_001, features=16, label_smoothing=0.1))


def _sized(make: Maker, n: int) -> Arguments:
    return _call(make, n, linear_bias=make.normal(5))


def _not_negative(sample: Sample, output: Tensor) -> None:
    assert bool(((output >= 0) | output.isnan()).all()), "the loss is negative"


RECORDS = [
    OpSpec(
        name="linear_stablemax_cross_entropy",
        function=fusee.linear_stablemax_cross_entropy,
        samples=_samples,
        error_inputs=_error_inputs,
        oracle=_oracle,
        straightforward=_oracle,
        sized=_sized,
        batch_dims={"input": 0, "target": 0},
        differentiable=("input", "linear_weight", "linear_bias"),
        raw={
            "linear_stablemax_cross_entropy": (0, 1, 3),
            "linear_stablemax_cross_entropy_backward": (0, 1, 2, 4),
        },
        output_dtype=accumulation,
        autocast_dtype=lambda dtype, cast: accumulation(dtype),
        properties={"not negative": _not_negative},
        large=_large,
        not_batched=("weight",),
        engine_ulps=16.0,
        half_inside=True,
        least_scale=1.0,
        not_applicable={
            "traffic": "its matrix products are torch's own, which the emulator does not count",
            "cuda_kernels": "its matrix products are torch's own",
            "thread_count": "torch's own matrix products may round by the number of threads",
            "nan": "the gradient of the layer sums over rows: see the method's own test",
        },
    )
]
