"""Groups of the elements of a tensor: by dimensions, with weights."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fusee._checks import (
    accumulate_dtype,
    check_dim,
    check_floating,
    check_same_device,
    require_values,
)
from fusee._op import is_readable

Dims = int | Sequence[int]
Weights = str | Tensor | None

_MOST = int(sys.float_info.max)


@dataclass(slots=True)
class Folded:
    """A tensor as (1, outer, groups, inner), without a copy where its strides allow it."""

    tensor: Tensor
    order: list[int]
    """The dimensions in the order in which they were folded; none where that is their own."""
    shape: torch.Size

    def unfold(self, result: Tensor) -> Tensor:
        """Gives an elementwise result, shaped as ``tensor``, the original shape."""
        if not self.order:
            return result.reshape(self.shape)
        moved = result.reshape([self.shape[d] for d in self.order])
        back = [self.order.index(d) for d in range(len(self.order))]
        return moved.permute(back)

    @property
    def groups(self) -> int:
        return self.tensor.shape[2]

    @property
    def size(self) -> int:
        """How many elements a group has."""
        return self.tensor.shape[1] * self.tensor.shape[3]


def check_dims(dim: Any, ndim: int) -> list[int]:
    """The dimensions that number the groups, counted from the front, in order."""
    if isinstance(dim, Integral):
        one = check_dim(as_index(dim), ndim)
        return [one] if ndim else []
    if not isinstance(dim, Sequence) or isinstance(dim, str):
        raise TypeError(f"dim must be an int or a sequence of ints, got {type(dim).__name__}")
    dims = sorted(check_dim(as_index(d), ndim) for d in dim)
    if len(set(dims)) != len(dims):
        raise ValueError(f"dim must not repeat a dimension, got {tuple(dim)}")
    return dims if ndim else []


def as_index(value: Any) -> Any:
    """An integer of another library as an int; anything else as it is."""
    foreign = isinstance(value, Integral) and not isinstance(value, int)
    return operator.index(value) if foreign else value


def as_number(value: Any) -> float | None:
    """A real number as an int or float, infinite where a float is; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    if not isinstance(value, (int, float)):
        value = as_index(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, int) and not -_MOST <= value <= _MOST:
        return math.inf if value > 0 else -math.inf
    return value


def check_no_dim(dim: Any) -> None:
    """With a table of groups there is no dimension that numbers them."""
    if dim != 0:
        raise ValueError(f"dim must not be given together with groups, got {dim}")


def fold_groups(input: Tensor, dim: Dims) -> Folded:
    """Folds ``input`` along the dimensions that number its groups; with none it is one group."""
    shape = input.shape
    if len(shape) == 1 and dim == 0 and type(dim) is int:
        return Folded(input.reshape(1, 1, shape[0], 1), [], shape)
    dims = check_dims(dim, len(shape))
    first, end = (dims[0], dims[0] + len(dims)) if dims else (0, 0)
    if len(dims) <= 1 or dims == list(range(first, end)):
        counts = math.prod(shape[:first]), math.prod(shape[first:end]), math.prod(shape[end:])
        return Folded(input.reshape(1, *counts), [], shape)
    others = [d for d in range(len(shape)) if d not in dims]
    order = dims + others
    groups = math.prod([shape[d] for d in dims])
    size = math.prod([shape[d] for d in others])
    return Folded(input.permute(order).reshape(1, 1, groups, size), order, shape)


def check_weights(weights: Any, input: Tensor, groups: int, size: Any) -> Tensor | None:
    """The weights of the groups, of the accumulation dtype; None for ones."""
    if weights is None:
        return None
    dtype = accumulate_dtype(input.dtype)
    if isinstance(weights, str):
        if weights not in ("size", "inverse_size"):
            raise ValueError(f"weights must be 'size', 'inverse_size' or a Tensor, got {weights!r}")
        value = max(size, 1)
        number = value if weights == "size" else 1 / value
        # Not new_full, which under vmap makes one for each problem.
        return torch.full((groups,), number, dtype=dtype, device=input.device)
    check_floating("weights", weights)
    check_same_device("weights", weights, "input", input)
    if weights.shape != (groups,):
        raise ValueError(f"weights must have shape ({groups},), got {tuple(weights.shape)}")
    d = weights.detach().to(dtype)
    wanted = wanted_in(weights, d, "finite and not negative")
    return marked("weights", d, (d >= 0) & d.isfinite(), wanted)


def wanted_in(given: Tensor, used: Tensor, wanted: str) -> str:
    """What is wanted of values that are used in another dtype than they are given in."""
    return wanted if given.dtype == used.dtype else f"{wanted} in {used.dtype}"


def marked(name: str, value: Tensor, valid: Tensor, wanted: str) -> Tensor:
    """The values, of which those that are not valid raise ValueError, or become NaN."""

    def raise_error() -> None:
        raise ValueError(f"{name} must be {wanted}, got {value[~valid][0].item()}")

    if require_values(value, lambda: (~valid).sum(), raise_error):
        return value
    return value + torch.where(valid, 0.0, math.nan)  # which keeps the gradient NaN too


def marked_number(name: str, value: Tensor, *, positive: bool) -> Tensor:
    """``k`` or ``lam`` as :func:`marked`: not NaN, and not negative where it must be positive."""
    if positive:
        return marked(name, value, value >= 0, "not negative")
    return marked(name, value, ~value.isnan(), "not NaN")


@lru_cache(maxsize=256)
def _number(value: float) -> Tensor:
    """A number as a tensor on the CPU: making one takes as long as the operator on a few groups."""
    with _disable_current_modes(), torch.inference_mode(False):
        return torch.full((1,), value, dtype=torch.float64, device="cpu")


def check_scalar(name: str, value: Any, input: Tensor, *, positive: bool) -> Tensor:
    """``k`` or ``lam``, a number or a tensor of one element, as a float64 tensor of shape (1,)."""
    if type(value) in (int, float) and 0 <= value <= _MOST and input.is_cpu:
        plain = not torch.compiler.is_compiling() and is_readable(input)
        if plain:  # as in most calls
            return _number(value)
    # There are devices without float64.
    dtype = torch.float32 if input.device.type == "mps" else torch.float64
    if isinstance(value, Tensor):
        if value.dtype.is_complex or value.dtype == torch.bool:
            raise TypeError(f"{name} must be real, got dtype {value.dtype}")
        check_same_device(name, value, "input", input)
        if value.numel() != 1:
            raise ValueError(f"{name} must have one element, got shape {tuple(value.shape)}")
        value = value.reshape(1).to(dtype)
        return marked_number(name, value, positive=positive)
    number = as_number(value)
    if number is None:
        raise TypeError(f"{name} must be a number or a Tensor, got {type(value).__name__}")
    value = number
    if value != value or (positive and value < 0):
        wanted = "not be negative" if positive else "not be NaN"
        raise ValueError(f"{name} must {wanted}, got {value}")
    return torch.full((1,), value, dtype=dtype, device=input.device)
