"""Arguments of the solver: what was given, as the tensors that operators take."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusee._checks import accumulate_dtype, check_floating, check_same_device

# The first two are those that a compiler knows; NumPy's are of the third.
NUMBERS = (int, float, numbers.Real)

LEAST_REG = 1e-300
"""Of which the inverse is a number."""


def as_tensor(name: str, value: Any) -> Tensor:
    """A floating-point tensor of a tensor, a NumPy array or another array that speaks DLPack."""
    if isinstance(value, np.ndarray):
        # A copy where torch could not share the memory: strides below zero, or not to be written.
        array = np.require(value, requirements=["C", "W"])
        try:
            value = torch.from_numpy(array)
        except (TypeError, ValueError):
            raise TypeError(
                f"{name} must have dtype float16, float32 or float64 in this machine's byte order, got "
                f"{array.dtype}"
            ) from None
    elif not isinstance(value, Tensor):
        if not hasattr(value, "__dlpack__"):
            raise TypeError(
                f"{name} must be a Tensor, a NumPy array or an array with __dlpack__, got "
                f"{type(value).__name__}"
            )
        value = torch.utils.dlpack.from_dlpack(value)
    check_floating(name, value)
    return value


def as_batch(name: str, value: Any, shape: str) -> Tensor:
    """One matrix, or a batch of them, in float32 or float64."""
    tensor = as_tensor(name, value)
    if tensor.dim() not in (2, 3):
        raise ValueError(
            f"{name} must have shape {shape} or (B, {shape[1:]}, got {tuple(tensor.shape)}"
        )
    return tensor.to(accumulate_dtype(tensor.dtype))


def beside(x: Tensor, tensor: Tensor) -> Tensor:
    """A tensor to compute with beside x: where x is a DTensor, one that every process holds whole."""
    if "torch.distributed.tensor" not in sys.modules:
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    if isinstance(tensor, DTensor) or not isinstance(x, DTensor):
        return tensor
    mesh = x.device_mesh
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _has_shape(tensor: Tensor, *shapes: tuple[int, ...]) -> bool:
    """Whether it is one of these. Lengths come first: the size of a batch may be a symbol."""
    return any(tensor.dim() == len(shape) and tuple(tensor.shape) == shape for shape in shapes)


def as_masses(name: str, given: Tensor | None, count: int, x_name: str, x: Tensor) -> Tensor:
    """Masses (B, count) in float64, by default uniform of sum one; NaN where they are none."""
    batch = x.shape[:-2]
    if given is None:
        given = x.new_full((count,), 1 / max(count, 1), dtype=torch.float64)
    else:
        check_same_device(name, given, x_name, x)
        if not _has_shape(given, (count,), (*batch, count)):
            allowed = f"({count},)" + (f" or {(*batch, count)}" if batch else "")
            raise ValueError(f"{name} must have shape {allowed}, got {tuple(given.shape)}")
        given = beside(x, given)
    valid = (given >= 0) & (given < math.inf)
    masses = torch.where(valid, given.double(), math.nan)
    return masses.expand(batch[0] if batch else 1, count)


def scaled_to(a: Tensor, b: Tensor, epsilon: float) -> Tensor:
    """b with the sums of a; NaN where they are unequal."""
    of_a, of_b = a.sum(-1, keepdim=True), b.sum(-1, keepdim=True)
    equal = (of_a - of_b).abs() <= epsilon * torch.maximum(of_a, of_b)
    some = of_b > 0
    ratio = torch.where(some, of_a / torch.where(some, of_b, 1.0), 1.0)
    return b * torch.where(equal, ratio, math.nan)


def mass_tolerance(*given: Tensor | None) -> float:
    """By how much the sums of masses of these dtypes may differ, relatively."""
    return max(1e-5, *(0.0 if t is None else torch.finfo(t.dtype).eps for t in given))


def check_number(name: str, value: Any) -> float:
    """A plain number above zero."""
    if isinstance(value, bool) or not isinstance(value, NUMBERS):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    number: float = float(value)
    if not number > 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return number


def check_max_iter(value: Any) -> int:
    """A plain positive int, or one of NumPy's."""
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"max_iter must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"max_iter must be positive, got {value}")
    return min(int(value), 2**63 - 1)


