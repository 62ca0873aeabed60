"""A step of ProxSGD on all tensors of a ResNet-50, against the same step of torch.optim.SGD.

    m' = mu m + g,   v = w - lr m',   w' = prox of v, a scope for each tensor

The operator reads the weights once more and scales them; what a peer takes is a step without it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.harness import Case, Peer, Work, bench_cases
from bench.models import resnet50_shapes
from bench.prox.bench_prox_group_envelope import sorted_prox

SGD = "torch.optim.SGD(foreach=True), no operator"
LR, MOMENTUM, LAM = 1e-3, 0.9, 1e-2


def step_of(make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Callable[..., None]:
    """A function of ``params`` that makes the optimizer once and steps it."""
    made: list[torch.optim.Optimizer] = []

    def run(params: list[Tensor]) -> None:
        if not made:
            made.append(make(params))
        made[0].step()

    return run


def torch_sgd(params: list[Tensor]) -> torch.optim.Optimizer:
    """The optimizer without an operator."""
    return torch.optim.SGD(params, lr=LR, momentum=MOMENTUM, foreach=True)


# ADAPTER: the one place that knows our public API.
def fusee_sgd(**options: Any) -> Callable[[], Callable[..., None]]:
    """A step of our optimizer: half of the groups of every tensor are free."""

    def make(params: list[Tensor]) -> torch.optim.Optimizer:
        host = importlib.import_module("fusee.optim").ProxSGD
        chosen: Any = {"lr": LR, "momentum": MOMENTUM, "lam": LAM, "density": 0.5, **options}
        return host(params, **chosen)

    return lambda: step_of(make)


def eager_step() -> Callable[..., None]:
    """What one writes without the operator: a sort for each tensor after the step."""
    step = step_of(torch_sgd)

    def run(params: list[Tensor]) -> None:
        step(params)
        for param in params:
            with torch.no_grad():
                param.copy_(sorted_prox(param, max(param.shape[0] // 2, 1), LR * LAM))

    return run


def case(shapes: list[tuple[int, ...]], label: str) -> Case:
    """Read w, g and m and write w and m; then read w, and read and write it again."""
    count = sum(torch.Size(shape).numel() for shape in shapes)

    def setup(device: str) -> dict[str, Any]:
        params = [torch.nn.Parameter(0.05 * torch.randn(shape, device=device)) for shape in shapes]
        for param in params:
            param.grad = 1e-3 * torch.randn_like(param)
        return {"params": params}

    return Case(
        name="prox_sgd",
        label=label,
        setup=setup,
        ceiling="copy_",
        work={"forward": Work(bytes=8 * 4 * count, bars={SGD: 1 / 1.5})},
        contenders={
            "fusee": Peer(fusee_sgd(foreach=True), requires="fusee"),
            "fusee, debiased": Peer(fusee_sgd(foreach=True, debiased=True), requires="fusee"),
            "fusee, fused=True": Peer(fusee_sgd(fused=True), requires="fusee"),
            SGD: Peer(lambda: step_of(torch_sgd)),
            "sort for each tensor (torch)": Peer(eager_step),
        },
        note="Nothing is differentiated: 'forward' is a step of the optimizer, in place.",
    )


test_prox_sgd = bench_cases(
    [case(list(resnet50_shapes()), "ResNet-50, 161 tensors float32")],
    quick=[case([(8, 3, 3, 3), (8,), (4, 8)], "3 tensors float32")],
)
