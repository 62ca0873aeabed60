"""A linear layer and StableMax cross entropy in one, logits never stored.

The chunked path of torch's `linear_cross_entropy` is softmax, but the same job: it is what a user
who is short of memory picks. Its default on CPU takes 2 rows a chunk at this size and streams the
whole weight for each (77 s against 6), so larger chunks stand beside it, and the bars hold us to
those too.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import GEMM, Absent, Case, Peer, Work, bench_cases

MATERIALISED = "F.linear + fusee cross entropy"
CHUNKED = "torch linear_cross_entropy, {}"
CHUNK_ROWS = (64, 128, 256)


def torch_chunked(rows: int | None) -> Any:
    """Return torch's chunked form with `rows` a chunk, or with its default options."""
    if not hasattr(F, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Absent(f"torch {torch.__version__} has no chunked linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions  # given options, the chunked path runs or warns
    chosen = options() if rows is None else options(batch_chunk_size=rows, chunking_method=None)

    return functools.partial(F.linear_cross_entropy, options=chosen)


def torch_materialised(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    """Logits by `F.linear`, then torch's softmax cross entropy."""
    return F.cross_entropy(F.linear(input, linear_weight), target)


def fusee_materialised() -> Any:
    """Logits by `F.linear`, then our loss."""
    loss = importlib.import_module("fusee").stablemax_cross_entropy

    def run(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
        return loss(F.linear(input, linear_weight), target)

    return run


def fusee_linear() -> Any:
    """Our fused form."""
    return importlib.import_module("fusee").linear_stablemax_cross_entropy


def case(rows: int, features: int, classes: int, chunk_rows: tuple[int, ...]) -> Case:
    """Three products of 2 * rows * features * classes each: logits, and the two gradients."""
    product = 2 * rows * features * classes
    operands = 4 * (rows * features + classes * features)

    def setup(device: str) -> dict[str, Any]:
        return {
            "input": torch.randn(rows, features, device=device),
            "linear_weight": torch.randn(classes, features, device=device) / features**0.5,
            "target": torch.randint(classes, (rows,), device=device),
        }

    chunked = {CHUNKED.format(f"{r} rows a chunk"): r for r in chunk_rows}
    return Case(
        name="linear_stablemax_cross_entropy",
        label=f"{rows} x {features} into {classes} float32",
        setup=setup,
        grad=("input", "linear_weight"),
        ceiling="gemm",
        work={
            "forward+backward": Work(
                bytes=2 * operands,
                written=operands,
                flops=3 * product,
                bars={
                    MATERIALISED: 1 / 1.4,
                    CHUNKED.format("default"): 1.0,
                    **dict.fromkeys(chunked, 1.0),
                },
                memory_limit=4 * rows * classes // 10,
            )
        },
        contenders={
            "fusee": Peer(fusee_linear, requires="fusee"),
            MATERIALISED: Peer(fusee_materialised, requires="fusee"),
            "F.linear + F.cross_entropy (softmax)": Peer(lambda: torch_materialised),
            **{name: Peer(functools.partial(torch_chunked, r)) for name, r in chunked.items()},
            CHUNKED.format("default"): Peer(lambda: torch_chunked(None)),
        },
        note=f"Ceiling: {GEMM}. The logits would take {4 * rows * classes / 2**20:.0f} MiB.",
    )


test_linear_stablemax_cross_entropy = bench_cases(
    [case(1024, 512, 131072, CHUNK_ROWS)], quick=[case(32, 16, 128, (8,))]
)
