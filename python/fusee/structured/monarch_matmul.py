"""Monarch matrix product: two block-diagonal factors and their permutations in one pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fusee._checks import autocast_product
from fusee._op import Op
from fusee._products import allows_tf32, as_rows, needed, of_wanted, vmap_by_reference
from fusee.structured.block_diagonal_matmul import (
    block_products,
    check_blocks,
    check_product,
    divides,
    vmap_over_rows,
)


def _middle(input: Tensor, w1: Tensor, blocks: int) -> Tensor:
    """The first stage and its permutation: (..., blocks, rows, r)."""
    hidden = block_products(input, w1).flatten(-2)
    return hidden.unflatten(-1, (hidden.shape[-1] // blocks, blocks)).movedim(-1, -3)


def _reference(
    input: Tensor, w1: Tensor, w2: Tensor, bias: Tensor | None, tf32: bool = False
) -> Tensor:
    output = (_middle(input, w1, w2.shape[-3]) @ w2.mT).movedim(-3, -1).flatten(-2)
    return (output if bias is None else output + bias.unsqueeze(-2)).contiguous()


def _backward_reference(
    grad: Tensor,
    input: Tensor,
    w1: Tensor,
    w2: Tensor,
    wanted: int,
    tf32: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    blocks, q, p = w1.shape[-3:]
    outer, s, _ = w2.shape[-3:]
    nothing = input.new_empty((*w1.shape[:-3], 0))
    of_output = grad.unflatten(-1, (s, outer)).movedim(-1, -3)
    grad_input, grad_w1, grad_w2 = nothing, nothing.clone(), nothing.clone()
    if wanted & 4:
        grad_w2 = (of_output.mT @ _middle(input, w1, outer)).contiguous()
    if wanted & 3:
        of_hidden = (of_output @ w2).movedim(-3, -1).flatten(-2)
        of_blocks = of_hidden.unflatten(-1, (blocks, q)).transpose(-3, -2)
        if wanted & 1:
            grad_input = (of_blocks @ w1).transpose(-3, -2).flatten(-2).contiguous()
        if wanted & 2:
            columns = input.unflatten(-1, (blocks, p)).transpose(-3, -2)
            grad_w1 = (of_blocks.mT @ columns).contiguous()
    return grad_input, grad_w1, grad_w2


def _fake(input: Tensor, w1: Tensor, w2: Tensor, bias: Tensor | None, tf32: bool) -> Tensor:
    return input.new_empty((input.shape[0], w2.shape[0] * w2.shape[1]))


def _backward_fake(
    grad: Tensor,
    input: Tensor,
    w1: Tensor,
    w2: Tensor,
    wanted: int,
    tf32: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        input.new_empty(input.shape if wanted & 1 else (0,)),
        w1.new_empty(w1.shape if wanted & 2 else (0,)),
        w2.new_empty(w2.shape if wanted & 4 else (0,)),
    )


def _sharding(input: Any, w1: Any, w2: Any, bias: Any, tf32: bool) -> list[Any]:
    """Rows may be split; or the second factor's rows, which are the output's features; or, without a
    bias, the blocks of the first with the columns of the second that they reach, which gives parts of a
    sum."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    whole: Any = Replicate()
    choices = [
        ([output], [output, whole, whole, bias and whole, None]) for output in (whole, Shard(0))
    ]
    if divides(input, w2.shape[1]):
        choices.append(([Shard(1)], [whole, whole, Shard(1), bias and Shard(0), None]))
    share = w1.shape[0] // input.mesh.size() * w1.shape[1]
    if bias is None and divides(input, w1.shape[0]) and share % w2.shape[0] == 0:
        choices.append(([Partial("sum")], [Shard(1), Shard(0), Shard(2), None, None]))
    return choices


