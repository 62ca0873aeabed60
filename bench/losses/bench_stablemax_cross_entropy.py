"""StableMax cross entropy of given logits, against what HRM, TRM and compiler users run."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F

from bench.harness import COPY, Case, Peer, Work, bench_cases, compiled
from bench.losses.peers import eager_float64, symlog_cross_entropy

EAGER64 = "eager float64 (HRM, TRM)"
COMPILED = "torch.compile, symlog"


def fusee() -> Any:
    """Our loss."""
    return importlib.import_module("fusee").stablemax_cross_entropy


def case(
    rows: int,
    classes: int,
    dtype: torch.dtype = torch.float32,
    bars: dict[str, float] | None = None,
) -> Case:
    """Forward reads the logits once; backward reads them again and writes their gradient."""
    n = rows * classes * dtype.itemsize

    def setup(device: str) -> dict[str, Any]:
        return {
            "input": (3 * torch.randn(rows, classes, device=device)).to(dtype),
            "target": torch.randint(classes, (rows,), device=device),
        }

    return Case(
        name="stablemax_cross_entropy",
        label=f"{rows} x {classes} {str(dtype).removeprefix('torch.')}",
        setup=setup,
        grad=("input",),
        work={
            "forward": Work(bytes=n),
            "forward+backward": Work(bytes=3 * n, written=n, bars=bars or {}),
        },
        contenders={
            "fusee": Peer(fusee, requires="fusee"),
            EAGER64: Peer(lambda: eager_float64),
            "eager symlog": Peer(lambda: symlog_cross_entropy),
            COMPILED: Peer(lambda: compiled(symlog_cross_entropy), slow_start=True),
            "F.cross_entropy (softmax, another loss)": Peer(lambda: F.cross_entropy),
        },
    )


test_stablemax_cross_entropy = bench_cases(
    [
        case(4096, 32000, bars={EAGER64: 10.0, COMPILED: 2.0, COPY: 1 / 1.25}),
        case(131072, 11, bars={EAGER64: 10.0, COMPILED: 3.0}),
        case(1024, 1000),
        case(4096, 32000, torch.bfloat16),
        case(131072, 11, torch.bfloat16),
    ],
    quick=[case(64, 11), case(16, 100, torch.bfloat16)],
)
