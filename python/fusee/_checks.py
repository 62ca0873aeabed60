"""Checks of arguments: what was given, and what it must be, by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusee._op import is_readable

FLOATING_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_tensor(name: str, value: Any) -> None:
    """Raises TypeError unless ``value`` is a dense tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")


def check_floating(name: str, value: Any) -> None:
    """Raises TypeError unless ``value`` is a tensor of one of the four floating dtypes."""
    check_tensor(name, value)
    if value.dtype not in FLOATING_DTYPES:
        raise TypeError(
            f"{name} must have dtype float32, float64, bfloat16 or float16, got {value.dtype}"
        )


def check_same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raises ValueError unless the two tensors are on the same device."""
    if value.device != other.device:
        raise ValueError(
            f"{name} must be on the same device as {other_name}, got {value.device} and "
            f"{other.device}"
        )


def check_beside(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raises unless the tensor of a matrix product has the device of the other one, and, where autocast
    does not see to it, its dtype."""
    check_same_device(name, value, other_name, other)
    if value.dtype != other.dtype and not autocast_enabled(other):
        raise TypeError(
            f"{name} must have the dtype of {other_name} {other.dtype}, got {value.dtype}"
        )


def check_dim(dim: Any, ndim: int) -> int:
    """The dimension counted from the front; IndexError when out of range, as in torch."""
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be an int, got {type(dim).__name__}")
    extent = max(ndim, 1)
    if not -extent <= dim < extent:
        raise IndexError(f"dim must be in [{-extent}, {extent - 1}], got {dim}")
    return dim % extent


def require_values(
    tensor: Tensor, violations: Callable[[], Tensor], raise_error: Callable[[], None]
) -> bool:
    """Enforces a condition that only the values show.

    Calls ``raise_error`` unless ``violations()`` is zero: in eager mode for CPU tensors, and
    everywhere under ``FUSEE_CHECK_VALUES=1`` (a RuntimeError in compiled code). Elsewhere nothing
    is read back from the device, and the operator marks what it touches with NaN.

    Returns whether the values were read, and are right.
    """
    always = os.environ.get("FUSEE_CHECK_VALUES") == "1"
    if torch.compiler.is_compiling():
        if always:
            torch._assert_async(
                violations() == 0, "fusee: a value of an argument is out of its range"
            )
        return False
    if not ((always or tensor.device.type == "cpu") and is_readable(tensor)):
        return False
    if violations().item() != 0:
        raise_error()
    return True


def autocast_enabled(tensor: Tensor) -> bool:
    """Whether autocast is on for the tensor's device; there are devices that know none."""
    device = tensor.device.type
    known = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    return known and torch.is_autocast_enabled(device)


def autocast_product(*tensors: Tensor | None) -> list[Any]:
    """The tensors of a matrix product as autocast casts them: to its dtype, but float64 stays."""
    first = next(tensor for tensor in tensors if tensor is not None)
    if not autocast_enabled(first):
        return list(tensors)
    low = torch.get_autocast_dtype(first.device.type)
    return [t if t is None or t.dtype == torch.float64 else t.to(low) for t in tensors]


def has_twice(tensors: Sequence[Tensor]) -> bool:
    """Whether the same tensor is among ``tensors`` twice."""
    if torch.compiler.is_compiling():  # torch before 2.13 traces no id()
        return any(a is b for i, a in enumerate(tensors) for b in tensors[:i])
    return len({id(tensor) for tensor in tensors}) != len(tensors)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over a tensor of ``dtype`` are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32
