"""The curves of the weight compander: in plain torch operators, and in NumPy over the whole line."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.harness.helpers import cotangent
from tests.harness.spec import Arguments, ErrorInput, Maker

KINDS = ("arctan", "tanh", "softsign", "asinh", "symlog", "mu_law", "powerprop")
KINKED = ("softsign", "symlog", "mu_law", "powerprop")
"""The kinds whose second derivative jumps at zero, if not the first."""
LIMITS = {"arctan": math.pi / 2, "tanh": 1.0, "softsign": 1.0}
"""The kinds whose results stay within this times ``a``."""


def over_channels(parameter: Any, input: Tensor) -> Any:
    """A parameter shaped to be multiplied with the input; numbers as they are."""
    if not isinstance(parameter, Tensor):
        return parameter
    return (
        parameter.reshape(-1, *(1,) * (input.dim() - 1)) if input.dim() else parameter.reshape(())
    )


def _log1p(x: Any) -> Any:
    return x.log1p() if isinstance(x, Tensor) else math.log1p(x)


def _tanh(t: Tensor) -> Tensor:
    """For t >= 0. The derivative of torch's own, 1 - tanh^2, is wrong where the curve is flat."""
    return 2 / (1 + torch.exp(-2 * t)) - 1


CURVES: dict[str, Callable[..., Tensor]] = {
    "arctan": lambda n, a, b: a * torch.atan(n / b),
    "tanh": lambda n, a, b: a * _tanh(n / b),
    "softsign": lambda n, a, b: a * n / (b + n),
    "asinh": lambda n, a, b: a * torch.asinh(n / b),
    "symlog": lambda n, a, b: a * torch.log1p(n / b),
    "mu_law": lambda n, a, b: a * torch.log1p(b * n / a) / _log1p(b),
    "powerprop": lambda n, a, b: a * n**b,
}
"""The curves for n >= 0."""
INVERSES: dict[str, Callable[..., Tensor]] = {
    "arctan": lambda n, a, b: b * torch.tan(n / a),
    "tanh": lambda n, a, b: b * torch.atanh(n / a),
    "softsign": lambda n, a, b: b * n / (a - n),
    "asinh": lambda n, a, b: b * torch.sinh(n / a),
    "symlog": lambda n, a, b: b * torch.expm1(n / a),
    "mu_law": lambda n, a, b: a * torch.expm1(n / a * _log1p(b)) / b,
    "powerprop": lambda n, a, b: (n / a) ** (1 / b),
}
"""Their inverses for n >= 0."""


def _odd(half: Callable[..., Tensor], v: Tensor, a: Any, b: Any) -> Tensor:
    """The odd function of a half, with its derivatives from above at zero."""
    n = torch.where(v >= 0, v, -v)
    sign = torch.where(v >= 0, 1.0, -1.0).to(v)
    return sign * half(n, over_channels(a, v), over_channels(b, v))


def oracle(input: Tensor, a: Any, b: Any, kind: str = "arctan") -> Tensor:
    return _odd(CURVES[kind], input, a, b)


def inverse_oracle(output: Tensor, a: Any, b: Any, kind: str = "arctan") -> Tensor:
    return _odd(INVERSES[kind], output, a, b)


# --- the whole line -------------------------------------------------------------------------------

LINES: dict[str, Callable[..., Any]] = {
    "arctan": lambda n, a, b: a * np.arctan(n / b),
    "tanh": lambda n, a, b: a * np.tanh(n / b),
    "softsign": lambda n, a, b: a * np.where(np.isinf(n), 1.0, n / (b + n)),
    "asinh": lambda n, a, b: a * np.arcsinh(n / b),
    "symlog": lambda n, a, b: a * np.log1p(n / b),
    "mu_law": lambda n, a, b: a * (np.log1p(b * n / a) / np.log1p(b)),
    "powerprop": lambda n, a, b: a * np.power(n, b),
}


def exact(v: Tensor, a: float, b: float, kind: str) -> Any:
    """The curve in float64, whose range holds all quotients and powers of float32 that matter."""
    x = v.numpy().astype(np.float64)
    with np.errstate(all="ignore"):
        return np.copysign(LINES[kind](np.abs(x), np.float64(a), np.float64(b)), x)


def float32_ulps(actual: Tensor, expected: Any) -> Any:
    """The error of each element, in units of the last place of the float32 next to ``expected``.

    Infinity counts as the number after the largest. NaN on one side alone is an infinite error.
    """
    beyond = 2.0**128
    found = actual.numpy().astype(np.float64).clip(-beyond, beyond)
    wanted = expected.clip(-beyond, beyond)
    _, exponent = np.frexp(np.minimum(np.abs(wanted), np.nextafter(beyond, 0)))
    unit = np.exp2(np.maximum(exponent, -125) - 24.0)
    error = np.abs(found - wanted) / unit
    both = np.isnan(found) & np.isnan(wanted)
    return np.where(both, 0.0, np.nan_to_num(error, nan=np.inf, posinf=np.inf))


