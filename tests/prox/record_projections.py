"""The records of the projections onto sparse sets: of groups, and the three of the entries of rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import fusee
import torch
from torch import Tensor

from tests.harness.spec import Arguments, ErrorInput, Maker, NanSample, OpSpec, Sample
from tests.prox.sparse_oracles import (
    ball_oracle,
    groups_oracle,
    nonnegative_oracle,
    simplex_oracle,
)


def _group_samples(make: Maker) -> Iterator[Sample]:
    for name, shape, options in (
        ("filters", (4, 3), {"k": 2}),
        ("columns", (3, 5), {"k": 2, "dim": 1}),
        ("single elements", (3, 4), {"k": 5, "dim": (0, 1)}),
        ("one group", (3, 2), {"k": 1, "dim": ()}),
        ("dimensions apart", (3, 2, 2), {"k": 2.75, "dim": (0, 2)}),
        ("size", (4, 3), {"k": 3, "weights": "size"}),
        ("inverse size", (4, 3), {"k": 1, "weights": "inverse_size", "dim": -2}),
        ("none", (4, 3), {"k": 0}),
        ("fewer than none", (4, 3), {"k": -1.5}),
        ("all", (4, 3), {"k": 4}),
        ("more than all", (4, 3), {"k": math.inf}),
    ):
        emulated = name in ("filters", "columns", "single elements", "none", "all")
        yield Sample(name, {"input": make.normal(*shape), **options}, tiny=True, emulated=emulated)
    of_weights = {"input": make.normal(5, 3), "k": 2, "weights": make.uniform(5, low=0.5, high=2.0)}
    yield Sample("weights", of_weights, tiny=True)
    without = {"input": make.normal(3, 2), "k": 1, "weights": make.tensor([1.0, 0.0, 2.0])}
    yield Sample("a weight of zero", without, tiny=True)
    # Of integers, so that vmap over k does not multiply the tests.
    as_tensor = {"input": make.normal(4, 3), "k": torch.tensor(2, device=make.device)}
    yield Sample("k a tensor", as_tensor, tiny=True)
    for name, shape in (("scalar", ()), ("no groups", (0, 3)), ("empty groups", (4, 0))):
        yield Sample(name, {"input": make.normal(*shape), "k": 1}, tiny=True)
    ties = make.tensor([[1.0, -1.0], [-1.0, 1.0], [0.0, 0.5], [1.0, 1.0]])
    yield Sample("ties", {"input": ties, "k": 2}, tiny=True, smooth=False)
    yield Sample("wide", {"input": make.normal(37, 61), "k": 11})
    yield Sample("long", {"input": make.normal(3, 301, 5), "k": 100, "dim": 1})


def _group_errors(make: Maker) -> Iterator[ErrorInput]:
    given = {"input": make.normal(4, 3), "k": 2}
    yield from _input_errors(given, make)
    for name, changed, error, match in (
        ("k a str", {"k": "2"}, TypeError, "k must be a number"),
        ("k NaN", {"k": math.nan}, ValueError, "k must"),
        ("two k", {"k": make.normal(2)}, ValueError, "k must have one element"),
        ("dim a str", {"dim": "0"}, TypeError, "dim must be"),
        ("dim twice", {"dim": (0, -2)}, ValueError, "dim must not repeat"),
        ("no such dim", {"dim": 2}, IndexError, "dim must be in"),
        ("unknown weights", {"weights": "ones"}, ValueError, "weights must be"),
        ("weights a list", {"weights": [1.0]}, TypeError, "weights must be"),
        ("three weights", {"weights": make.uniform(3)}, ValueError, "weights must have shape"),
    ):
        yield ErrorInput(name, {**given, **changed}, error, match)
    for value in (-1.0, math.inf, math.nan):
        weights = make.tensor([1.0, value, 1.0, 1.0])
        match = "weights must be finite and not negative"
        changed = {**given, "weights": weights}
        yield ErrorInput(f"weight {value}", changed, ValueError, match, values=True)


def _input_errors(given: Arguments, make: Maker) -> Iterator[ErrorInput]:
    for name, input, match in (
        ("integers", make.integers(3, 4, 3), "input must have dtype"),
        ("a list", [1.0, 2.0], "input must be a Tensor"),
    ):
        yield ErrorInput(name, {**given, "input": input}, TypeError, match)


def _group_nan_samples(make: Maker) -> Iterator[NanSample]:
    x = make.normal(1, 6)
    x[0, 2] = math.nan
    yield NanSample({"input": x, "k": 2, "dim": 1}, torch.ones(1, 6, dtype=torch.bool))


def _group_sized(make: Maker, n: int) -> Arguments:
    weights = make.uniform(5, low=0.5, high=2.0)
    return {"input": make.normal(5, n), "k": 2, "weights": weights}


def _row_samples(make: Maker, least: int = 0) -> Iterator[Sample]:
    for name, shape, options in (
        ("one row", (7,), {"k": 3}),
        ("rows", (3, 5), {"k": 2}),
        ("columns", (5, 3), {"k": 2, "dim": 0}),
        ("in the middle", (2, 5, 2), {"k": 3, "dim": 1}),
        ("a real k", (3, 4), {"k": 2.75}),
        ("one", (3, 4), {"k": 1}),
        ("all", (3, 4), {"k": 4}),
        ("more than all", (3, 4), {"k": math.inf}),
        ("scalar", (), {"k": 1}),
        ("no rows", (0, 5), {"k": 2}),
    ):
        yield Sample(name, {"input": make.normal(*shape), **options}, tiny=True)
    if least == 0:
        yield Sample("none", {"input": make.normal(3, 4), "k": 0}, tiny=True)
        yield Sample("fewer than none", {"input": make.normal(3, 4), "k": -1.5}, tiny=True)
        yield Sample("empty rows", {"input": make.normal(4, 0), "k": 1}, tiny=True)
    ties = make.tensor([[1.0, -0.5, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [2.0, 2.0, 2.0, -2.0]])
    yield Sample("ties", {"input": ties, "k": 2}, tiny=True, smooth=False)
    yield Sample("many rows", {"input": make.normal(37, 61), "k": 11})
    yield Sample("long rows", {"input": make.normal(3, 4, 301, scale=3.0), "k": 100})


def _with_size(make: Maker, name: str, least: int = 0) -> Iterator[Sample]:
    yield from _row_samples(make, least)
    for value in (0.25, 3):
        given = {"input": make.normal(3, 5), "k": 3, name: value}
        yield Sample(f"{name} {value}", given, tiny=True)
    large = {"input": make.normal(3, 5) * 20000, "k": 3, name: 7.5}
    yield Sample("large numbers", large, tiny=True)


def _row_errors(make: Maker) -> Iterator[ErrorInput]:
    given = {"input": make.normal(4, 3), "k": 2}
    yield from _input_errors(given, make)
    for name, changed, error, match in (
        ("k a str", {"k": "2"}, TypeError, "k must be a number"),
        ("k a bool", {"k": True}, TypeError, "k must be a number"),
        ("k NaN", {"k": math.nan}, ValueError, "k must not be NaN"),
        ("dim a tuple", {"dim": (0, 1)}, TypeError, "dim must be an int"),
        ("no such dim", {"dim": 2}, IndexError, "dim must be in"),
    ):
        yield ErrorInput(name, {**given, **changed}, error, match)


def _size_errors(make: Maker, name: str) -> Iterator[ErrorInput]:
    yield from _row_errors(make)
    given = {"input": make.normal(4, 3), "k": 2}
    for value in (0, -1.0, math.inf, math.nan):
        match = f"{name} must be positive and finite"
        yield ErrorInput(f"{name} {value}", {**given, name: value}, ValueError, match)
    yield ErrorInput(f"{name} a str", {**given, name: "1"}, TypeError, f"{name} must be a number")


def _simplex_errors(make: Maker) -> Iterator[ErrorInput]:
    yield from _size_errors(make, "total")
    for value in (0, 0.5, -3):
        given = {"input": make.normal(4, 3), "k": value}
        yield ErrorInput(f"k {value}", given, ValueError, "k must be at least 1")
    empty = {"input": make.normal(4, 0), "k": 1}
    yield ErrorInput("empty rows", empty, ValueError, "input must have entries along dim")


def _row_nan_samples(make: Maker) -> Iterator[NanSample]:
    for value in (make.normal(4, 6), make.normal(4, 6).abs().neg()):
        value[2, 3] = math.nan
        expected = torch.zeros(4, 6, dtype=torch.bool)
        expected[2] = True
        yield NanSample({"input": value, "k": 2}, expected)


def _row_sized(make: Maker, n: int) -> Arguments:
    return {"input": make.normal(n, 6), "k": 3}


def _row_large(make: Maker) -> Iterator[Sample]:
    yield Sample("rows", {"input": make.normal(300, 1000), "k": 100})


def _count(sample: Sample, output: Tensor) -> Tensor:
    return (output != 0).sum(sample.arguments.get("dim", -1) if output.dim() else 0)


def _sparse(sample: Sample, output: Tensor) -> None:
    assert bool((_count(sample, output) <= max(sample.arguments["k"], 0)).all())


def _not_negative(sample: Sample, output: Tensor) -> None:
    assert bool((output >= 0).all())


def _total(sample: Sample, output: Tensor) -> None:
    dim = sample.arguments.get("dim", -1) if output.dim() else 0
    total = sample.arguments.get("total", 1.0)
    error = (output.double().sum(dim) - total).abs() / total
    assert bool((error <= 4 * torch.finfo(output.dtype).eps).all())


def _inside(sample: Sample, output: Tensor) -> None:
    dim = sample.arguments.get("dim", -1) if output.dim() else 0
    radius = sample.arguments.get("radius", 1.0)
    norms = torch.linalg.vector_norm(output.double(), dim=dim)
    assert bool((norms <= radius * (1 + 4 * torch.finfo(output.dtype).eps)).all())


def _kept_bits(sample: Sample, output: Tensor) -> None:
    assert bool(((output == 0) | (output == sample.arguments["input"])).all())


_COMPOSITE = "reference raw_inputs_unwritten opcheck engine_kernels traffic cuda_kernels"
_NOT_APPLICABLE = {
    **dict.fromkeys(_COMPOSITE.split(), "made of torch's operators, with none of ours beneath"),
    "export": "no operator of ours is in the program: see test_projections.py",
}


def _rows(name: str, **options: Any) -> OpSpec:
    return OpSpec(
        name=name,
        function=getattr(fusee, name),
        sized=_row_sized,
        batch_dims={"input": 0},
        differentiable=("input",),
        raw={},
        autocast_dtype=lambda dtype, cast: dtype,
        nan_samples=_row_nan_samples,
        large=_row_large,
        not_applicable=_NOT_APPLICABLE,
        **options,
    )


RECORDS = [
    OpSpec(
        name="project_top_k_groups",
        function=fusee.project_top_k_groups,
        samples=_group_samples,
        error_inputs=_group_errors,
        oracle=groups_oracle,
        sized=_group_sized,
        batch_dims={"input": 1},
        differentiable=("input",),
        raw={"prox_group_envelope": (0, 3, 4), "prox_group_envelope_backward": (0, 1, 6, 7)},
        autocast_dtype=lambda dtype, cast: dtype,
        properties={"what is kept has the same bits": _kept_bits},
        nan_samples=_group_nan_samples,
        not_batched=("weights",),
        large=lambda make: [Sample("groups", {"input": make.normal(300, 1000), "k": 100})],
        not_applicable=dict.fromkeys(
            ("traffic", "cuda_kernels"), "the kernels are those of prox_group_envelope"
        ),
    ),
    _rows(
        "project_top_k_nonnegative",
        samples=_row_samples,
        error_inputs=_row_errors,
        oracle=nonnegative_oracle,
        properties={"sparse": _sparse, "not negative": _not_negative, "the same bits": _kept_bits},
    ),
    _rows(
        "project_top_k_simplex",
        samples=partial(_with_size, name="total", least=1),
        error_inputs=_simplex_errors,
        oracle=simplex_oracle,
        properties={"sparse": _sparse, "not negative": _not_negative, "total": _total},
    ),
    _rows(
        "project_top_k_ball",
        samples=partial(_with_size, name="radius"),
        error_inputs=partial(_size_errors, name="radius"),
        oracle=ball_oracle,
        properties={"sparse": _sparse, "inside": _inside},
    ),
]
