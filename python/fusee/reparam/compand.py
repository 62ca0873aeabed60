"""Weight compander: bounded weights, pushed off zero, as a function of free ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusee._checks import (
    accumulate_dtype,
    check_floating,
    check_same_device,
    require_values,
)
from fusee._op import Op, is_readable

KINDS = ("arctan", "tanh", "softsign", "asinh", "symlog", "mu_law", "powerprop")
"""The curves, in the order of their numbers in the operators."""

Parameter = float | Tensor
"""``a`` or ``b`` of a curve: a number, or a tensor of one element or of one for each channel."""


def odd(function: Callable[[Tensor], Tensor], v: Tensor, elsewhere: float = 0.0) -> Tensor:
    """The odd function that is ``function`` for v >= 0, with its right derivative at zero; a branch that
    is not taken gets ``elsewhere``, so that nothing infinite leaks from it."""
    positive = v >= 0
    right = function(torch.where(positive, v, elsewhere))
    left = function(torch.where(positive, elsewhere, -v))
    return torch.where(positive, right, -left)


def _curve(v: Tensor, a: Tensor, b: Tensor, kind: str) -> Tensor:
    """The companded weights in plain torch operators, in the dtype of the arguments."""
    match kind:
        case "arctan":
            return a * torch.atan(v / b)
        case "tanh":
            return a * torch.tanh(v / b)
        case "softsign":
            return a * odd(lambda n: n / (b + n), v)
        case "asinh":
            return a * torch.asinh(v / b)
        case "symlog":
            return a * odd(lambda n: torch.log1p(n / b), v)
        case "mu_law":
            return a * odd(lambda n: torch.log1p(b * n / a), v) / torch.log1p(b)
        case _:
            return a * odd(lambda n: n.pow(b), v, elsewhere=1.0)


def _reference(input: Tensor, a: Tensor, b: Tensor, kind: int) -> Tensor:
    dtype = accumulate_dtype(input.dtype)
    v, a, b = input.to(dtype), over_channels(a, input), over_channels(b, input)
    valid = (a > 0) & a.isfinite() & (b > 0) & b.isfinite()
    output = torch.where(valid, _curve(v, a, b, KINDS[kind]), math.nan)
    return output.to(input.dtype)


def over_channels(parameter: Tensor, input: Tensor) -> Tensor:
    """A parameter shaped to be multiplied with the input."""
    if input.dim() == 0:
        return parameter.reshape(())
    return parameter.reshape(-1, *(1,) * (input.dim() - 1))


def _fake(input: Tensor, a: Tensor, b: Tensor, kind: int) -> Tensor:
    return torch.empty_like(input)


def _fold(info: Any, in_dims: Any, *tensors: Tensor) -> list[Tensor]:
    """A batch of (grad, input, a, b) or (input, a, b) as one call whose channels hold the batch."""
    *data, a, b = tensors
    *data_dims, a_dim, b_dim = in_dims[: len(tensors)]
    size = info.batch_size

    def front(tensor: Tensor, dim: int | None) -> Tensor:
        if dim is None:
            return tensor.expand(size, *tensor.shape)
        return tensor.movedim(dim, 0)

    data = [front(tensor, dim) for tensor, dim in zip(data, data_dims, strict=True)]
    channels = math.prod(_batched_shape(info, a_dim, a)[1:])
    rows = [front(a, a_dim).reshape(-1), front(b, b_dim).reshape(-1)]
    return [d.reshape(size * channels, d.numel() // max(size * channels, 1)) for d in data] + rows


def _vmap(info: Any, in_dims: Any, input: Tensor, a: Tensor, b: Tensor, kind: int) -> Any:
    shape = _batched_shape(info, in_dims[0], input)
    return torch.ops.fusee.compand(*_fold(info, in_dims, input, a, b), kind).reshape(shape), 0


def _batched_shape(info: Any, dim: int | None, tensor: Tensor) -> tuple[int, ...]:
    shape = list(tensor.shape)
    if dim is not None:
        del shape[dim]
    return (info.batch_size, *shape)


def _backward(ctx: Any, args: Any, constants: Any, grad: Tensor) -> Any:
    return (*_compand_backward(grad, *args), None)


def _slopes(v: Tensor, a: Tensor, b: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """The derivatives of the curve in v, a and b."""
    positive = v >= 0
    n = torch.where(positive, v, -v)
    t = n / b
    match kind:
        case "arctan":
            q = 1 / (1 + t * t)
            in_v, in_a, in_b = a / b * q, torch.atan(t), -a / b * t * q
        case "tanh":
            q = 1 - torch.tanh(t).square()
            in_v, in_a, in_b = a / b * q, torch.tanh(t), -a / b * t * q
        case "softsign":
            in_v, in_a, in_b = a * b / (b + n).square(), n / (b + n), -a * n / (b + n).square()
        case "asinh":
            q = (1 + t * t).rsqrt()
            in_v, in_a, in_b = a / b * q, torch.asinh(t), -a / b * t * q
        case "symlog":
            in_v, in_a, in_b = a / (b + n), torch.log1p(t), -a * t / (b + n)
        case "mu_law":
            u, scale = b * n / a, torch.log1p(b)
            log = torch.log1p(u)
            in_v = b / (scale * (1 + u))
            in_a = (log - u / (1 + u)) / scale
            in_b = (n / (1 + u) - a * log / (scale * (1 + b))) / scale
        case _:
            zero = n == 0
            safe = torch.where(zero, 1.0, n)
            at_zero = torch.where(b > 1, 0.0, torch.where(b == 1, a, math.inf))
            in_v = torch.where(zero, at_zero, a * b * safe.pow(b - 1))
            in_a = torch.where(zero, 0.0, safe.pow(b))
            in_b = a * in_a * safe.log()
    return in_v, torch.where(positive, in_a, -in_a), torch.where(positive, in_b, -in_b)


def _backward_reference(
    grad: Tensor, input: Tensor, a: Tensor, b: Tensor, kind: int
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(input.dtype)
    of_a, of_b = over_channels(a, input), over_channels(b, input)
    valid = (of_a > 0) & of_a.isfinite() & (of_b > 0) & of_b.isfinite()
    in_v, in_a, in_b = _slopes(input.to(dtype), of_a, of_b, KINDS[kind])
    # NaN where a or b is invalid; the product carries it to every gradient.
    g = grad.to(dtype) * torch.where(valid, 1.0, math.nan)

    def summed(terms: Tensor, parameter: Tensor) -> Tensor:
        rows = (g * terms).reshape(parameter.numel(), input.numel() // max(parameter.numel(), 1))
        return rows.sum(1).reshape(parameter.shape)

    return (g * in_v).to(input.dtype), summed(in_a, a), summed(in_b, b)


def _backward_fake(
    grad: Tensor, input: Tensor, a: Tensor, b: Tensor, kind: int
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(input), torch.empty_like(a), torch.empty_like(b)


def _backward_vmap(
    info: Any, in_dims: Any, grad: Tensor, input: Tensor, a: Tensor, b: Tensor, kind: int
) -> Any:
    folded = _fold(info, in_dims, grad, input, a, b)
    results = torch.ops.fusee.compand_backward(*folded, kind)
    shapes = (
        _batched_shape(info, dim, tensor)
        for dim, tensor in zip(in_dims[1:], (input, a, b), strict=False)
    )
    outputs = [result.reshape(shape) for result, shape in zip(results, shapes, strict=True)]
    return tuple(outputs), (0, 0, 0)


def _sharding(input: Any, a: Any, b: Any, kind: int) -> list[Any]:
    """The channels, or any other dimension with one number for all of its parts, may be split."""
    from torch.distributed.tensor import Replicate, Shard

    whole: Any = Replicate()
    choices: list[Any] = [([whole], [whole, whole, whole, None])]
    for dim in range(len(input.shape)):
        of_channel: Any = Shard(0) if dim == 0 and a.shape.numel() != 1 else whole
        choices.append(([Shard(dim)], [Shard(dim), of_channel, of_channel, None]))
    return choices


def _backward_sharding(grad: Any, input: Any, a: Any, b: Any, kind: int) -> list[Any]:
    """As forward; parts of what a parameter serves give parts of the sum that is its gradient."""
    from torch.distributed.tensor import Partial, Replicate

    choices = []
    for (output,), (data, of_channel, _, _) in _sharding(input, a, b, kind):
        summed = (
            Partial("sum") if output != Replicate() and of_channel == Replicate() else of_channel
        )
        choices.append(([data, summed, summed], [data, data, of_channel, of_channel, None]))
    return choices


_compand = Op(
    "compand",
    fake=_fake,
    reference=_reference,
    vmap=_vmap,
    differentiable=((0, 1, 2), (0,)),
    backward=_backward,
    sharding=_sharding,
)
_compand_backward = Op(
    "compand_backward",
    fake=_backward_fake,
    reference=_backward_reference,
    vmap=_backward_vmap,
    differentiable=((0, 1, 2, 3), (0, 1, 2)),
    sharding=_backward_sharding,
)


def check_kind(kind: Any) -> int:
    """The number of a kind."""
    if not isinstance(kind, str):
        raise TypeError(f"kind must be a str, got {type(kind).__name__}")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    return KINDS.index(kind)


def check_parameter(name: str, value: Any, input: Tensor, input_name: str = "input") -> Tensor:
    """``a`` or ``b`` as a tensor of one element or of one a channel, of the accumulation dtype."""
    dtype = accumulate_dtype(input.dtype)
    if isinstance(value, Tensor):
        check_floating(name, value)
        check_same_device(name, value, input_name, input)
        channels = input.shape[0] if input.dim() else 1
        if value.dim() > 1 or (value.numel() != 1 and value.numel() != channels):
            raise ValueError(
                f"{name} must have one element or one for each of the {channels} channels in dimension "
                f"0 of {input_name}, got shape {tuple(value.shape)}"
            )
        value = value.to(dtype)
        _check_positive(name, value)
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or a Tensor, got {type(value).__name__}")
    info = torch.finfo(dtype)
    if not info.tiny * info.eps <= value <= info.max:
        raise ValueError(f"{name} must be positive and finite, got {value} (in {dtype})")
    return input.new_full((1,), value, dtype=dtype)


def check_parameters(
    a: Any, b: Any, input: Tensor, names: tuple[str, str, str] = ("a", "b", "input")
) -> tuple[Tensor, Tensor]:
    """Both parameters, with the same number of elements."""
    a = check_parameter(names[0], a, input, names[2])
    b = check_parameter(names[1], b, input, names[2])
    if a.numel() == b.numel():
        return a, b
    channels = input.shape[0]
    return a.reshape(-1).expand(channels), b.reshape(-1).expand(channels)


def _check_positive(name: str, value: Tensor) -> None:
    def invalid() -> Tensor:
        if value.numel() == 0:
            return value.new_zeros(())
        least, most = torch.aminmax(value)
        return ~((least > 0) & (most < math.inf))

    def raise_error() -> None:
        bad = value.detach().reshape(-1)
        bad = bad[~((bad > 0) & bad.isfinite())]
        raise ValueError(f"{name} must be positive and finite, got {bad[0].item()}")

    if value.numel() == 1 and value.is_cpu and not torch.compiler.is_compiling():
        # Of which a model has hundreds: one read, and no operators.
        if is_readable(value) and not 0 < value.item() < math.inf:
            raise_error()
    else:
        require_values(value, invalid, raise_error)


def compand(input: Tensor, a: Parameter, b: Parameter, kind: str = "arctan") -> Tensor:
    r"""Maps free weights through a curve that bounds them, or at least compresses large ones.

    ================  =============================================  ============  =================
    ``kind``          result                                         slope at 0    result lies in
    ================  =============================================  ============  =================
    ``"arctan"``      :math:`a \arctan(v / b)`                       a / b         (-a π/2, a π/2)
    ``"tanh"``        :math:`a \tanh(v / b)`                         a / b         [-a, a]
    ``"softsign"``    :math:`a v / (b + |v|)`                        a / b         [-a, a]
    ``"asinh"``       :math:`a \,\text{asinh}(v / b)`                a / b         everywhere
    ``"symlog"``      :math:`a \,\text{sign}(v) \log(1 + |v| / b)`   a / b         everywhere
    ``"mu_law"``      :math:`a \,\text{sign}(v)                      b / log(1+b)  everywhere
                      \log(1 + b |v| / a) / \log(1 + b)`
    ``"powerprop"``   :math:`a \,\text{sign}(v) |v|^b`               0 for b > 1   everywhere
    ================  =============================================  ============  =================

    With ``a > b`` the first three push small weights away from zero and pull large ones in.
    ``powerprop`` with ``b > 1`` does the opposite: it is the reparameterisation that makes for sparsity.

    Args:
        input: the free weights v, any shape and strides; float32, float64, bfloat16 or float16. Half
            types are computed in float32 and rounded once.
        a: positive number, or tensor of one element or of one for each channel (dimension 0 of
            ``input``).
        b: likewise.
        kind: the curve.

    Returns:
        A tensor of the shape and dtype of ``input``, with its strides where it is dense.

    Raises:
        TypeError: ``input`` is not a dense floating-point tensor, ``a`` or ``b`` is neither a number nor
            such a tensor, or ``kind`` is not a str.
        ValueError: ``kind`` is unknown, ``a`` or ``b`` has another number of elements, is on another
            device, or is not positive and finite. What only the values of a tensor show raises for CPU
            tensors in eager mode; on CUDA and in compiled code the channels become NaN instead, unless
            ``FUSEE_CHECK_VALUES=1``.

    In float32, on every engine, for ``a`` and ``b`` from 2^-60 to 2^60 and every v, the result is
    within 2.5 units in the last place for the first four kinds and within 4 for the others. Results of
    float32 and float64 never leave the interval of the table; half types round to the nearest
    number, which may lie beyond.

    Differentiable in ``input``, ``a`` and ``b``, to any order and in forward mode. The gradients in
    ``a`` and ``b`` are summed in the same pass. Where the derivative jumps, at v = 0, it is the one from
    above; ``powerprop`` with ``b < 1`` has an infinite derivative there. Deterministic: the same bits on
    the same engine, whatever the number of threads. NaN stays where it is. A DTensor keeps its sharding,
    without communication but for the sums that are the gradients of replicated ``a`` and ``b``.

    Source: Cakaj, Mehnert and Yang, "Weight Compander: A Simple Weight Reparameterization for
    Regularization", arXiv:2306.16993, whose abstract describes the effect; its own function was not
    available, and ``"arctan"`` is the simplest with the properties described. ``powerprop``:
    Schwarz et al., "Powerpropagation", arXiv:2110.00296. ``mu_law``: the compander of ITU-T G.711.

    Example:
        >>> import torch, fusee
        >>> fusee.compand(torch.tensor([-10.0, 0.0, 0.1, 1.0]), a=1.0, b=0.5)
        tensor([-1.5208,  0.0000,  0.1974,  1.1071])
    """
    check_floating("input", input)
    number = check_kind(kind)
    return _compand(input, *check_parameters(a, b, input), number)
