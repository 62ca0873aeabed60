"""Monarch products against the formulation of their authors, and against the dense layer."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bench.harness import FMA, Case, Peer, Work, bench_cases
from bench.structured.peers import dense_linear, fly_monarch, plain_monarch

FLY = "fly: two torch.bmm and permutations"
PLAIN = "two torch.bmm and permutations, plain operators"
COMPILED = "the same, torch.compile"
DENSE = "dense F.linear"
WIDTHS = {256: (4, 16), 1024: (4, 16, 32), 4096: (4, 16, 64)}
BATCHES = (1, 8, 64, 1024)


def fusee_monarch() -> Callable[..., Tensor]:
    """Our fused product."""
    function = importlib.import_module("fusee").monarch_matmul
    return lambda input, w1, w2, dense: function(input, w1, w2)


def case(
    n: int,
    nblocks: int,
    batch: int,
    bars: Mapping[str, Mapping[str, float]],
    dtype: torch.dtype = torch.float32,
    *,
    dense: bool = True,
    compiled: bool = False,
) -> Case:
    """A square layer; the modes are those of the bars, forward at least."""
    size = n // nblocks
    weights = 2 * nblocks * size * size
    flops = 2 * batch * weights

    def setup(device: str) -> dict[str, Any]:
        def factor() -> Tensor:
            return torch.randn(nblocks, size, size, device=device, dtype=dtype) / size**0.5

        weight = torch.randn(n if dense else 0, n, device=device, dtype=dtype) / n**0.5
        x = torch.randn(batch, n, device=device, dtype=dtype)
        return {"input": x, "w1": factor(), "w2": factor(), "dense": weight}

    item = dtype.itemsize
    forward = item * (2 * batch * n + weights)
    both = forward + item * (2 * batch * n + 2 * weights)
    work = {
        "forward": Work(forward, item * batch * n, flops, bars.get("forward", {})),
        "forward+backward": Work(
            both, item * (2 * batch * n + weights), 3 * flops, bars.get("forward+backward", {})
        ),
    }
    contenders = {
        "fusee": Peer(fusee_monarch, requires="fusee"),
        FLY: Peer(lambda: fly_monarch),
        PLAIN: Peer(lambda: plain_monarch),
        **(
            {COMPILED: Peer(lambda: torch.compile(plain_monarch), slow_start=True)}
            if compiled
            else {}
        ),
        **({DENSE: Peer(lambda: dense_linear, grad=("input", "dense"))} if dense else {}),
    }
    return Case(
        name="monarch_matmul",
        label=f"{batch} x {n}, {nblocks} blocks, {str(dtype).removeprefix('torch.')}",
        setup=setup,
        grad=("input", "w1", "w2"),
        ceiling="fma" if dtype == torch.float32 else "none",
        work={mode: work[mode] for mode in ("forward", *bars) if mode in work},
        contenders=contenders,
    )


def forward(fly: float, dense: float, ceiling: float = 0.0) -> dict[str, dict[str, float]]:
    """The bars of a forward pass."""
    return {"forward": {FLY: fly, DENSE: dense, **({FMA: ceiling} if ceiling else {})}}


PROMISED = {
    (1024, 32, 64): {**forward(3.0, 10.0), "forward+backward": {FLY: 2.5}},
    (1024, 32, 1024): {"forward": {FLY: 0.95, FMA: 0.55}},
    (4096, 64, 1): forward(3.0, 15.0),
    (4096, 64, 64): forward(1.8, 25.0),
    (4096, 64, 1024): forward(1.6, 15.0, 0.55),
}

test_promised = bench_cases(
    [case(*sizes, bars, compiled=True) for sizes, bars in PROMISED.items()],
    quick=[case(16, 4, 3, {"forward": {}, "forward+backward": {}}, compiled=True)],
)
test_grid = bench_cases(
    [
        case(n, nblocks, batch, {"forward": {FLY: 0.95}, "forward+backward": {}})
        for n, counts in WIDTHS.items()
        for nblocks in counts
        for batch in BATCHES
        if (n, nblocks, batch) not in PROMISED
    ],
    quick=[case(16, 2, 1, {"forward": {}})],
)
test_bfloat16 = bench_cases(
    [case(1024, 32, batch, {"forward": {}}, torch.bfloat16) for batch in (64, 1024)],
    quick=[case(16, 4, 3, {"forward": {}}, torch.bfloat16)],
)
