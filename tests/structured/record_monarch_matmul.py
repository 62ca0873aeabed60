"""The record of ``fusee.monarch_matmul``."""

from __future__ import annotations

import math
from collections.abc import Iterator

import fusee
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.harness.spec import Arguments, CudaKernel, ErrorInput, Maker, OpSpec, Sample, Traffic
from tests.structured.factors import LINEAR, TENSOR_CORES, product_dtype, product_errors


def dense_of(w1: Tensor, w2: Tensor) -> Tensor:
    """The explicit matrix, an element of the middle after the other: each adds the outer product of its
    column of w2 and its row of w1, in their places."""
    (k, q, p), (outer, s, _) = w1.shape, w2.shape
    hidden = torch.arange(k * q, device=w1.device)
    rows = w1[hidden // q, hidden % q]
    columns = w2[hidden % outer, :, hidden // outer]
    of_block = F.one_hot(hidden // q, k).to(w1.dtype)
    of_outer = F.one_hot(hidden % outer, outer).to(w1.dtype)
    dense = torch.einsum("hs,hl,hk,hp->slkp", columns, of_outer, of_block, rows)
    return dense.reshape(s * outer, k * p)


def _oracle(input: Tensor, w1: Tensor, w2: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(input, dense_of(w1, w2), bias)


def _straightforward(input: Tensor, w1: Tensor, w2: Tensor, bias: Tensor | None = None) -> Tensor:
    """Two batched products with the permutations between them, in the dtype of the input."""
    (k, _, p), (outer, s, r) = w1.shape, w2.shape
    rows = math.prod(input.shape[:-1])
    columns = input.reshape(rows, k, p).transpose(0, 1)
    hidden = torch.bmm(columns, w1.mT).transpose(0, 1).reshape(rows, r, outer)
    output = torch.bmm(hidden.permute(2, 0, 1), w2.mT).permute(1, 2, 0)
    output = output.reshape(*input.shape[:-1], s * outer)
    return output if bias is None else output + bias


Sizes = tuple[int, int, int, int, int]
"""k, q, p, l, s; r follows."""


def _call(make: Maker, shape: tuple[int, ...], sizes: Sizes, bias: bool = False) -> Arguments:
    k, q, p, outer, s = sizes
    r = k * q // outer
    given: Arguments = {
        "input": make.normal(*shape, k * p),
        "w1": make.normal(k, q, p, scale=max(p, 1) ** -0.5),
        "w2": make.normal(outer, s, r, scale=max(r, 1) ** -0.5),
    }
    return {**given, "bias": make.normal(outer * s)} if bias else given


def _samples(make: Maker) -> Iterator[Sample]:
    yield Sample("square", _call(make, (3,), (2, 2, 2, 2, 2)), tiny=True)
    yield Sample("bias", _call(make, (2,), (2, 2, 3, 2, 2), bias=True), tiny=True)
    yield Sample("one vector", _call(make, (), (2, 2, 1, 2, 3)), tiny=True)
    leading = _call(make, (2, 1, 2), (2, 3, 1, 2, 1), bias=True)
    yield Sample("leading dimensions", leading, tiny=True)
    yield Sample("other blocks in the second", _call(make, (2,), (2, 3, 2, 3, 2)), tiny=True)
    yield Sample("ranks that differ", _call(make, (1,), (3, 4, 1, 6, 1)), tiny=True)
    yield Sample("one block", _call(make, (2,), (1, 2, 3, 1, 2)), tiny=True)
    yield Sample("no rows", _call(make, (0,), (2, 2, 2, 2, 2), bias=True), tiny=True)
    yield Sample("no inputs", _call(make, (2,), (2, 2, 0, 2, 2), bias=True), tiny=True)
    yield Sample("no middle", _call(make, (2,), (2, 0, 2, 2, 2), bias=True), tiny=True)
    yield Sample("no outputs", _call(make, (2,), (2, 2, 2, 2, 0)), tiny=True)
    for rows, sizes in (
        (1, (4, 16, 16, 4, 16)),
        (5, (16, 16, 16, 16, 16)),
        (9, (3, 10, 17, 6, 21)),
        (17, (8, 24, 32, 8, 32)),
        (70, (2, 65, 33, 5, 40)),
        (33, (5, 48, 8, 20, 3)),
    ):
        name = f"{rows} rows, k q p l s {sizes}"
        yield Sample(name, _call(make, (rows,), sizes, bias=rows % 2 == 1))


def _error_inputs(make: Maker) -> Iterator[ErrorInput]:
    given = _call(make, (3,), (2, 2, 3, 2, 3), bias=True)
    yield from product_errors(given, "w1", make)
    for error in product_errors(given, "w2", make):
        if error.name.startswith("w2"):
            yield error
    narrow = {**given, "w2": given["w2"][:, :, 1:]}
    yield ErrorInput("factors do not fit", narrow, ValueError, r"k \* q = l \* r")


def _large(make: Maker) -> Iterator[Sample]:
    yield Sample("rows", _call(make, (600,), (4, 24, 32, 4, 40), bias=True))
    yield Sample("blocks", _call(make, (3,), (32, 64, 64, 32, 64)))


def _sized(make: Maker, n: int) -> Arguments:
    return _call(make, (n,), (2, 2, 3, 2, 2), bias=True)


def _bytes(arguments: Arguments) -> tuple[int, int]:
    """Forward reads the input and both factors and writes the result. Backward has four kernels, as a
    gradient of weights needs all rows: that of the input reads the gradient and both factors, and writes
    its result and the middle's gradient; the middle is made anew from the input and w1; and one each
    for the gradients of w1 and w2 reads two of these and writes its result."""
    x, w1, w2 = (arguments[name] for name in ("input", "w1", "w2"))
    (k, q, p), (outer, s, _) = w1.shape, w2.shape
    rows = x.numel() // (k * p)
    inputs, middle, outputs = rows * k * p, rows * k * q, rows * outer * s
    forward = inputs + outputs + w1.numel() + w2.numel()
    backward = 2 * outputs + 3 * inputs + 4 * middle + 3 * w1.numel() + 2 * w2.numel()
    return x.element_size() * forward, x.element_size() * backward


def _traffic(make: Maker) -> Arguments:
    return _call(make, (32,), (16, 16, 16, 16, 16))


def _linear(sample: Sample, output: Tensor) -> None:
    """Twice the input gives twice the output, to the bit."""
    given = {**sample.arguments, "bias": None}
    twice = fusee.monarch_matmul(**{**given, "input": 2 * given["input"]})
    assert torch.equal(twice, 2 * fusee.monarch_matmul(**given))


RECORDS = [
    OpSpec(
        name="monarch_matmul",
        function=fusee.monarch_matmul,
        samples=_samples,
        error_inputs=_error_inputs,
        oracle=_oracle,
        straightforward=_straightforward,
        sized=_sized,
        batch_dims={"input": 0},
        differentiable=("input", "w1", "w2", "bias"),
        raw={"monarch_matmul": (0, 1, 2, 3), "monarch_matmul_backward": (0, 1, 2, 3)},
        large=_large,
        properties={"linear": _linear},
        traffic=(Traffic("rows", _traffic, (1, 4), _bytes),),
        cuda_kernels=(
            CudaKernel(r"\bmonarch_product<", tensor_cores=TENSOR_CORES),
            CudaKernel(r"\bmonarch_input_gradient<", tensor_cores=TENSOR_CORES),
        ),
        engine_ulps=32.0,
        not_applicable=LINEAR,
        half_inside=True,
        autocast_dtype=product_dtype,
    )
]
