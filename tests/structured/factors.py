"""What the records of products with structured matrices share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tests.harness.spec import Arguments, ErrorInput, Maker


def product_errors(given: Arguments, factor: str, make: Maker) -> Iterator[ErrorInput]:
    """Calls that must raise, changes of ``given`` with its input, bias and one ``factor``."""
    x, w, bias = given["input"], given[factor], given["bias"]

    def error(name: str, kind: type[Exception], match: str, **changed: Any) -> ErrorInput:
        return ErrorInput(name, {**given, **changed}, kind, match)

    integers = make.integers(3, *x.shape)
    yield error("input not a tensor", TypeError, "input must be a Tensor", input=[1.0])
    yield error("input of integers", TypeError, "input must have dtype", input=integers)
    yield error("input a scalar", ValueError, "input must have .* features", input=x[0, 0])
    yield error("input too short", ValueError, "input must have .* features", input=x[:, 1:])
    yield error("bias too short", ValueError, "bias must have shape", bias=bias[1:])
    yield error("bias of two dimensions", ValueError, "bias must have shape", bias=bias[None])
    yield error("bias not a tensor", TypeError, "bias must be a Tensor", bias=1.0)
    yield error("bias's dtype", TypeError, "bias must have the dtype of input", bias=_other(bias))
    yield error("bias's device", ValueError, "bias .*device", bias=bias.to("meta"))

    def of_factor(name: str, kind: type[Exception], match: str, value: Any) -> ErrorInput:
        return error(f"{factor} {name}", kind, f"{factor} {match}", **{factor: value})

    yield of_factor("not a tensor", TypeError, "must be a Tensor", None)
    yield of_factor("a matrix", ValueError, "must have three dimensions", w[0])
    yield of_factor("without blocks", ValueError, "must have at least one block", w[:0])
    yield of_factor("of another dtype", TypeError, "must have the dtype of input", _other(w))
    yield of_factor("on another device", ValueError, ".*device", w.to("meta"))


def _other(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.float64 if tensor.dtype != torch.float64 else torch.float32)


def product_dtype(dtype: torch.dtype, cast: torch.dtype) -> torch.dtype:
    """What autocast makes of a matrix product."""
    return dtype if dtype == torch.float64 else cast


LINEAR = {"nan": "a gradient of a product has none of what it is of: see test_monarch_matmul.py"}

TENSOR_CORES = r"<(BFloat16|Half|Tf32),"
"""The instantiations that multiply on tensor cores."""
