"""Block-diagonal products against a batched product over the blocks."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from bench.harness import Case, Peer, Work, bench_cases
from bench.structured.peers import batched_blocks

BATCHED = "torch.bmm over the blocks"


def case(n: int, blocks: int, batch: int) -> Case:
    """A square layer."""
    size = n // blocks
    weights = blocks * size * size

    def setup(device: str) -> dict[str, Any]:
        weight = torch.randn(blocks, size, size, device=device) / size**0.5
        return {"input": torch.randn(batch, n, device=device), "weight": weight}

    data = 4 * batch * n
    forward = Work(2 * data + 4 * weights, data, 2 * batch * weights, {BATCHED: 0.95})
    both = Work(4 * data + 12 * weights, 2 * data + 4 * weights, 6 * batch * weights)
    return Case(
        name="block_diagonal_matmul",
        label=f"{batch} x {n}, {blocks} blocks, float32",
        setup=setup,
        grad=("input", "weight"),
        ceiling="fma",
        work={"forward": forward, "forward+backward": both},
        contenders={
            "fusee": Peer(
                lambda: importlib.import_module("fusee").block_diagonal_matmul, requires="fusee"
            ),
            BATCHED: Peer(lambda: batched_blocks),
        },
    )


test_block_diagonal_matmul = bench_cases(
    [case(n, blocks, batch) for n, blocks in ((1024, 32), (4096, 16)) for batch in (1, 64, 1024)],
    quick=[case(16, 4, 3)],
)
