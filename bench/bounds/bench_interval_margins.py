"""Margins of a last layer against the tensor of all differences that others make."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from bench.bounds.peers import eager_margins
from bench.harness import Case, Peer, Work, bench_cases

EAGER = "differences (rows, classes, in)"


def case(rows: int, classes: int, features: int) -> Case:
    def setup(device: str) -> dict[str, Any]:
        return {
            "center": torch.randn(rows, features, device=device),
            "radius": torch.rand(rows, features, device=device),
            "weight": torch.randn(classes, features, device=device),
            "bias": torch.randn(classes, device=device),
            "target": torch.randint(classes, (rows,), device=device),
        }

    size = 4 * (2 * rows * features + classes * features + rows * classes)
    flops = 6 * rows * classes * features
    # What the differences alone would take, halved.
    limit = 2 * rows * classes * features
    return Case(
        name="interval_margins",
        label=f"{rows} x {features} to {classes} classes, float32",
        setup=setup,
        grad=("center", "radius", "weight", "bias"),
        ceiling="fma",
        work={
            "forward": Work(size, 4 * rows * classes, flops, {EAGER: 1.0}, memory_limit=limit),
            "forward+backward": Work(2 * size, size, 3 * flops, {EAGER: 1.0}),
        },
        contenders={
            "fusee": Peer(
                lambda: importlib.import_module("fusee").interval_margins, requires="fusee"
            ),
            EAGER: Peer(lambda: eager_margins),
        },
    )


test_interval_margins = bench_cases(
    [case(128, 10, 512), case(128, 200, 512)], quick=[case(4, 3, 8)]
)
