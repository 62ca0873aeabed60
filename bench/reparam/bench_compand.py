"""The weight compander, of one large weight and of all weights of a ResNet-50.

w = a f(v / b), with f = arctan or tanh. Gradients go to v, a and b.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.harness import COPY, STREAM, Case, Peer, Work, bench_cases, compiled
from bench.models import resnet50_shapes
from bench.reparam.peers import eager_compand, eager_loop

EAGER = "eager expression"
COMPILED = "torch.compile of it"
LOOP = "loop of fusee.compand"
EAGER_LOOP = "loop of eager expressions"
SMALL = 4096
"""A tensor with fewer elements is one whose time is that of the call."""


def fusee_compand(kind: str) -> Callable[..., Tensor]:
    """Our operator."""
    function = importlib.import_module("fusee").compand

    def call(input: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return function(input, a, b, kind)

    return call


def one_case(kind: str, shape: tuple[int, ...], *, channels: bool = False) -> Case:
    """Forward: read v, write w. Backward: read v and the upstream gradient, write that of v."""
    n = 4 * math.prod(shape)
    speed = {EAGER: 5.0, COMPILED: 1.5}

    def setup(device: str) -> dict[str, Any]:
        count = shape[0] if channels else 1
        return {
            "input": torch.randn(shape, device=device),
            "a": torch.linspace(1.0, 2.0, count, device=device),
            "b": torch.linspace(1.0, 0.5, count, device=device),
        }

    size = " x ".join(map(str, shape))
    return Case(
        name="compand",
        label=f"{kind} {size} float32" + (", a and b of channels" if channels else ""),
        setup=setup,
        grad=("input", "a", "b"),
        work={
            "forward": Work(bytes=2 * n, written=n, bars={**speed, COPY: 1 / 1.25}),
            "backward": Work(bytes=3 * n, written=n, bars={**speed, STREAM: 1 / 1.35}),
            "forward+backward": Work(bytes=5 * n, written=2 * n, bars=speed),
        },
        contenders={
            "fusee": Peer(lambda: fusee_compand(kind), requires="fusee"),
            EAGER: Peer(lambda: eager_compand(kind)),
            COMPILED: Peer(lambda: compiled(eager_compand(kind)), slow_start=True),
        },
    )


def loop_of_calls() -> Callable[..., tuple[Tensor, ...]]:
    """Our operator on each weight in turn."""
    compand = importlib.import_module("fusee").compand

    def loop(inputs: list[Tensor], a: list[Tensor], b: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(compand(*item) for item in zip(inputs, a, b, strict=True))

    return loop


def list_case(shapes: list[tuple[int, ...]], label: str, bars: dict[str, float]) -> Case:
    """All weights, each with an a and a b of its own."""
    n = 4 * sum(map(math.prod, shapes))

    def setup(device: str) -> dict[str, Any]:
        return {
            "inputs": [0.05 * torch.randn(shape, device=device) for shape in shapes],
            "a": [torch.full((1,), 0.1, device=device) for _ in shapes],
            "b": [torch.full((1,), 0.08, device=device) for _ in shapes],
        }

    return Case(
        name="compand_foreach",
        label=label,
        setup=setup,
        grad=("inputs", "a", "b"),
        work={
            "forward": Work(bytes=2 * n, written=n, bars=bars),
            "forward+backward": Work(bytes=5 * n, written=2 * n, bars=bars),
        },
        contenders={
            "fusee": Peer(
                lambda: importlib.import_module("fusee").compand_foreach, requires="fusee"
            ),
            LOOP: Peer(loop_of_calls, requires="fusee"),
            EAGER_LOOP: Peer(lambda: eager_loop),
        },
    )


RESNET50 = list(resnet50_shapes())
SMALL_OF_RESNET50 = [shape for shape in RESNET50 if math.prod(shape) < SMALL]

test_compand = bench_cases(
    [
        one_case("arctan", (1 << 24,)),
        one_case("tanh", (1 << 24,)),
        one_case("arctan", (2048, 910, 3, 3), channels=True),
    ],
    quick=[one_case("arctan", (1000,)), one_case("tanh", (8, 4, 3, 3), channels=True)],
)
test_compand_foreach = bench_cases(
    [
        list_case(RESNET50, "ResNet-50, 161 tensors float32", {}),
        list_case(
            SMALL_OF_RESNET50,
            f"ResNet-50, its {len(SMALL_OF_RESNET50)} tensors of under {SMALL} float32",
            {LOOP: 3.0},
        ),
    ],
    quick=[list_case([(8, 3, 3, 3), (8,), (4, 8)], "3 tensors float32", {})],
)
