"""Rules of operators whose tensors all begin with the problems of a batch, which are solved apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusee._op import batch_outer, fold_batch, unfold_batch


def vmap_of_problems(name: str) -> Any:
    """The rule of an operator whose tensors all begin with the problems of a batch."""

    def rule(info: Any, in_dims: Any, *args: Any) -> Any:
        places = [i for i, value in enumerate(args) if isinstance(value, Tensor)]
        dims = [in_dims[i] for i in places]
        tensors = [args[i] for i in places]
        outer = batch_outer(tensors, dims)
        folded = list(args)
        for place, tensor in zip(places, fold_batch(info, dims, tensors), strict=True):
            folded[place] = tensor
        outputs = getattr(torch.ops.fusee, name)(*folded)
        if isinstance(outputs, Tensor):
            return unfold_batch(info, outputs, outer), 0
        # Without y there is no gradient in it.
        results = (
            unfold_batch(info, out, outer)
            if len(out) == len(folded[0])
            else out.expand(info.batch_size, 0)
            for out in outputs
        )
        return tuple(results), (0,) * len(outputs)

    return rule


def sharding_of_problems(outputs: int) -> Any:
    """The rule of an operator that solves the problems of a batch apart: they may be split."""

    def rule(*args: Any) -> list[Any]:
        from torch.distributed.tensor import Replicate, Shard

        tensors = [hasattr(arg, "placements") for arg in args]
        return [
            ([place] * outputs, [place if tensor else None for tensor in tensors])
            for place in (Replicate(), Shard(0))
        ]

    return rule
