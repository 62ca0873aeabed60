"""The record of ``fusee.compand_inverse``, which is made of torch's operators alone."""

from __future__ import annotations

import math
from collections.abc import Iterator

import fusee
import torch
from torch import Tensor

from tests.harness.spec import Arguments, ErrorInput, Maker, NanSample, OpSpec, Sample
from tests.reparam.curves import (
    KINDS,
    KINKED,
    LIMITS,
    inverse_oracle,
    kind_errors,
    parameter_errors,
    parameters,
    weight_errors,
    weights,
)
from tests.reparam.record_compand import channels_last


def _within(make: Maker, kind: str, *shape: int) -> Tensor:
    """Weights that every ``a`` of 0.75 and more reaches, not near zero."""
    limit = {**LIMITS, "mu_law": 10.0}.get(kind, 2.0)
    return weights(make, *shape) * (0.2 * limit)


def _samples(make: Maker) -> Iterator[Sample]:
    yield Sample(
        "numbers", {"output": _within(make, "arctan", 3, 5), "a": 1.5, "b": 0.75}, tiny=True
    )
    for kind in KINDS:
        one = {"output": _within(make, kind, 3, 4), **parameters(make, kind)}
        yield Sample(kind, one, tiny=True)
        each = {"output": _within(make, kind, 4, 3), **parameters(make, kind, 4)}
        yield Sample(f"{kind}, channels", each, tiny=True)
    bare = {"output": _within(make, "arctan", 7), "a": make.tensor(1.25), "b": make.tensor(0.5)}
    yield Sample("parameters without dimensions", bare, tiny=True)
    for name, kind, changed in (
        ("b of one", "asinh", {"b": make.tensor([0.5])}),
        ("a a number", "tanh", {"a": 2}),
    ):
        mixed = {"output": _within(make, kind, 4, 2, 3, 3), **parameters(make, kind, 4), **changed}
        yield Sample(name, mixed, tiny=True)
    last = channels_last(_within(make, "softsign", 4, 3, 2, 2))
    yield Sample("channels last", {"output": last, **parameters(make, "softsign", 4)}, tiny=True)
    for name, shape, kind, channels in (
        ("scalar", (), "arctan", None),
        ("one element", (1,), "symlog", 1),
        ("no weights", (0, 5), "tanh", None),
        ("no channels", (0, 5), "arctan", 0),
        ("empty channels", (4, 0), "powerprop", 4),
    ):
        arguments = {"output": _within(make, kind, *shape), **parameters(make, kind, channels)}
        yield Sample(name, arguments, tiny=True)
    for kind in KINKED:
        # A power of one: the inverse of a higher one has an infinite derivative at zero.
        at_zero = {"output": make.tensor([0.0, -0.0, 0.5, -0.5, 0.25]), "a": make.tensor([1.5])}
        at_zero |= {"b": make.tensor([1.0]), "kind": kind}
        yield Sample(f"{kind} at zero", at_zero, tiny=True, smooth=False)
    for kind in KINDS:
        wide = {"output": _within(make, kind, 61, 29), **parameters(make, kind, 61)}
        yield Sample(f"{kind}, 61 channels", wide)


def _large(make: Maker) -> Iterator[Sample]:
    for kind in ("arctan", "mu_law"):
        yield Sample(kind, {"output": _within(make, kind, 300, 1000), **parameters(make, kind)})


def _error_inputs(make: Maker) -> Iterator[ErrorInput]:
    given = {"output": make.uniform(4, 3, low=-0.5, high=0.5), "a": 1.5, "b": 0.5}
    yield from weight_errors(given, "output", make)
    yield from kind_errors(given)
    yield from parameter_errors(given, "output")
    for kind, limit in LIMITS.items():
        match = f"output must be inside .* the range of '{kind}', got"
        beyond = {"above": 1.01 * limit, "below": -3 * limit, "infinite": math.inf}
        if kind != "arctan":  # where no number is on the limit itself
            beyond["on the limit"] = limit
        for what, value in beyond.items():
            output = make.tensor([0.5, 2 * value, -0.25])
            arguments = {"output": output, "a": make.tensor([2.0]), "b": 0.5, "kind": kind}
            yield ErrorInput(f"{kind}: {what}", arguments, ValueError, match, values=True)
            arguments = {**arguments, "a": 2.0}
            yield ErrorInput(f"{kind}: {what}, a 2", arguments, ValueError, match, values=True)


def _nan_samples(make: Maker) -> Iterator[NanSample]:
    for kind in KINDS:
        w = make.uniform(4, 6, low=-0.5, high=0.5)
        w[3, 2] = math.nan
        yield NanSample({"output": w, "a": 1.5, "b": 1.75, "kind": kind}, w.isnan())


def _round_trip(sample: Sample, output: Tensor) -> None:
    """The curve of the result is what was given. The error of v counts less in w than in v, but for
    powers: there ``b`` times as much."""
    options = {name: value for name, value in sample.arguments.items() if name != "output"}
    again = fusee.compand(output, **options)
    given = sample.arguments["output"]
    worst = 8 * torch.finfo(output.dtype).eps
    torch.testing.assert_close(again.double(), given.double(), rtol=worst, atol=worst / 100)


def _sized(make: Maker, n: int) -> Arguments:
    given = {**parameters(make, "arctan", n), "b": make.tensor([0.5])}
    return {"output": _within(make, "arctan", n, 7), **given}


_COMPOSITE = "reference raw_inputs_unwritten opcheck engine_kernels traffic cuda_kernels"
_NOT_APPLICABLE = {
    **dict.fromkeys(_COMPOSITE.split(), "made of torch's operators, with none of ours beneath"),
    "thread_count": "torch's own sums, of the gradients of a and b, depend on the threads",
    "export": "no operator of ours is in the program: see test_compand_inverse.py",
}

RECORDS = [
    OpSpec(
        name="compand_inverse",
        function=fusee.compand_inverse,
        samples=_samples,
        error_inputs=_error_inputs,
        oracle=inverse_oracle,
        sized=_sized,
        batch_dims={"output": 0, "a": 0},
        differentiable=("output", "a", "b"),
        raw={},
        autocast_dtype=lambda dtype, cast: dtype,
        properties={"the curve leads back": _round_trip},
        nan_samples=_nan_samples,
        least_scale=1.0,
        large=_large,
        not_applicable=_NOT_APPLICABLE,
    )
]