def whole_line(count: int, centre: float = 1.0, seed: int = 0) -> Tensor:
    """Numbers of float32 of every exponent and sign, no NaN: random bits, and numbers around ``centre``;
    all powers of two with their neighbours, subnormal numbers, the largest ones, infinities, zeros."""
    draw = np.random.default_rng(seed)
    bits = draw.integers(0, 2**32, count, dtype=np.uint64).astype(np.uint32).view(np.float32)
    near = centre * np.exp2(draw.uniform(-8, 8, count // 4)) * draw.choice([-1.0, 1.0], count // 4)
    powers = np.exp2(np.arange(-149, 128, dtype=np.float64)).astype(np.float32)
    top = np.finfo(np.float32).max
    special = np.concatenate(
        [
            powers,
            np.nextafter(powers, np.float32(np.inf)),
            np.nextafter(powers, np.float32(0)),
            np.float32(1.4e-45) * np.arange(1, 200, dtype=np.float32),
            np.array([0.0, top, np.inf], dtype=np.float32),
        ]
    )
    with np.errstate(over="ignore", under="ignore"):
        every = np.concatenate([bits, near.astype(np.float32), special, -special])
    return torch.from_numpy(every[~np.isnan(every)])


# --- what records share ---------------------------------------------------------------------------


def signed(input: Tensor, skipped: int = 0) -> Tensor:
    """The numbers with the signs of the gradient that the harness sends, after ``skipped`` others: the
    sums over a tensor, which are the gradients of ``a`` and ``b``, then do not cancel."""
    sent = cotangent(input.new_empty(skipped + input.numel()))[skipped:].reshape(input.shape)
    return torch.where(sent < 0, -input.abs(), input.abs())


def weights(make: Maker, *shape: int, skipped: int = 0) -> Tensor:
    """Weights of either sign that are not near zero, where some derivatives jump or grow."""
    return signed(make.uniform(*shape, low=0.2, high=3.0), skipped)


def normal(make: Maker, *shape: int, scale: float = 1.0, skipped: int = 0) -> Tensor:
    """Weights of every size."""
    return signed(make.normal(*shape, scale=scale), skipped)


def parameters(make: Maker, kind: str, channels: int | None = None) -> Arguments:
    """An ``a`` and a ``b`` for weights about one, of one element or of channels."""
    a, b = {"mu_law": (10.0, 60.0), "powerprop": (1.5, 1.75)}.get(kind, (1.5, 0.75))
    if channels is None:
        return {"a": make.tensor([a]), "b": make.tensor([b]), "kind": kind}
    each = [make.uniform(channels, low=value / 2, high=1.5 * value) for value in (a, b)]
    return {"a": each[0], "b": each[1], "kind": kind}


BAD_NUMBERS = {"zero": 0.0, "negative": -1.0, "infinite": math.inf, "NaN": math.nan}


def parameter_errors(given: Arguments, place: str, shown: str = "") -> Iterator[ErrorInput]:
    """What may be wrong with ``a`` or ``b`` in a call whose weights, named ``place``, are 4 channels;
    a message calls them ``shown``."""
    x, shown = given[place], shown or place

    def error(what: str, kind: type[Exception], match: str, value: Any, **more: Any) -> ErrorInput:
        return ErrorInput(f"{name} {what}", {**given, name: value}, kind, match, **more)

    for name in ("a", "b"):
        positive = rf"{name}\S* must be positive and finite, got "
        for what, number in BAD_NUMBERS.items():
            yield error(what, ValueError, positive, number)
            channels = x.new_ones(4)
            channels[2] = number
            yield error(
                f"{what}, of one", ValueError, positive, x.new_full((1,), number), values=True
            )
            yield error(f"{what}, of a channel", ValueError, positive, channels, values=True)
        wanted = rf"{name}\S* must be a number or a Tensor, got "
        yield error("a bool", TypeError, wanted + "bool", True)
        for dtype in (torch.int64, torch.bool, torch.complex64):
            value = torch.ones(1, dtype=dtype, device=x.device)
            yield error(str(dtype), TypeError, rf"{name}\S* must have dtype", value)
        match = (
            rf"{name}\S* must have one element or one for each of the 4 chan.*{shown}, got shape"
        )
        for size in ((3,), (5,), (0,), (4, 1), (2, 2)):
            yield error(f"of {size}", ValueError, match, x.new_ones(size))
        elsewhere = x.new_ones(4, device="meta")
        yield error("elsewhere", ValueError, rf"{name}\S* must be on the same device", elsewhere)


def kind_errors(given: Arguments) -> Iterator[ErrorInput]:
    """What may be wrong with ``kind``."""
    match = "kind must be one of .*'sigmoid'"
    yield ErrorInput("unknown kind", {**given, "kind": "sigmoid"}, ValueError, match)
    for value in (0, None):
        match = f"kind must be a str, got {type(value).__name__}"
        yield ErrorInput(f"kind {value}", {**given, "kind": value}, TypeError, match)


def weight_errors(given: Arguments, place: str, make: Maker) -> Iterator[ErrorInput]:
    """What may be wrong with the weights."""
    x = given[place]
    yield ErrorInput(
        "not a tensor", {**given, place: [1.0]}, TypeError, f"{place} must be a Tensor"
    )
    for value in (x.long(), x > 0, make.normal(4, 3, dtype=torch.complex64)):
        match = f"{place} must have dtype .*{str(value.dtype).removeprefix('torch.')}"
        yield ErrorInput(f"{value.dtype}", {**given, place: value}, TypeError, match)
    sparse = {**given, place: x.to_sparse()}
    yield ErrorInput("sparse", sparse, TypeError, f"{place} must be a dense tensor")
    scalar = {**given, place: x[0, 0], "a": x.new_ones(2)}
    yield ErrorInput("channels of a scalar", scalar, ValueError, "a must have one element")
