"""What operators of matrix products share: which gradients are wanted, leading dimensions, TF32."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusee._op import batch_first, without_autocast


def vmap_by_reference(reference: Any) -> Any:
    """The vmap rule of an operator whose reference takes leading dimensions."""

    def rule(info: Any, in_dims: Any, *args: Any) -> Any:
        batched = batch_first(info, in_dims, args)
        with without_autocast(batched):
            outputs = reference(*batched)
        return outputs, 0 if isinstance(outputs, Tensor) else (0,) * len(outputs)

    return rule


def of_wanted(wanted: int, placements: Any) -> list[Any]:
    """The placements of the gradients that are asked for; the others are empty."""
    from torch.distributed.tensor import Replicate

    return [where if wanted >> i & 1 else Replicate() for i, where in enumerate(placements)]


def needed(ctx: Any, grads: Callable[..., Any], count: int) -> list[Tensor | None]:
    """The gradients of the first ``count`` inputs, of those that need one; ``grads`` takes their set as
    bits."""
    flags = ctx.needs_input_grad[:count]
    wanted = sum(1 << i for i, flag in enumerate(flags) if flag)
    made = grads(wanted) if wanted else flags
    return [value if flag else None for value, flag in zip(made, flags, strict=True)]


def filled(grads: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of outputs, zeros for those that have none."""
    pairs = zip(grads, outputs, strict=True)
    return [torch.zeros_like(output) if grad is None else grad for grad, output in pairs]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _tf32_is_allowed() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def allows_tf32(input: Tensor) -> bool:
    """Whether torch may round the operands of this product to TF32, which the user has to allow."""
    return input.is_cuda and input.dtype == torch.float32 and bool(_tf32_is_allowed())


def as_rows(input: Tensor) -> Tensor:
    """The input as (rows, features)."""
    if input.dim() == 2:
        return input
    return input.reshape(math.prod(input.shape[:-1]), input.shape[-1])
