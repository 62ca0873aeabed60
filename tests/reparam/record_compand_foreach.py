"""The record of ``fusee.compand_foreach``, seen as a function that returns one tensor.

Longer lists, mixed dtypes, and the registration of its operators are in ``test_compand_foreach.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import fusee
import torch
from torch import Tensor

from tests.harness.spec import Arguments, ErrorInput, Maker, NanSample, OpSpec, Sample, Traffic
from tests.reparam.curves import (
    KINDS,
    kind_errors,
    normal,
    oracle,
    parameter_errors,
    parameters,
    weights,
)
from tests.reparam.record_compand import KERNELS, channels_last


def _joined(
    first: Any, second: Any, a: Any, b: Any, kind: Any = "arctan", second_a: Any = None
) -> Tensor:
    if second_a is not None:
        a = [a, second_a]
    results = fusee.compand_foreach([first, second], a, b, kind)
    return torch.cat([result.reshape(-1) for result in results])


_joined.__doc__ = fusee.compand_foreach.__doc__


def _oracle(
    first: Tensor, second: Tensor, a: Any, b: Any, kind: str = "arctan", second_a: Any = None
) -> Tensor:
    pairs = ((first, a), (second, a if second_a is None else second_a))
    return torch.cat([oracle(input, each, b, kind).reshape(-1) for input, each in pairs])


def _pair(make: Maker, first: tuple[int, ...], second: tuple[int, ...]) -> Arguments:
    before = math.prod(first)
    return {"first": weights(make, *first), "second": weights(make, *second, skipped=before)}


def _normal(make: Maker, first: tuple[int, ...], second: tuple[int, ...]) -> Arguments:
    before = math.prod(first)
    return {"first": normal(make, *first), "second": normal(make, *second, skipped=before)}


def _samples(make: Maker) -> Iterator[Sample]:
    yield Sample("numbers", {**_pair(make, (3, 5), (2,)), "a": 1.5, "b": 0.75}, tiny=True)
    for kind in KINDS:
        pair = _pair(make, (3, 4), (2, 2))
        yield Sample(kind, {**pair, **parameters(make, kind)}, tiny=True)
    each = {"a": make.uniform(4, low=0.5, high=2.0), "b": make.tensor([0.5])}
    second = {"second_a": make.tensor([2.0])}
    yield Sample("an a each", {**_pair(make, (4, 3), (2, 2)), **each, **second}, tiny=True)
    mixed = {**_pair(make, (4, 2, 2, 2), (4,)), **parameters(make, "tanh", 4)}
    mixed |= {"first": channels_last(mixed["first"]), "a": 1.25, "second_a": mixed["a"]}
    yield Sample("channels last", mixed, tiny=True)
    scalar = {**_pair(make, (), (0, 5)), **parameters(make, "arctan")}
    yield Sample("a scalar and none", scalar, tiny=True)
    none = {**_pair(make, (4, 0), (0, 2)), **each, "second_a": make.tensor([])}
    yield Sample("no channels", none, tiny=True)
    for kind in KINDS:
        pair = _normal(make, (31, 3, 3, 3), (31, 129))
        yield Sample(f"{kind}, 31 channels", {**pair, **parameters(make, kind, 31)})
    pair = _normal(make, (2, 3000), (1001,))
    yield Sample("longer", {**pair, **parameters(make, "arctan")})


def _error_inputs(make: Maker) -> Iterator[ErrorInput]:
    x = make.normal(4, 3)
    given = {"first": x, "second": x + 1, "a": 1.5, "b": 0.5}

    def error(name: str, kind: type[Exception], match: str, **changed: Any) -> ErrorInput:
        return ErrorInput(name, {**given, **changed}, kind, match)

    yield error("not a tensor", TypeError, r"inputs\[1\] must be a Tensor", second=[1.0])
    yield error("integers", TypeError, r"inputs\[0\] must have dtype .*int64", first=x.long())
    yield error("bool", TypeError, r"inputs\[1\] must have dtype .*bool", second=x > 0)
    elsewhere = x.to("meta")
    yield error("devices", ValueError, r"inputs\[1\] must be on the same dev", second=elsewhere)
    yield error("too few", ValueError, "a must be as many as inputs, got 1 and 2", a=[1.0])
    yield error("too many", ValueError, "b must be as many as inputs, got 3 and 2", b=[1.0] * 3)
    yield error("None", TypeError, "a must be a number", a=None)
    yield error("a str in a list", TypeError, r"b\[1\] must be a number", b=[1.0, "1"])
    three = x.new_ones(3)
    yield error("channels of one", ValueError, r"a\[1\] must have one", a=[1.0, three])
    yield error("zero in a list", ValueError, r"a\[1\] must be positive", a=[1.0, 0.0])
    negative = {"a": x.new_tensor([-1.0]), "second_a": x.new_tensor([-2.0])}
    match = r"a\[0\] must be positive"
    yield ErrorInput("negative each", {**given, **negative}, ValueError, match, values=True)
    yield from kind_errors(given)
    yield from parameter_errors(given, "second", r"inputs(\[0\])?")


def _nan_samples(make: Maker) -> Iterator[NanSample]:
    for kind in KINDS:
        first, second = make.uniform(4, 6, low=-1.0), make.uniform(3, 2, low=-1.0)
        first[3, 2] = second[1, 0] = math.nan
        expected = torch.cat([first.isnan().reshape(-1), second.isnan().reshape(-1)])
        given = {"a": 1.5, "b": 1.75, "kind": kind}
        yield NanSample({"first": first, "second": second, **given}, expected)


def _large(make: Maker) -> Iterator[Sample]:
    rows = {**_normal(make, (300, 1000), (300, 40, 5, 5)), **parameters(make, "asinh", 300)}
    yield Sample("rows", {**rows, "second": channels_last(rows["second"])})
    yield Sample("one row", {**_normal(make, (400001,), (9, 7)), **parameters(make, "arctan")})


def _sized(make: Maker, n: int) -> Arguments:
    given = {**parameters(make, "arctan", n), "a": make.tensor([1.5])}
    return {**_pair(make, (n, 7), (n,)), **given}


def _bytes(arguments: Arguments) -> tuple[int, int]:
    """As of ``fusee.compand``; the parameters are read, and their gradients written, of each."""
    inputs = (arguments["first"], arguments["second"])
    size = sum(x.numel() * x.element_size() for x in inputs)
    parameters = 2 * 4 * (arguments["a"].numel() + arguments["b"].numel())
    return 2 * size + parameters, 3 * size + 2 * parameters


def _traffic(first: tuple[int, ...], second: tuple[int, ...]) -> Callable[[Maker], Arguments]:
    return lambda make: {**_normal(make, first, second), **parameters(make, "arctan")}


_TRAFFIC = (
    Traffic("small", _traffic((16, 64), (900,)), (1, 1), _bytes),
    Traffic("long and short", _traffic((256, 256), (900,)), (1, 2), _bytes),
)
_NOT_APPLICABLE = {
    **dict.fromkeys(
        ("reference", "raw_inputs_unwritten", "opcheck"),
        "its operators take lists of tensors: see test_compand_foreach.py",
    ),
    "autocast": "torch.cat refuses the other half type: see test_compand_foreach.py",
}

RECORDS = [
    OpSpec(
        name="compand_foreach",
        function=_joined,
        samples=_samples,
        error_inputs=_error_inputs,
        oracle=_oracle,
        sized=_sized,
        batch_dims={"first": 0, "second": 0, "b": 0},
        differentiable=("first", "second", "a", "b", "second_a"),
        raw={"compand_foreach": (), "compand_foreach_backward": ()},
        autocast_dtype=lambda dtype, cast: dtype,
        engine_ulps=8.0,
        least_scale=1.0,
        nan_samples=_nan_samples,
        large=_large,
        traffic=_TRAFFIC,
        cuda_kernels=KERNELS,
        not_applicable=_NOT_APPLICABLE,
    )
]
