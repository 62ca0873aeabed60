"""The record of ``fusee.stablemax_cross_entropy``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import fusee
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.harness.measure import accumulation
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
from tests.losses.record_stablemax import symlog


def cross_entropy_of_symlog(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    dim: int = 1,
) -> Tensor:
    """StableMax cross entropy as torch's own cross entropy of transformed logits, row by row."""
    dim = 0 if input.dim() == 1 else dim
    classes = input.shape[dim]
    probabilities = target.is_floating_point()
    moved = symlog(input).movedim(dim, -1)
    logits = moved.reshape(-1, classes)
    target = target.movedim(dim, -1).reshape(-1, classes) if probabilities else target.reshape(-1)
    target = target if probabilities else target.long()
    options: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    if z_loss == 0 and reduction != "none":
        return F.cross_entropy(logits, target, weight, reduction=reduction, **options)
    rows = F.cross_entropy(logits, target, weight, reduction="none", **options)
    kept = torch.ones_like(rows) if probabilities else (target != ignore_index).to(rows.dtype)
    rows = rows + z_loss * logits.logsumexp(1).square() * kept
    if reduction == "none":
        return rows.reshape(moved.shape[:-1])
    if reduction == "sum":
        return rows.sum()
    if not probabilities and weight is not None:
        kept = kept * weight[target.clamp(min=0)]
    return rows.sum() / kept.sum()


def _samples(make: Maker) -> Iterator[Sample]:
    def call(*shape: int, classes: int = 5, scale: float = 1.0, **options: Any) -> Arguments:
        """Logits with their classes in dimension 1, and class indices."""
        logits = make.normal(shape[0], classes, *shape[1:], scale=scale)
        return {"input": logits, "target": make.integers(classes, *shape), **options}

    def soft(*shape: int, **options: Any) -> Arguments:
        target = make.uniform(*shape)
        target = target / target.sum(1, keepdim=True)
        return {"input": make.normal(*shape), "target": target, **options}

    yield Sample("mean", call(4), tiny=True)
    yield Sample("sum", call(4, reduction="sum"), tiny=True)
    yield Sample("none", call(4, reduction="none"), tiny=True)
    yield Sample("inner dims", call(2, 3, 2, reduction="none"), tiny=True)
    one = {"input": make.normal(5), "target": make.tensor(3, torch.int64)}
    yield Sample("one dimension", one, tiny=True)
    last = {"input": make.normal(2, 3, 5), "target": make.integers(5, 2, 3), "dim": -1}
    yield Sample("last dim", last, tiny=True)
    first = {"input": make.normal(5, 4), "target": make.integers(5, 4), "dim": 0}
    yield Sample("first dim", first, tiny=True)
    yield Sample("smoothed", call(4, label_smoothing=0.2, reduction="none"), tiny=True)
    yield Sample("all smooth", call(4, label_smoothing=1.0), tiny=True)
    yield Sample("weights", call(4, weight=make.uniform(5, low=0.1)), tiny=True)
    both = call(4, weight=make.uniform(5, low=0.1), label_smoothing=0.3, reduction="sum")
    yield Sample("weights and smoothing", both, tiny=True)
    yield Sample("z loss", call(4, z_loss=0.1, reduction="none"), tiny=True)
    everything = call(6, weight=make.uniform(5), label_smoothing=0.1, z_loss=0.2, ignore_index=2)
    yield Sample("everything", everything, tiny=True)
    target = make.tensor([1, -100, 4, -100], torch.int64)
    yield Sample("ignored", {"input": make.normal(4, 5), "target": target}, tiny=True)
    yield Sample("a class ignored", call(6, ignore_index=1, reduction="none"), tiny=True)
    yield Sample("probabilities", soft(4, 5), tiny=True)
    options = {"weight": make.uniform(5), "label_smoothing": 0.2, "reduction": "none"}
    yield Sample("probabilities, weights", soft(2, 5, 3, **options), tiny=True)
    yield Sample("probabilities, z loss", soft(4, 5, z_loss=0.1, reduction="sum"), tiny=True)
    yield Sample("one class", call(3, classes=1, reduction="none"), tiny=True, smooth=False)
    yield Sample("no rows, sum", call(0, reduction="sum"), tiny=True)
    yield Sample("no rows, none", call(0, 3, reduction="none"), tiny=True)
    yield Sample("no rows, mean", call(0), tiny=True, smooth=False)
    logits = make.tensor([[0.0, 1.0, -0.0, -1.0], [0.0] * 4, [1.0] * 4])
    at_kinks = {"input": logits, "target": make.tensor([1, 2, 0], torch.int64)}
    yield Sample("at the kinks", at_kinks, tiny=True, smooth=False)
    masked = make.tensor([[1.0, -math.inf, 2.0, -math.inf], [-math.inf, 0.5, -3.0, 1.0]])
    arguments = {"input": masked, "target": make.tensor([2, 1], torch.int64)}
    yield Sample("masked", arguments, tiny=True, smooth=False)
    for classes in (8, 31, 113, 1000):
        yield Sample(f"{classes} classes", call(9, classes=classes, scale=3, reduction="none"))
    yield Sample("narrow rows", call(301, classes=11))
    yield Sample("inner 37", call(3, 37, classes=29, reduction="none"))
    yield Sample("wide, smoothed", call(7, classes=500, label_smoothing=0.1))
    yield Sample("spread", call(6, classes=257, scale=100, reduction="none"))


