"""The operator in place on all tensors of a ResNet-50 in one call, against a loop over the tensors."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.harness import Case, Peer, Work, bench_cases
from bench.models import resnet50_shapes
from bench.prox.bench_prox_group_envelope import sorted_prox

LAM = 1e-5


# ADAPTER: the one place that knows our public API.
def fusee_in_place() -> Callable[..., Any]:
    """All tensors in one call; half of the groups of each are free."""
    prox = importlib.import_module("fusee.optim").prox_group_envelope_

    def run(tensors: list[Tensor]) -> None:
        prox(tensors, [max(len(x) // 2, 1) for x in tensors], LAM)

    return run


def fusee_loop() -> Callable[..., Any]:
    """The function, tensor by tensor."""
    prox = importlib.import_module("fusee").prox_group_envelope

    def run(tensors: list[Tensor]) -> None:
        for x in tensors:
            x.copy_(prox(x, max(len(x) // 2, 1), LAM))

    return run


def sorted_loop(tensors: list[Tensor]) -> None:
    """What one writes without the operator."""
    for x in tensors:
        x.copy_(sorted_prox(x, max(len(x) // 2, 1), LAM))


def case(shapes: list[tuple[int, ...]], label: str) -> Case:
    """Read the weights for their norms; read and write them to scale them."""
    count = sum(torch.Size(shape).numel() for shape in shapes)

    def setup(device: str) -> dict[str, Any]:
        return {"tensors": [0.05 * torch.randn(shape, device=device) for shape in shapes]}

    return Case(
        name="prox_group_envelope_",
        label=label,
        setup=setup,
        ceiling="copy_",
        work={"forward": Work(bytes=3 * 4 * count)},
        contenders={
            "fusee": Peer(fusee_in_place, requires="fusee"),
            "loop of prox_group_envelope": Peer(fusee_loop, requires="fusee"),
            "sort for each tensor (torch)": Peer(lambda: sorted_loop),
        },
        note="Nothing is differentiated: 'forward' is the operator, in place.",
    )


test_prox_group_envelope_in_place = bench_cases(
    [case(list(resnet50_shapes()), "ResNet-50, 161 tensors float32")],
    quick=[case([(8, 3, 3, 3), (8,), (4, 8)], "3 tensors float32")],
)
