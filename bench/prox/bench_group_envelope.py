"""The value of the group envelope and its gradient: of single elements, and of the filters of a layer.

S = 1/2 sum over n_j > theta of n_j^2 + T^2 / (2 (k - N)),  sum_j min(1, n_j / theta) = k
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.harness import Case, Peer, Work, bench_cases

SORT = "sort, index rule (torch)"


# ADAPTER: the one place that knows our public API.
def fusee_envelope() -> Callable[..., Tensor]:
    """Our penalty."""
    envelope = importlib.import_module("fusee").group_envelope
    return lambda input, k: envelope(input, k)


def sorted_envelope(input: Tensor, k: int) -> Tensor:
    """What one writes without it: the number of free groups from the sorted norms and their tails.

    The derivative in the sorted norms is right, as the number is constant around them.
    """
    norms = input.flatten(1).norm(dim=1) if input.dim() > 1 else input.abs()
    z = norms.sort(descending=True).values
    first = z[: k + 1]
    tails = z.sum() - torch.cat([z.new_zeros(1), first.cumsum(0)])[:k]
    knees = tails.detach() / (k - torch.arange(k, device=z.device))
    # The first number of free groups whose knee is not below the next norm.
    free = int((knees > first[:k].detach()).nonzero()[0]) if k < len(z) else len(z)
    rest = z[free:].sum()
    return (z[:free].square().sum() + rest.square() / max(k - free, 1)) / 2


def case(shape: tuple[int, ...], label: str) -> Case:
    """Read the input; backward, read it again and write the gradient."""
    n = 4 * torch.Size(shape).numel()

    def setup(device: str) -> dict[str, Any]:
        return {"input": torch.randn(shape, device=device, requires_grad=True), "k": shape[0] // 10}

    return Case(
        name="group_envelope",
        label=label,
        setup=setup,
        grad=("input",),
        work={
            "forward": Work(bytes=n),
            "forward+backward": Work(bytes=3 * n, written=n),
        },
        contenders={
            "fusee": Peer(fusee_envelope, requires="fusee"),
            SORT: Peer(lambda: sorted_envelope),
        },
    )


test_group_envelope = bench_cases(
    [
        case((65536,), "65536 single elements float32"),
        case((1_000_000,), "1000000 single elements float32"),
        case((512, 256, 3, 3), "512 filters of 256 x 3 x 3 float32"),
    ],
    quick=[case((100,), "100 single elements float32"), case((20, 4, 3, 3), "20 filters")],
)