def _error_inputs(make: Maker) -> Iterator[ErrorInput]:
    x, y = make.normal(3, 5), make.integers(5, 3)
    given = {"input": x, "target": y}

    def error(
        name: str, error: type[Exception], match: str, values: bool = False, **changed: Any
    ) -> ErrorInput:
        return ErrorInput(name, {**given, **changed}, error, match, values)

    yield error("input not a tensor", TypeError, "input must be a Tensor", input=[1.0])
    yield error("input of integers", TypeError, "input must have dtype", input=y)
    yield error("input a scalar", ValueError, "input must have a dimension", input=x[0, 0])
    yield error("no classes", ValueError, "input must have at least one class", input=x[:, :0])
    yield error("target not a tensor", TypeError, "target must be a Tensor", target=1)
    yield error("target of bool", TypeError, "target must hold .*bool", target=y > 0)
    yield error("target too short", ValueError, r"target .*\(3,\), got \(2,\)", target=y[:2])
    yield error("target too deep", ValueError, "target", target=y[:, None, None])
    yield error("soft target's shape", ValueError, "target with prob", target=x[:, :3])
    yield error("target on another device", ValueError, "target .*device", target=y.to("meta"))
    soft = {"target": x.softmax(1), "ignore_index": 1}
    yield error("ignore_index with soft target", ValueError, "ignore_index must be neg", **soft)
    yield error("ignore_index not an int", TypeError, "ignore_index", ignore_index=1.0)
    yield error("weight's length", ValueError, r"weight .*\(5,\), got \(4,\)", weight=x[0, :4])
    yield error("weight not a tensor", TypeError, "weight must be a Tensor", weight=[1.0] * 5)
    yield error("weight of integers", TypeError, "weight must have dtype", weight=y)
    wants = x[0].abs().requires_grad_()
    yield error("weight with gradient", ValueError, "weight must not require", weight=wants)
    weight = x[0].abs().to("meta")
    yield error("weight on another device", ValueError, "weight .*device", weight=weight)
    yield error("reduction", ValueError, "reduction must be one of .*'avg'", reduction="avg")
    yield error("smoothing above", ValueError, "label_smoothing .*1.5", label_smoothing=1.5)
    yield error("smoothing below", ValueError, "label_smoothing .*-0.1", label_smoothing=-0.1)
    yield error("smoothing NaN", ValueError, "label_smoothing .*nan", label_smoothing=math.nan)
    yield error("smoothing a string", TypeError, "label_smoothing", label_smoothing="0.1")
    yield error("z_loss below", ValueError, "z_loss .*-1", z_loss=-1.0)
    yield error("dim out of range", IndexError, "dim must be in", dim=2)
    yield error("dim not an int", TypeError, "dim must be an int", dim=None)
    high = make.tensor([1, 5, 0], torch.int64)
    yield error(
        "target too high", IndexError, r"target must be in \[0, 4\].*got 5", True, target=high
    )
    low = make.tensor([1, -1, 0], torch.int64)
    yield error("target negative", IndexError, "target must be in .*got -1", True, target=low)
    negative = x[0].abs() - 100
    yield error("weight negative", ValueError, "weight must not be neg", True, weight=negative)