def as_reg(reg: Any, x_name: str, x: Tensor) -> Tensor:
    """The regularisation (B,) in float64; NaN where it is none."""
    batch = x.shape[:-2]
    count = batch[0] if batch else 1
    if isinstance(reg, NUMBERS) or not hasattr(reg, "__dlpack__"):
        number = check_number("reg", reg)
        if not LEAST_REG <= number < math.inf:
            raise ValueError(f"reg must be at least {LEAST_REG} and finite, got {reg}")
        return x.new_full((count,), number, dtype=torch.float64)
    given = as_tensor("reg", reg)
    check_same_device("reg", given, x_name, x)
    if not _has_shape(given, (), tuple(batch)):
        allowed = "()" + (f" or {tuple(batch)}" if batch else "")
        raise ValueError(f"reg must be a number or have shape {allowed}, got {tuple(given.shape)}")
    if given.requires_grad:
        raise ValueError("reg must not require a gradient: there is none in it")
    given = beside(x, given)
    given = given.double()
    valid = (given >= LEAST_REG) & (given < math.inf)
    return torch.where(valid, given, math.nan).expand(count)


def as_penalty(unbalanced: Any, x: Tensor) -> tuple[Tensor, bool]:
    """The weights (B, 2) of both marginals' divergences, and whether both marginals hold."""
    if unbalanced is None:
        pair: Sequence[float] = (math.inf, math.inf)
    elif isinstance(unbalanced, (tuple, list)):
        if len(unbalanced) != 2:
            raise ValueError(
                f"unbalanced must be a number or a pair, got {len(unbalanced)} numbers"
            )
        pair = [check_number("unbalanced", value) for value in unbalanced]
    else:
        pair = [check_number("unbalanced", unbalanced)] * 2
    sides = [x.new_full(x.shape[:-2] or (1,), w, dtype=torch.float64) for w in pair]
    return torch.stack(sides, -1), pair[0] == pair[1] == math.inf


def as_first(potentials_init: Any, n: int, m: int, x_name: str, x: Tensor) -> Tensor | None:
    """The potentials (B, m) of the columns to begin with; those of the rows follow from them."""
    if potentials_init is None:
        return None
    if not isinstance(potentials_init, (tuple, list)) or len(potentials_init) != 2:
        raise TypeError(
            f"potentials_init must be a pair of potentials, got {type(potentials_init).__name__}"
        )
    batch = x.shape[:-2]
    for side, count in zip((0, 1), (n, m), strict=True):
        name = f"potentials_init[{side}]"
        first = as_tensor(name, potentials_init[side]).detach().double()
        check_same_device(name, first, x_name, x)
        if not _has_shape(first, (count,), (*batch, count)):
            raise ValueError(f"{name} must have shape {(*batch, count)}, got {tuple(first.shape)}")
    first = beside(x, first)
    first = torch.where(first.isfinite(), first, math.nan)
    return first.expand(batch[0] if batch else 1, m)


def raise_for_values(
    given: dict[str, Tensor],
    masses: dict[str, Tensor],
    reg: Tensor,
    first: Tensor | None,
    tolerance: float,
    *,
    balanced: bool,
) -> None:
    """Says which value made the result NaN. Masses and numbers out of their range are NaN here."""
    if reg.isnan().any():
        raise ValueError(f"reg must be at least {LEAST_REG} and finite")
    for name, mass in masses.items():
        if mass.isnan().any():
            raise ValueError(f"{name} must be finite and not negative")
    if first is not None and first.isnan().any():
        raise ValueError("potentials_init must be finite")
    a, b = masses.values()
    if balanced and scaled_to(a, b, tolerance).isnan().any():
        of_a, of_b = a.sum(-1), b.sum(-1)
        gap = ((of_a - of_b).abs() / torch.maximum(of_a, of_b)).nan_to_num(0)
        worst = int(gap.argmax())
        raise ValueError(
            f"a and b must have equal sums, got {float(of_a[worst]):.9g} and "
            f"{float(of_b[worst]):.9g}, a relative gap of {float(gap[worst]):.3g}; normalise them, or "
            "give unbalanced a weight"
        )
    if len(given) > 1:
        for name, points in given.items():
            if not points.isfinite().all():
                raise ValueError(f"{name} must be finite")
    else:
        for name, costs in given.items():
            _raise_for_costs(name, costs, a, b)
    raise ValueError(
        f"{' and '.join(given)} must have costs of a finite range, potentials_init must be of their size"
    )


def _raise_for_costs(name: str, costs: Tensor, a: Tensor, b: Tensor) -> None:
    if not (costs > -math.inf).all():
        raise ValueError(f"{name} must not hold NaN or -inf")
    possible = costs < math.inf
    for line, masses, partners in (
        ("row", a, (possible & (b > 0).unsqueeze(-2)).any(-1)),
        ("column", b, (possible & (a > 0).unsqueeze(-1)).any(-2)),
    ):
        if ((masses > 0) & ~partners).any():
            raise ValueError(f"{name} has a {line} with mass and forbidden pairs only")
