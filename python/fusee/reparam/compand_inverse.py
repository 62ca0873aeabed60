"""The inverse of the weight compander: the free weights that give chosen ones."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fusee._checks import check_floating, require_values
from fusee.reparam.compand import Parameter, check_kind, check_parameters, odd, over_channels

LIMITS = {"arctan": math.pi / 2, "tanh": 1.0, "softsign": 1.0}
"""The kinds with a bounded range: all weights are less than this times ``a``."""


def _inverse(w: Tensor, a: Tensor, b: Tensor, kind: str) -> Tensor:
    """The free weights, in the dtype of the arguments."""
    match kind:
        case "arctan":
            return b * torch.tan(w / a)
        case "tanh":
            return b * torch.atanh(w / a)
        case "softsign":
            return b * odd(lambda n: n / (a - n), w)
        case "asinh":
            return b * torch.sinh(w / a)
        case "symlog":
            return b * odd(lambda n: torch.expm1(n / a), w)
        case "mu_law":
            return odd(lambda n: torch.expm1(n / a * torch.log1p(b)), w) * a / b
        case _:
            return odd(lambda n: (n / a).pow(1 / b), w, elsewhere=1.0)


def compand_inverse(output: Tensor, a: Parameter, b: Parameter, kind: str = "arctan") -> Tensor:
    r"""The free weights v for which ``fusee.compand(v, a, b, kind)`` is ``output``.

    ================  ======================================================  =====================
    ``kind``          result                                                  ``output`` must be in
    ================  ======================================================  =====================
    ``"arctan"``      :math:`b \tan(w / a)`                                   (-a π/2, a π/2)
    ``"tanh"``        :math:`b \,\text{artanh}(w / a)`                        (-a, a)
    ``"softsign"``    :math:`b w / (a - |w|)`                                 (-a, a)
    ``"asinh"``       :math:`b \sinh(w / a)`                                  anywhere
    ``"symlog"``      :math:`b \,\text{sign}(w) (e^{|w| / a} - 1)`            anywhere
    ``"mu_law"``      :math:`a \,\text{sign}(w) ((1 + b)^{|w| / a} - 1) / b`  anywhere
    ``"powerprop"``   :math:`\text{sign}(w) (|w| / a)^{1 / b}`                anywhere
    ================  ======================================================  =====================

    It is needed once, when a network is set up, so it is not fused: it is made of torch's operators in
    float64 (float32 on devices without it) and rounded once.

    Args:
        output: the weights w, any shape and strides; float32, float64, bfloat16 or float16.
        a: positive number, or tensor of one element or of one for each channel (dimension 0 of
            ``output``).
        b: likewise.
        kind: the curve, see :func:`fusee.compand`.

    Returns:
        A tensor of the shape and dtype of ``output``. Near the limit of a bounded curve the result is
        large, and so is what the rounding of ``output`` makes of it: at 99.9 % of a π/2, v is 637 b and
        the slope 2.5e-6 of that at zero.

    Raises:
        TypeError, ValueError: as :func:`fusee.compand`, and ValueError where ``output`` is outside the
            range of the curve. What only the values show raises for CPU tensors in eager mode; on CUDA
            and in compiled code such elements become NaN instead, unless ``FUSEE_CHECK_VALUES=1``.

    Differentiable to any order and in forward mode. Deterministic. NaN stays where it is.

    Source: see :func:`fusee.compand`.

    Example:
        >>> import torch, fusee
        >>> w = fusee.compand(torch.tensor([-10.0, 0.1, 1.0]), a=1.0, b=0.5)
        >>> fusee.compand_inverse(w, a=1.0, b=0.5)
        tensor([-10.0000,   0.1000,   1.0000])
    """
    check_floating("output", output)
    check_kind(kind)
    a, b = check_parameters(a, b, output, ("a", "b", "output"))
    exact = output.dtype if output.device.type == "mps" else torch.float64
    w, a, b = (
        output.to(exact),
        over_channels(a, output).to(exact),
        over_channels(b, output).to(exact),
    )
    valid: Any = (a > 0) & a.isfinite() & (b > 0) & b.isfinite()
    if kind in LIMITS:
        limit = a * LIMITS[kind]
        inside = (w.abs() < limit) | w.isnan()

        def raise_error() -> None:
            worst = int((~inside).flatten().nonzero()[0])
            raise ValueError(
                f"output must be inside (-{LIMITS[kind]:.4g} a, {LIMITS[kind]:.4g} a), the range of "
                f"{kind!r}, got {output.flatten()[worst].item()}"
            )

        require_values(output, lambda: (~inside).sum(), raise_error)
        valid = valid & inside
    # NaN for the formulas, whose derivatives it thereby reaches too.
    w = w + torch.where(valid, 0.0, math.nan)
    return _inverse(w, a, b, kind).to(output.dtype)