def _nan_samples(make: Maker) -> Iterator[NanSample]:
    for column in (0, 4):
        x = make.normal(4, 6)
        x[2, column] = math.nan
        expected = make.tensor([False, False, True, False], torch.bool)
        target = make.tensor([1, 3, 4, 0], torch.int64)
        yield NanSample({"input": x, "target": target, "reduction": "none"}, expected)


def _large(make: Maker) -> Iterator[Sample]:
    for name, n, classes in (("rows", 300, 1000), ("long", 5, 60001), ("narrow", 30001, 11)):
        arguments = {"input": make.normal(n, classes), "target": make.integers(classes, n)}
        yield Sample(name, arguments)
        yield Sample(f"{name}, none", {**arguments, "reduction": "none", "label_smoothing": 0.1})
    inner = {"input": make.normal(70, 9, 601), "target": make.integers(9, 70, 601)}
    yield Sample("inner", inner)


def _not_negative(sample: Sample, output: Tensor) -> None:
    assert bool(((output >= 0) | output.isnan()).all()), "the loss is negative"


def _sized(make: Maker, n: int) -> Arguments:
    return {"input": make.normal(n, 7), "target": make.integers(7, n)}


def _bytes(arguments: Arguments) -> tuple[int, int]:
    """Forward (one launch over the rows, one over their sums) reads logits and targets, and writes
    a loss and two statistics a row; backward reads logits, targets, statistics and the gradient of
    the loss, and writes the gradient."""
    x, y = arguments["input"], arguments["target"]
    size, rows = x.numel() * x.element_size(), y.numel()
    number = 8 if x.dtype == torch.float64 else 4
    return size + rows * (8 + 3 * number), 2 * size + rows * (8 + 3 * number)


def _traffic(n: int, classes: int, **options: Any) -> Any:
    return lambda make: {
        "input": make.normal(n, classes),
        "target": make.integers(classes, n),
        "reduction": "none",
        **options,
    }


RECORDS = [
    OpSpec(
        name="stablemax_cross_entropy",
        function=fusee.stablemax_cross_entropy,
        samples=_samples,
        error_inputs=_error_inputs,
        oracle=cross_entropy_of_symlog,
        sized=_sized,
        batch_dims={"input": 0, "target": 0},
        differentiable=("input", "target"),
        raw={
            "stablemax_cross_entropy": (0, 1),
            "stablemax_cross_entropy_backward": (0, 1, 2),
        },
        output_dtype=accumulation,
        autocast_dtype=lambda dtype, cast: accumulation(dtype),
        properties={"not negative": _not_negative},
        nan_samples=_nan_samples,
        large=_large,
        not_batched=("weight",),
        traffic=(
            Traffic("rows", _traffic(8, 4096), (2, 1), _bytes),
            Traffic("narrow rows", _traffic(1024, 11), (2, 1), _bytes),
        ),
        cuda_kernels=(
            CudaKernel(
                r"run_rows<BlockRow<RowData<\w+, \w+, (true, true|false, false)> ?>, For", False
            ),
            CudaKernel(
                r"run_rows<ThreadRow<RowData<\w+, \w+, (true, true|false, false)> ?>, Forward"
            ),
            CudaKernel(r"run_rows<(Block|Thread)Row<.*, Backward"),
        ),
    )
]
