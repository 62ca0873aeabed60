"""Block-diagonal matrix product: one stage of a structured layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusee._checks import autocast_product, check_beside, check_floating
from fusee._op import Op
from fusee._products import allows_tf32, as_rows, needed, of_wanted, vmap_by_reference


def block_products(input: Tensor, weight: Tensor) -> Tensor:
    """The products (..., rows, blocks, q) of the input (..., rows, blocks * p) and the weight
    (..., blocks, q, p)."""
    blocks, _, p = weight.shape[-3:]
    columns = input.unflatten(-1, (blocks, p)).transpose(-3, -2)
    return (columns @ weight.mT).transpose(-3, -2)


def _reference(input: Tensor, weight: Tensor, bias: Tensor | None, tf32: bool = False) -> Tensor:
    output = block_products(input, weight).flatten(-2)
    return (output if bias is None else output + bias.unsqueeze(-2)).contiguous()


def _backward_reference(
    grad: Tensor, input: Tensor, weight: Tensor, wanted: int, tf32: bool
) -> tuple[Tensor, Tensor]:
    blocks, q, p = weight.shape[-3:]
    nothing = input.new_empty((*weight.shape[:-3], 0))
    of_blocks = grad.unflatten(-1, (blocks, q)).transpose(-3, -2)
    columns = input.unflatten(-1, (blocks, p)).transpose(-3, -2)
    return (
        (of_blocks @ weight).transpose(-3, -2).flatten(-2).contiguous() if wanted & 1 else nothing,
        (of_blocks.mT @ columns).contiguous() if wanted & 2 else nothing.clone(),
    )


def _fake(input: Tensor, weight: Tensor, bias: Tensor | None, tf32: bool) -> Tensor:
    return input.new_empty((input.shape[0], weight.shape[0] * weight.shape[1]))


def _backward_fake(
    grad: Tensor, input: Tensor, weight: Tensor, wanted: int, tf32: bool
) -> tuple[Tensor, Tensor]:
    return (
        input.new_empty(input.shape if wanted & 1 else (0,)),
        weight.new_empty(weight.shape if wanted & 2 else (0,)),
    )


def vmap_over_rows(name: str, reference: Any) -> Any:
    """The vmap rule of a product: inputs of a batch are more rows, and weights of a batch are what a
    batched product has always been for."""
    batched_weights = vmap_by_reference(reference)

    def rule(info: Any, in_dims: Any, input: Tensor, *others: Any) -> Any:
        if any(dim is not None for dim in in_dims[1:]):
            return batched_weights(info, in_dims, input, *others)
        batch = input.movedim(in_dims[0], 0)
        output = getattr(torch.ops.fusee, name)(batch.flatten(0, 1), *others)
        return output.unflatten(0, batch.shape[:2]), 0

    return rule


def divides(input: Any, count: int) -> bool:
    """Whether the parts of a mesh get equal shares of ``count``."""
    return bool(count % input.mesh.size() == 0)


def _sharding(input: Any, weight: Any, bias: Any, tf32: bool) -> list[Any]:
    """Rows may be split, or blocks."""
    from torch.distributed.tensor import Replicate, Shard

    whole: Any = Replicate()
    choices = [([output], [output, whole, bias and whole, None]) for output in (whole, Shard(0))]
    if divides(input, weight.shape[0]):
        choices.append(([Shard(1)], [Shard(1), Shard(0), bias and Shard(0), None]))
    return choices


def _backward_sharding(grad: Any, input: Any, weight: Any, wanted: int, tf32: bool) -> list[Any]:
    """As forward; parts of the rows give parts of the sum that is the weight's gradient."""
    from torch.distributed.tensor import Partial, Shard

    choices = []
    for (output,), (_, of_weight, *_) in _sharding(input, weight, None, tf32):
        summed = Partial("sum") if output == Shard(0) else of_weight
        results = of_wanted(wanted, (output, summed))
        choices.append((results, [output, output, of_weight, None, None]))
    return choices


def _backward(ctx: Any, args: Any, saved: Any, grad: Tensor) -> Any:
    input, weight, _, tf32 = args

    def grads(wanted: int) -> Any:
        return _block_diagonal_matmul_backward(grad, input, weight, wanted, tf32)

    return *needed(ctx, grads, 2), grad.sum(0) if ctx.needs_input_grad[2] else None, None


