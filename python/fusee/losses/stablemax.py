"""StableMax: a softmax without the exponential, which does not collapse in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusee._checks import accumulate_dtype, autocast_enabled, check_dim, check_floating
from fusee._op import Op, batch_outer, fold_batch, unfold_batch
from fusee._rows import fold_rows


def stable_exp(x: Tensor) -> Tensor:
    """s(x) = 1 + x for x >= 0 and 1 / (1 - x) below; either branch is safe where it is not taken."""
    return torch.where(x >= 0, 1 + x.clamp(min=0), 1 / (1 - x.clamp(max=0)))


def symlog(x: Tensor) -> Tensor:
    """log s(x) = sign(x) log(1 + abs(x)), with derivative one at zero."""
    return torch.where(x >= 0, x.clamp(min=0).log1p(), -(-x.clamp(max=0)).log1p())


def reciprocal(x: Tensor) -> Tensor:
    """r(x) = 1 / (1 + abs(x)), so that s' = s r."""
    return 1 / (1 + torch.where(x >= 0, x, -x))


def slope(x: Tensor) -> Tensor:
    """s'(x) = 1 for x >= 0 and r(x)^2 below."""
    return torch.where(x >= 0, torch.ones_like(x), reciprocal(x).square())


def _reference(input: Tensor, log: bool) -> tuple[Tensor, Tensor]:
    x = input.to(accumulate_dtype(input.dtype))
    total = stable_exp(x).sum(1, keepdim=True)
    output = stable_exp(x) / total
    if log:
        # The quotient's logarithm is right near zero, the difference where the quotient underflows.
        tiny = 1e-30
        difference = symlog(x) - total.log()
        output = torch.where(output < tiny, difference, output.clamp(min=tiny).log())
    return output.to(input.dtype), total.squeeze(1).double()


def _fake(input: Tensor, log: bool) -> tuple[Tensor, Tensor]:
    torch._check(input.dim() == 3, lambda: f"input must be (outer, n, inner), got {input.shape}")
    outer, _, inner = input.shape
    output = torch.empty_like(input, memory_format=torch.contiguous_format)
    return output, input.new_empty((outer, inner), dtype=torch.float64)


def _vmap(info: Any, in_dims: Any, input: Tensor, log: bool) -> Any:
    (x,) = fold_batch(info, in_dims[:1], (input,))
    output, total = torch.ops.fusee.stablemax(x, log)
    outer = batch_outer((input,), in_dims)
    return (unfold_batch(info, output, outer), unfold_batch(info, total, outer)), (0, 0)


def _backward(ctx: Any, args: Any, constants: Any, grad: Tensor) -> Any:
    input, log = args
    (total,) = constants
    return _stablemax_backward(grad, input, total, log), None


def _backward_reference(grad: Tensor, input: Tensor, sum: Tensor, log: bool) -> Tensor:
    dtype = accumulate_dtype(input.dtype)
    x, g = input.to(dtype), grad.to(dtype)
    # The row sum is recomputed, so that this function has its whole derivative in the input.
    total = stable_exp(x).sum(1, keepdim=True)
    if log:
        result = reciprocal(x) * g - slope(x) / total * g.sum(1, keepdim=True)
    else:
        dot = (g * stable_exp(x) / total).sum(1, keepdim=True)
        result = slope(x) / total * (g - dot)
    return result.to(input.dtype)


def _backward_fake(grad: Tensor, input: Tensor, sum: Tensor, log: bool) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def _backward_vmap(
    info: Any, in_dims: Any, grad: Tensor, input: Tensor, sum: Tensor, log: bool
) -> Any:
    g, x, total = fold_batch(info, in_dims[:3], (grad, input, sum))
    result = torch.ops.fusee.stablemax_backward(g, x, total, log)
    return unfold_batch(info, result, batch_outer((grad,), in_dims)), 0


_stablemax = Op(
    "stablemax",
    fake=_fake,
    reference=_reference,
    vmap=_vmap,
    differentiable=((0,), (0,)),
    backward=_backward,
)
_stablemax_backward = Op(
    "stablemax_backward",
    fake=_backward_fake,
    reference=_backward_reference,
    vmap=_backward_vmap,
    differentiable=((0, 1), (0,)),
)


def _along(input: Tensor, dim: int, dtype: torch.dtype | None, log: bool) -> Tensor:
    if dtype is not None and isinstance(input, Tensor):
        input = input.to(dtype)
    check_floating("input", input)
    if dtype is None and autocast_enabled(input):
        # As softmax does under autocast.
        input = input.to(accumulate_dtype(input.dtype))
    rows = fold_rows(input, check_dim(dim, input.dim()))
    return rows.unfold(_stablemax(rows.folded, log)[0])


def stablemax(input: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    r"""StableMax along a dimension.

    .. math:: \text{StableMax}(x)_j = s(x_j) / \sum_k s(x_k), \qquad
              s(x) = 1 + x \ (x \ge 0), \quad 1 / (1 - x) \ (x < 0)

    The result is positive, sums to one along ``dim`` and keeps the order of ``input``. Unlike softmax it
    changes when a constant is added to all inputs, and its tails are heavy: mask with ``-inf``, not
    with a large negative number.

    Args:
        input: any shape and strides; float32, float64, bfloat16 or float16. Half types are summed in
            float32.
        dim: the dimension along which the result sums to one. Default: the last.
        dtype: if given, ``input`` is cast to it first, as in :func:`torch.softmax`. Under autocast the
            result is float32, likewise.

    Returns:
        A tensor of the shape of ``input``.

    Raises:
        TypeError: ``input`` is not a dense floating-point tensor, or ``dim`` is not an int.
        IndexError: ``dim`` is out of range.

    Differentiable to any order and in forward mode. Deterministic: the same bits on the same engine,
    whatever the number of threads. NaN spreads over its row.

    Source: Prieto et al., "Grokking at the Edge of Numerical Stability", arXiv:2501.04697.

    Example:
        >>> import torch, fusee
        >>> fusee.stablemax(torch.tensor([1.0, 0.0, -1.0]))
        tensor([0.5714, 0.2857, 0.1429])
    """
    return _along(input, dim, dtype, log=False)


def log_stablemax(input: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    r"""The logarithm of :func:`stablemax` along a dimension, without its underflow.

    .. math:: \log \text{StableMax}(x)_j = \text{sign}(x_j) \log(1 + |x_j|) - \log \sum_k s(x_k)

    Arguments, dtypes, errors, derivatives, determinism and source are those of :func:`stablemax`.

    Example:
        >>> import torch, fusee
        >>> fusee.log_stablemax(torch.tensor([1.0, 0.0, -1.0]))
        tensor([-0.5596, -1.2528, -1.9459])
    """
    return _along(input, dim, dtype, log=True)


class StableMax(torch.nn.Module):
    """:func:`fusee.stablemax` as a module, in the place of :class:`torch.nn.Softmax`.

    Args:
        dim: the dimension along which the result sums to one. Default: the last.

    Shape: any input; the output has the shape of the input.
    """

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, input: Tensor) -> Tensor:
        return stablemax(input, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class LogStableMax(StableMax):
    """:func:`fusee.log_stablemax` as a module, in the place of :class:`torch.nn.LogSoftmax`.

    Args:
        dim: the dimension along which the exponentials of the result sum to one. Default: the last.

    Shape: any input; the output has the shape of the input.
    """

    def forward(self, input: Tensor) -> Tensor:
        return log_stablemax(input, self.dim)
