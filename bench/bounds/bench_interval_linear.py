"""Boxes through linear layers against two products, as every library of bounds computes them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from bench.bounds.peers import Pair, cached_linear, pair_linear
from bench.harness import Case, Peer, Work, bench_cases, compiled

PAIR = "two F.linear, |W| at each call"
CACHED = "two F.linear, |W| from before"
COMPILED = "the former, torch.compile"
BATCHES = (1, 8, 32, 128, 512)
WIDTHS = (512, 1024, 2048, 4096)


def fusee_linear(sound: bool) -> Callable[[], Callable[..., Pair]]:
    def make() -> Callable[..., Pair]:
        function = importlib.import_module("fusee").interval_linear

        def run(center: Any, radius: Any, weight: Any, bias: Any, magnitudes: Any) -> Pair:
            result: Pair = function(center, radius, weight, bias, sound=sound)
            return result

        return run

    return make


def case(
    n: int,
    batch: int,
    bars: Mapping[str, Mapping[str, float]],
    dtype: torch.dtype = torch.float32,
    *,
    sound: bool = False,
    compile_peer: bool = False,
) -> Case:
    """A square layer."""

    def setup(device: str) -> dict[str, Any]:
        weight = torch.randn(n, n, device=device, dtype=dtype) / n**0.5
        return {
            "center": torch.randn(batch, n, device=device, dtype=dtype),
            "radius": torch.rand(batch, n, device=device, dtype=dtype),
            "weight": weight,
            "bias": torch.randn(n, device=device, dtype=dtype),
            "magnitudes": weight.abs(),
        }

    item, boxes, weights = dtype.itemsize, 2 * batch * n, n * n
    flops = 4 * batch * weights
    work = {
        "forward": Work(item * (2 * boxes + weights), item * boxes, flops, bars.get("forward", {})),
        "forward+backward": Work(
            item * (6 * boxes + 4 * weights),
            item * (2 * boxes + weights),
            3 * flops,
            bars.get("forward+backward", {}),
        ),
    }
    peers = {PAIR: Peer(lambda: pair_linear)}
    if "forward+backward" not in bars:
        peers[CACHED] = Peer(lambda: cached_linear)
    if compile_peer:
        peers[COMPILED] = Peer(lambda: compiled(pair_linear), slow_start=True)
    return Case(
        name="interval_linear" + ("_sound" if sound else ""),
        label=f"{batch} x {n}, {str(dtype).removeprefix('torch.')}",
        setup=setup,
        grad=("center", "radius", "weight", "bias"),
        ceiling="fma" if dtype == torch.float32 else "none",
        work={mode: work[mode] for mode in bars},
        contenders={"fusee": Peer(fusee_linear(sound), requires="fusee"), **peers},
    )


PROMISED = {
    (4096, 1): {PAIR: 10.0, CACHED: 2.5},
    (4096, 8): {PAIR: 4.0, CACHED: 1.8},
    (4096, 32): {PAIR: 2.5, CACHED: 1.1},
}
GRID = [(n, batch) for n in WIDTHS for batch in BATCHES if (n, batch) not in PROMISED]
TINY = {"forward": {PAIR: 0.0}}

test_promised = bench_cases(
    [case(*sizes, {"forward": bars}, compile_peer=True) for sizes, bars in PROMISED.items()],
    quick=[case(16, 3, TINY, compile_peer=True)],
)
test_grid = bench_cases(
    [case(n, batch, {"forward": {PAIR: 0.97}}) for n, batch in GRID], quick=[case(16, 2, TINY)]
)
test_sound = bench_cases(
    [case(n, b, {"forward": {PAIR: 1.0}}, sound=True) for n in WIDTHS for b in (1, 8, 32)],
    quick=[case(16, 2, TINY, sound=True)],
)
test_training = bench_cases(
    [
        case(n, b, {"forward+backward": {PAIR: 2.0 if (n, b) == (2048, 32) else 0.97}})
        for n, b in ((512, 32), (1024, 128), (2048, 1), (2048, 32), (2048, 512))
    ],
    quick=[case(16, 2, {"forward+backward": {}})],
)
test_bfloat16 = bench_cases(
    [case(2048, batch, {"forward": {}}, torch.bfloat16) for batch in (1, 32, 512)],
    quick=[case(16, 2, {"forward": {}}, torch.bfloat16)],
)
