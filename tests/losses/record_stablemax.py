"""The records of ``fusee.stablemax`` and ``fusee.log_stablemax``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import fusee
import torch
import torch.nn.functional as F
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


def symlog(x: Tensor) -> Tensor:
    """sign(x) log(1 + abs(x)), differentiable at zero."""
    return torch.where(x >= 0, x.clamp(min=0).log1p(), -(-x.clamp(max=0)).log1p())


def _oracle(input: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    return F.softmax(symlog(input), dim)


def _log_oracle(input: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    return F.log_softmax(symlog(input), dim)


def _straightforward(
    input: Tensor, dim: int = -1, dtype: torch.dtype | None = None, *, log: bool
) -> Tensor:
    x = input.double() if input.dtype == torch.float64 else input.float()
    s = torch.where(x >= 0, 1 + x.clamp(min=0), 1 / (1 - x.clamp(max=0)))
    total = s.sum(dim, keepdim=True)
    return s.log() - total.log() if log else s / total


def _samples(make: Maker) -> Iterator[Sample]:
    yield Sample("last dim", {"input": make.normal(3, 5)}, tiny=True)
    yield Sample("middle dim", {"input": make.normal(2, 5, 3), "dim": 1}, tiny=True)
    yield Sample("first dim", {"input": make.normal(4, 3), "dim": 0}, tiny=True)
    yield Sample("one dimension", {"input": make.normal(7)}, tiny=True)
    yield Sample("scalar", {"input": make.normal()}, tiny=True)
    yield Sample("one class", {"input": make.normal(4, 1)}, tiny=True)
    yield Sample("no rows", {"input": make.normal(0, 5)}, tiny=True)
    yield Sample("no classes", {"input": make.normal(4, 0)}, tiny=True)
    yield Sample("no inner", {"input": make.normal(2, 5, 0), "dim": 1}, tiny=True)
    yield Sample("cast first", {"input": make.normal(3, 5), "dtype": torch.float64}, tiny=True)
    kinks = [[0.0, -0.0, 1.0, -1.0, 0.5], [0.0] * 5, [1.0] * 5]
    yield Sample("at the kinks", {"input": make.tensor(kinks)}, tiny=True, smooth=False)
    masked = [[1.0, -math.inf, -2.0, 0.5, -math.inf]]
    yield Sample("masked", {"input": make.tensor(masked)}, tiny=True, smooth=False)
    for classes in (8, 31, 64, 113, 1000):
        yield Sample(f"{classes} classes", {"input": make.normal(5, classes, scale=3)})
    yield Sample("narrow rows", {"input": make.normal(301, 11)})
    yield Sample("inner 37", {"input": make.normal(3, 29, 37), "dim": 1})
    yield Sample("spread", {"input": make.normal(6, 257, scale=100)})


def _error_inputs(make: Maker) -> Iterator[ErrorInput]:
    x = make.normal(3, 5)
    yield ErrorInput("not a tensor", {"input": [1.0]}, TypeError, "input must be a Tensor")
    yield ErrorInput("integers", {"input": x.long()}, TypeError, "input must have dtype .*int64")
    yield ErrorInput("bool", {"input": x > 0}, TypeError, "input must have dtype .*bool")
    yield ErrorInput(
        "complex", {"input": make.normal(3, 5, dtype=torch.complex64)}, TypeError, "input"
    )
    yield ErrorInput("dim too large", {"input": x, "dim": 2}, IndexError, r"dim must be in \[-2, 1")
    yield ErrorInput("dim too small", {"input": x, "dim": -3}, IndexError, "dim must be in .*-3")
    yield ErrorInput("dim of a scalar", {"input": x[0, 0], "dim": 1}, IndexError, "dim")
    yield ErrorInput("dim not an int", {"input": x, "dim": 1.0}, TypeError, "dim must be an int")
    yield ErrorInput("cast to int", {"input": x, "dtype": torch.int64}, TypeError, "dtype")


def _nan_samples(make: Maker) -> Iterator[NanSample]:
    for dim in (1, 0):
        x = make.normal(4, 6)
        x.select(1 - dim, 2)[3] = math.nan
        expected = torch.zeros(4, 6, dtype=torch.bool, device=make.device)
        expected.select(1 - dim, 2).fill_(True)
        yield NanSample({"input": x, "dim": dim}, expected)


def _large(make: Maker) -> Iterator[Sample]:
    yield Sample("rows", {"input": make.normal(300, 1000)})
    yield Sample("long rows", {"input": make.normal(5, 60001)})
    yield Sample("narrow rows", {"input": make.normal(30001, 11)})
    yield Sample("inner", {"input": make.normal(70, 9, 601), "dim": 1})


def _sums_to_one(sample: Sample, output: Tensor, *, log: bool) -> None:
    dim = sample.arguments.get("dim", -1)
    if output.numel() == 0:
        return
    terms = output.double().exp() if log else output.double()
    error = (terms.sum(dim) - 1).abs().max()
    assert error <= 8 * torch.finfo(output.dtype).eps, f"a row sums to one within {error}"


def _keeps_order(sample: Sample, output: Tensor) -> None:
    dim = sample.arguments.get("dim", -1)
    if output.numel() <= 1:
        return
    order = sample.arguments["input"].argsort(dim)
    ordered = output.gather(dim, order).movedim(dim, 0)
    assert bool((ordered[1:] >= ordered[:-1]).all())


def _in_range(sample: Sample, output: Tensor, *, log: bool) -> None:
    low, high = (-math.inf, 0.0) if log else (0.0, 1.0)
    assert bool(((output >= low) & (output <= high)).all())


def _sized(make: Maker, n: int) -> Arguments:
    return {"input": make.normal(n, 7)}


def _bytes(arguments: Arguments) -> tuple[int, int]:
    """Forward reads the input and writes the result and a sum of 8 bytes a row; backward reads the
    gradient, the input and the sums, and writes the gradient."""
    x = arguments["input"]
    size, rows = x.numel() * x.element_size(), x.numel() // x.shape[arguments.get("dim", -1)]
    return 2 * size + 8 * rows, 3 * size + 8 * rows


_TRAFFIC = (
    Traffic("rows", lambda make: {"input": make.normal(8, 4096)}, (1, 1), _bytes),
    Traffic("narrow rows", lambda make: {"input": make.normal(1024, 11)}, (1, 1), _bytes),
    Traffic("inner", lambda make: {"input": make.normal(2, 16, 512), "dim": 1}, (1, 1), _bytes),
)


_KERNELS = (
    CudaKernel(r"run_rows<BlockRow<RowData<(\w+), \1, false, true> ?>, Forward"),
    CudaKernel(r"run_rows<ThreadRow<RowData<(\w+), \1, false, true> ?>, Forward"),
    CudaKernel(r"run_rows<(Block|Thread)Row<RowData<(\w+), \2, true, true> ?>, Backward"),
)


def _record(name: str, *, log: bool) -> OpSpec:
    properties = {
        "rows sum to one": partial(_sums_to_one, log=log),
        "the order is kept": _keeps_order,
        "the range": partial(_in_range, log=log),
    }
    return OpSpec(
        name=name,
        function=getattr(fusee, name),
        samples=_samples,
        error_inputs=_error_inputs,
        oracle=_log_oracle if log else _oracle,
        sized=_sized,
        batch_dims={"input": 0},
        differentiable=("input",),
        raw={"stablemax": (0,), "stablemax_backward": (0, 1)},
        straightforward=partial(_straightforward, log=log),
        properties=properties,
        nan_samples=_nan_samples,
        large=_large,
        least_scale=1.0 if log else 0.0,
        not_applicable=_SAME_OPERATOR if log else {},
        traffic=_TRAFFIC,
        cuda_kernels=_KERNELS,
    )


_SAME_OPERATOR = dict.fromkeys(
    ("opcheck", "compile", "aotinductor_package", "saved_program"),
    "one operator serves both: checked through stablemax",
)
RECORDS = [_record("stablemax", log=False), _record("log_stablemax", log=True)]