_block_diagonal_matmul = Op(
    "block_diagonal_matmul",
    fake=_fake,
    reference=_reference,
    vmap=vmap_over_rows("block_diagonal_matmul", _reference),
    differentiable=((0, 1, 2), (0,)),
    backward=_backward,
    sharding=_sharding,
)
_block_diagonal_matmul_backward = Op(
    "block_diagonal_matmul_backward",
    fake=_backward_fake,
    reference=_backward_reference,
    vmap=vmap_by_reference(_backward_reference),
    differentiable=((0, 1, 2), (0, 1)),
    sharding=_backward_sharding,
)


def check_blocks(name: str, value: Any) -> None:
    """Raises unless ``value`` can be the blocks of a factor."""
    check_floating(name, value)
    if value.dim() != 3:
        raise ValueError(
            f"{name} must have three dimensions (blocks, rows, columns), got {tuple(value.shape)}"
        )
    if value.shape[0] == 0:
        raise ValueError(f"{name} must have at least one block, got shape {tuple(value.shape)}")


def check_product(
    input: Any, factors: dict[str, Tensor], bias: Tensor | None, out_features: int
) -> None:
    """Raises unless the input fits the first factor and the bias the last; ``factors`` are checked each
    for itself."""
    check_floating("input", input)
    name, first = next(iter(factors.items()))
    in_features = first.shape[0] * first.shape[2]
    if input.dim() == 0 or input.shape[-1] != in_features:
        raise ValueError(
            f"input must have {in_features} features in its last dimension for {name} "
            f"{tuple(first.shape)}, got {tuple(input.shape)}"
        )
    others = dict(factors)
    if bias is not None:
        check_floating("bias", bias)
        if bias.shape != (out_features,):
            raise ValueError(f"bias must have shape ({out_features},), got {tuple(bias.shape)}")
        others["bias"] = bias
    for name, tensor in others.items():
        check_beside(name, tensor, "input", input)


def block_diagonal_matmul(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""Multiplies each block of the input's features with its own matrix.

    .. math:: y_{\kappa q + j} = \sum_i W_{\kappa j i}\, x_{\kappa p + i} + b_{\kappa q + j}

    It is ``F.linear(input, torch.block_diag(*weight), bias)`` without the zeros. torch's batched product
    would copy the features of each block together and apart again; here they are read and written
    where they are.

    Args:
        input: x (..., blocks * p), any strides; float32, float64, bfloat16 or float16. Half types are
            summed in float32.
        weight: W (blocks, q, p), of the dtype of ``input``.
        bias: b (blocks * q), of the dtype of ``input``.

    Returns:
        A tensor (..., blocks * q) of the dtype of ``input``.

    Raises:
        TypeError: an argument is not a dense floating-point tensor, or of another dtype than ``input``.
        ValueError: shapes that do not fit, no blocks, or tensors on different devices.

    Differentiable in all tensors, to any order and in forward mode. Under autocast it runs in the
    autocast dtype, as ``F.linear`` does. Deterministic: the same bits on the same engine, whatever the
    number of threads, but for the bias's gradient, which torch sums. Of a DTensor the rows or the blocks
    may be sharded, without communication but for the weights' gradients of sharded rows.

    Source: the single stage of :func:`fusee.monarch_matmul`.

    Example:
        >>> import torch, fusee
        >>> weight = torch.tensor([[[1.0, 1.0]], [[1.0, -1.0]]])
        >>> fusee.block_diagonal_matmul(torch.tensor([1.0, 2.0, 3.0, 4.0]), weight)
        tensor([ 3., -1.])
    """
    check_blocks("weight", weight)
    features = weight.shape[0] * weight.shape[1]
    check_product(input, {"weight": weight}, bias, features)
    input, weight, bias = autocast_product(input, weight, bias)
    output: Tensor = _block_diagonal_matmul(as_rows(input), weight, bias, allows_tf32(input))
    return output if input.dim() == 2 else output.reshape(*input.shape[:-1], features)