def _backward_sharding(
    grad: Any, input: Any, w1: Any, w2: Any, wanted: int, tf32: bool
) -> list[Any]:
    """As forward; what is whole there and serves parts of the work has a gradient that is a sum."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    whole: Any = Replicate()
    choices = []
    for (output,), placed in _sharding(input, w1, w2, None, tf32):
        given, of_w1, of_w2, *_ = placed
        parts = output in (Shard(0), Shard(1))
        results = [Partial("sum") if parts and where == whole else where for where in placed[:3]]
        of_grad = whole if output == Partial("sum") else output
        choices.append((of_wanted(wanted, results), [of_grad, given, of_w1, of_w2, None, None]))
    return choices


def _backward(ctx: Any, args: Any, saved: Any, grad: Tensor) -> Any:
    input, w1, w2, _, tf32 = args

    def grads(wanted: int) -> Any:
        return _monarch_matmul_backward(grad, input, w1, w2, wanted, tf32)

    return *needed(ctx, grads, 3), grad.sum(0) if ctx.needs_input_grad[3] else None, None


_monarch_matmul = Op(
    "monarch_matmul",
    fake=_fake,
    reference=_reference,
    vmap=vmap_over_rows("monarch_matmul", _reference),
    differentiable=((0, 1, 2, 3), (0,)),
    backward=_backward,
    sharding=_sharding,
)
_monarch_matmul_backward = Op(
    "monarch_matmul_backward",
    fake=_backward_fake,
    reference=_backward_reference,
    vmap=vmap_by_reference(_backward_reference),
    differentiable=((0, 1, 2, 3), (0, 1, 2)),
    sharding=_backward_sharding,
)


def check_factors(w1: Any, w2: Any) -> None:
    """Raises unless the two factors fit each other."""
    check_blocks("w1", w1)
    check_blocks("w2", w2)
    if w1.shape[0] * w1.shape[1] != w2.shape[0] * w2.shape[2]:
        raise ValueError(
            "w1 (k, q, p) and w2 (l, s, r) must have k * q = l * r, got "
            f"{tuple(w1.shape)} and {tuple(w2.shape)}"
        )


def _takes_gemm(input: Tensor, w1: Tensor, w2: Tensor) -> bool:
    """Whether torch's batched products are faster than ours: those of large blocks, where the copies
    between them are little beside the products. docs/monarch.md has the measurements."""
    _, q, p = w1.shape
    _, s, r = w2.shape
    if input.device.type == "cpu":
        # For the gradients ours makes the middle anew, a seventh of the work, and takes whole vectors of
        # rows where there is but one.
        least = 1 << 16 if math.prod(input.shape[:-1]) == 1 else 1 << 20
        large = min(q * p, s * r) >= least and input.dtype == torch.float32
        return large and torch.is_grad_enabled() and any(t.requires_grad for t in (input, w1, w2))
    # A compiled program is for any number of rows.
    many = torch.compiler.is_compiling() or math.prod(input.shape[:-1]) >= 1024
    return input.device.type == "cuda" and min(q, p, s, r) >= 512 and many


def monarch_matmul(input: Tensor, w1: Tensor, w2: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""Multiplies the input with a Monarch matrix: block-diagonal, permuted, block-diagonal, permuted.

    .. math:: z_{\kappa q + j} = \sum_i W^1_{\kappa j i}\, x_{\kappa p + i}, \qquad
              y_{\sigma l + \lambda} = \sum_\rho W^2_{\lambda\sigma\rho}\, z_{\rho l + \lambda}
              + b_{\sigma l + \lambda}

    Both stages and both permutations happen in one pass: the middle z of some rows at a time stays
    in the cache, or in the shared memory of a GPU, and is computed anew in the backward pass. With l
    = k blocks that is 2 / k of the weights and products of a dense matrix. Where blocks are so large
    that torch's batched products are faster (on the CPU from 1024 x 1024 on, for gradients, of a single
    row from 256 x 256 on), these are taken.

    Args:
        input: x (..., k * p), any strides; float32, float64, bfloat16 or float16. Half types are summed
            in float32; on a GPU, and under ``vmap`` over weights, the middle is rounded to the half
            type.
        w1: W¹ (k, q, p), of the dtype of ``input``.
        w2: W² (l, s, r) with l * r = k * q, of the dtype of ``input``.
        bias: b (l * s), of the dtype of ``input``.

    Returns:
        A tensor (..., l * s) of the dtype of ``input``.

    Raises:
        TypeError: an argument is not a dense floating-point tensor, or of another dtype than ``input``.
        ValueError: shapes that do not fit, a factor without blocks, or tensors on different devices.

    Differentiable in all tensors, to any order and in forward mode. Under autocast it runs in the
    autocast dtype, as ``F.linear`` does. Deterministic: the same bits on the same engine, whatever the
    number of threads, but for the bias's gradient, which torch sums, and where torch's products are
    taken. Of a DTensor the rows may be sharded; or the rows s of ``w2``, which gives sharded features;
    or the blocks of ``w1`` with the columns of ``w2``, which gives partial sums; each where the mesh
    divides them, and without communication but for gradients of what is replicated, and where torch's
    products are taken.

    Source: Dao et al., "Monarch: Expressive Structured Matrices for Efficient and Accurate Training",
    arXiv:2204.00595; the layout is that of its authors' ``blockdiag_butterfly_multiply``.

    Example:
        >>> import torch, fusee
        >>> w1 = torch.eye(2).repeat(2, 1, 1)  # so that the first stage changes nothing
        >>> w2 = torch.tensor([[[1.0, 1.0]], [[1.0, -1.0]]])
        >>> fusee.monarch_matmul(torch.tensor([1.0, 2.0, 3.0, 4.0]), w1, w2)
        tensor([ 4., -2.])
    """
    check_factors(w1, w2)
    features = w2.shape[0] * w2.shape[1]
    check_product(input, {"w1": w1, "w2": w2}, bias, features)
    input, w1, w2, bias = autocast_product(input, w1, w2, bias)
    product = _reference if _takes_gemm(input, w1, w2) else _monarch_matmul
    output: Tensor = product(as_rows(input), w1, w2, bias, allows_tf32(input))
    return output if input.dim() == 2 else output.reshape(*input.shape[:-1], features)
