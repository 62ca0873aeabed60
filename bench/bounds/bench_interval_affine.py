"""ReLU and batch norm on boxes against the eager expressions, and against moving both arrays once."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bench.bounds.peers import Pair, eager_relu
from bench.harness import COPY, Case, Peer, Work, bench_cases, compiled

EAGER = "eager expression"
COMPILED = "the same, torch.compile"


def eager_batch_norm(
    center: Tensor, radius: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor
) -> Pair:
    """Scale and shift, and ReLU at both ends."""
    shape = (-1, *[1] * (center.dim() - 2))
    scale = weight * torch.rsqrt(var + 1e-5)
    shift = (bias - mean * scale).view(shape)
    return eager_relu(center * scale.view(shape) + shift, radius * scale.abs().view(shape))


def fusee_function(name: str, **options: Any) -> Callable[[], Callable[..., Pair]]:
    def make() -> Callable[..., Pair]:
        function = getattr(importlib.import_module("fusee"), name)
        return lambda **inputs: function(**inputs, **options)

    return make


def boxes(*shape: int) -> Callable[[str], dict[str, Any]]:
    def setup(device: str) -> dict[str, Any]:
        draw = {"device": device}
        return {"center": torch.randn(shape, **draw), "radius": torch.rand(shape, **draw)}

    return setup


def relu_case(elements: int, bars: Mapping[str, float] | None = None) -> Case:
    size = 4 * elements
    return Case(
        name="interval_relu",
        label=f"{elements} float32",
        setup=boxes(elements),
        grad=("center", "radius"),
        work={
            "forward": Work(4 * size, 2 * size, bars=bars or {}),
            "forward+backward": Work(10 * size, 4 * size),
        },
        contenders={
            "fusee": Peer(fusee_function("interval_relu"), requires="fusee"),
            EAGER: Peer(lambda: eager_relu),
            COMPILED: Peer(lambda: compiled(eager_relu), slow_start=True),
        },
    )


def norm_case(batch: int, channels: int, side: int) -> Case:
    shape = (batch, channels, side, side)
    size = 4 * batch * channels * side * side

    def setup(device: str) -> dict[str, Any]:
        of_channels = {
            "mean": torch.randn(channels, device=device),
            "var": torch.rand(channels, device=device) + 0.5,
            "weight": torch.randn(channels, device=device),
            "bias": torch.randn(channels, device=device),
        }
        return {**boxes(*shape)(device), **of_channels}

    return Case(
        name="interval_batch_norm",
        label=f"{batch} x {channels} x {side} x {side} float32, ReLU",
        setup=setup,
        grad=("center", "radius", "mean", "var", "weight", "bias"),
        work={
            "forward": Work(4 * size, 2 * size),
            "forward+backward": Work(12 * size, 4 * size),
        },
        contenders={
            "fusee": Peer(fusee_function("interval_batch_norm", relu=True), requires="fusee"),
            EAGER: Peer(lambda: eager_batch_norm),
            COMPILED: Peer(lambda: compiled(eager_batch_norm), slow_start=True),
        },
    )


test_interval_relu = bench_cases(
    [relu_case(2**21, {COPY: 1 / 1.3}), relu_case(2**15)], quick=[relu_case(64)]
)
test_interval_batch_norm = bench_cases([norm_case(32, 64, 32)], quick=[norm_case(2, 3, 4)])
