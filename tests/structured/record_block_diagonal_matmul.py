"""The record of ``fusee.block_diagonal_matmul``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fusee
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.harness.spec import Arguments, CudaKernel, ErrorInput, Maker, OpSpec, Sample, Traffic
from tests.structured.factors import LINEAR, TENSOR_CORES, product_dtype, product_errors


def _oracle(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The dense product with the blocks among zeros."""
    return F.linear(input, torch.block_diag(*weight.unbind()), bias)


def _call(
    make: Maker, shape: tuple[int, ...], blocks: int, q: int, p: int, bias: bool = False
) -> Arguments:
    weight = make.normal(blocks, q, p, scale=max(p, 1) ** -0.5)
    given: Arguments = {"input": make.normal(*shape, blocks * p), "weight": weight}
    return {**given, "bias": make.normal(blocks * q)} if bias else given


def _samples(make: Maker) -> Iterator[Sample]:
    yield Sample("two blocks", _call(make, (3,), 2, 3, 2), tiny=True)
    yield Sample("bias", _call(make, (2,), 3, 2, 2, bias=True), tiny=True)
    yield Sample("one vector", _call(make, (), 2, 2, 3), tiny=True)
    yield Sample("leading dimensions", _call(make, (2, 1, 2), 2, 1, 2, bias=True), tiny=True)
    yield Sample("one block", _call(make, (2,), 1, 3, 2), tiny=True)
    yield Sample("blocks of one", _call(make, (2,), 4, 1, 1, bias=True), tiny=True)
    yield Sample("no rows", _call(make, (0,), 2, 3, 2, bias=True), tiny=True)
    yield Sample("no inputs", _call(make, (2,), 2, 3, 0, bias=True), tiny=True)
    yield Sample("no outputs", _call(make, (2,), 2, 0, 3), tiny=True)
    for rows, blocks, q, p in (
        (1, 7, 33, 17),
        (5, 4, 16, 64),
        (17, 3, 40, 24),
        (70, 2, 9, 130),
        (33, 5, 65, 8),
    ):
        name = f"{rows} rows, {blocks} of {q} x {p}"
        yield Sample(name, _call(make, (rows,), blocks, q, p, bias=rows % 2 == 1))


def _error_inputs(make: Maker) -> Iterator[ErrorInput]:
    given = _call(make, (3,), 2, 3, 2, bias=True)
    yield from product_errors(given, "weight", make)


def _large(make: Maker) -> Iterator[Sample]:
    yield Sample("rows", _call(make, (600,), 4, 48, 32, bias=True))
    yield Sample("blocks", _call(make, (3,), 64, 64, 64))


def _sized(make: Maker, n: int) -> Arguments:
    return _call(make, (n,), 2, 3, 2, bias=True)


def _bytes(arguments: Arguments) -> tuple[int, int]:
    """Forward reads both and writes the result. Backward has two kernels, as the gradient of the weight
    needs all rows: each reads the gradient and one of both, and writes the gradient of the other."""
    x, w = arguments["input"], arguments["weight"]
    output = x.numel() // w.shape[2] * w.shape[1]
    size = x.element_size()
    both = x.numel() + w.numel()
    return size * (both + output), 2 * size * (both + output)


def _traffic(make: Maker) -> Arguments:
    return _call(make, (32,), 8, 32, 32)


def _linear(sample: Sample, output: Tensor) -> None:
    """Twice the input gives twice the output, to the bit."""
    given = {**sample.arguments, "bias": None}
    twice = fusee.block_diagonal_matmul(**{**given, "input": 2 * given["input"]})
    assert torch.equal(twice, 2 * fusee.block_diagonal_matmul(**given))


def _spec(**changed: Any) -> OpSpec:
    return OpSpec(
        name="block_diagonal_matmul",
        function=fusee.block_diagonal_matmul,
        samples=_samples,
        error_inputs=_error_inputs,
        oracle=_oracle,
        sized=_sized,
        batch_dims={"input": 0},
        differentiable=("input", "weight", "bias"),
        raw={
            "block_diagonal_matmul": (0, 1, 2),
            "block_diagonal_matmul_backward": (0, 1, 2),
        },
        large=_large,
        properties={"linear": _linear},
        traffic=(Traffic("rows", _traffic, (1, 2), _bytes),),
        cuda_kernels=(
            CudaKernel(r"\bblock_product<", tensor_cores=TENSOR_CORES),
            CudaKernel(r"\bweight_gradient<", stores=False, tensor_cores=TENSOR_CORES),
        ),
        engine_ulps=32.0,
        not_applicable=LINEAR,
        half_inside=True,
        autocast_dtype=product_dtype,
        **changed,
    )


RECORDS = [_spec()]
