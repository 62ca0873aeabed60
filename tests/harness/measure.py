"""How results are compared: norms, units of the last place, and the error bound of the library."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.harness.spec import Arguments, OpSpec, of_floats

CAPS = {torch.float32: 1e-5, torch.float64: 1e-12}
"""The relative error that no result may exceed, whatever the straightforward computation does."""


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of ``expected``, in float64.

    Places where both are the same infinity or both NaN agree; where only one is, the error is
    infinite. Where all of ``expected`` is zero it is the norm of the difference.
    """
    actual, expected = actual.detach().double(), expected.detach().double()
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {tuple(actual.shape)}, not {tuple(expected.shape)}")
    finite = actual.isfinite() & expected.isfinite()
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    if not bool((finite | same).all()):
        return float("inf")
    difference = torch.where(finite, actual - expected, 0).norm()
    size = torch.where(finite, expected, 0).norm()
    return float(difference / size) if size > 0 else float(difference)


def ulps(actual: Tensor, expected: Tensor, least: float = 0.0) -> float:
    """The largest difference, in units of the last place of the largest element of ``expected``, or
    of ``least`` where that is larger."""
    eps = torch.finfo(expected.dtype).eps if expected.is_floating_point() else 1.0
    actual, expected = actual.detach().double(), expected.detach().double()
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {tuple(actual.shape)}, not {tuple(expected.shape)}")
    finite = actual.isfinite() & expected.isfinite()
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    if not bool((finite | same).all()):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    difference = torch.where(finite, actual - expected, 0).abs().max()
    size = max(float(torch.where(finite, expected, 0).abs().max()), least)
    return float(difference) / (size or 1.0) / eps


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    """Whether two tensors hold the same bits, NaN and signed zeros included."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    kind = integer[actual.element_size()]
    flat = [t.detach().contiguous().reshape(-1).view(kind) for t in (actual, expected)]
    return torch.equal(*flat)


def straightforward(spec: OpSpec, arguments: Arguments) -> Tensor:
    """What a user would write, in the dtype of the arguments."""
    if spec.straightforward is not None:
        return spec.straightforward(**arguments)
    return spec.oracle(**of_floats(arguments, accumulation(dtype_of(arguments))))


def dtype_of(arguments: Arguments) -> torch.dtype:
    """The dtype of a call: that of its first floating-point tensor."""
    return next(
        v.dtype for v in arguments.values() if isinstance(v, Tensor) and v.is_floating_point()
    )


def check_error(
    actual: Tensor,
    plain: Tensor,
    exact: Tensor,
    what: str,
    given: torch.dtype = torch.float64,
    *,
    half_inside: bool = False,
) -> None:
    """Holds a result to the error bound of DESIGN.md.

    At most twice the error of the straightforward computation ``plain`` against ``exact``
    (float64); in float32 and float64, unless computed from half types (``given``), never more than
    ``CAPS``. The straightforward result of a handful of numbers may be exact by luck, so the least
    that is asked for is 8 units of the last place of the accumulation dtype, and half types' own
    rounding: of the result, or (``half_inside``) of what it is made from.
    """
    dtype = actual.dtype
    error = relative_error(actual, exact)
    least = 8 * torch.finfo(accumulation(dtype)).eps
    if dtype not in CAPS:
        least += torch.finfo(dtype).eps
    elif half_inside and given not in CAPS:
        least += torch.finfo(given).eps
    bound = max(2 * relative_error(plain.to(dtype), exact), least)
    if given in CAPS:
        bound = min(bound, CAPS.get(dtype, float("inf")))
    assert error <= bound, f"{what}: error {error:.3g}, bound {bound:.3g} in {dtype}"
