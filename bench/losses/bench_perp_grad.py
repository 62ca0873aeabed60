"""The projection of PerpGrad on all tensors of a ResNet-50, against a Python loop over tensors.

    a = <w, g> / (<w, w> + eps),   p = g - a w,   g' = p |g| / (|p| + eps)      per tensor

Gradients are rewritten in place in every round. That is safe to repeat: a projected gradient
projects to itself. The base optimizer does nothing, so the projection alone is timed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.harness import Case, Peer, Work, bench_cases
from bench.models import resnet50_shapes

EPSILON = 1e-30


class NoStep(torch.optim.Optimizer):
    """An optimizer whose step does nothing."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Do nothing."""
        return closure() if closure else None


def optimizer_step(wrap: Callable[[torch.optim.Optimizer], torch.optim.Optimizer]) -> Any:
    """Return a function of `params` that makes the wrapped optimizer once and steps it."""
    made: list[torch.optim.Optimizer] = []

    def run(params: list[Tensor]) -> None:
        if not made:
            made.append(wrap(NoStep(params)))
        made[0].step()

    return run


# ADAPTER: the one place that knows our public API for the projection.
def fusee_perp_grad() -> Any:
    """Our wrapper around an optimizer that does nothing."""
    return optimizer_step(importlib.import_module("fusee.optim").PerpGrad)


def eager_loop(params: list[Tensor]) -> None:
    """The reference's way: some twelve small operations for each tensor in turn."""
    for param in params:
        assert param.grad is not None
        w, g = param.data.reshape(-1), param.grad.reshape(-1)
        p = g - torch.dot(w, g) / (torch.dot(w, w) + EPSILON) * w
        param.grad.copy_((p * (g.norm(2) / (p.norm(2) + EPSILON))).view_as(param.grad))


def case(shapes: list[tuple[int, ...]], label: str) -> Case:
    """Two passes: read w and g for the three dots; read both, write g: 5 elements a weight."""
    count = sum(torch.Size(shape).numel() for shape in shapes)

    def setup(device: str) -> dict[str, Any]:
        params = [torch.nn.Parameter(0.05 * torch.randn(shape, device=device)) for shape in shapes]
        for param in params:
            param.grad = torch.randn_like(param)
        return {"params": params}

    def pytorch_optimizer() -> Any:
        return optimizer_step(importlib.import_module("pytorch_optimizer").OrthoGrad)

    return Case(
        name="perp_grad",
        label=label,
        setup=setup,
        ceiling="copy_",
        work={"forward": Work(bytes=5 * 4 * count)},
        contenders={
            "fusee": Peer(fusee_perp_grad, requires="fusee"),
            "eager loop (reference)": Peer(lambda: eager_loop),
            "pytorch_optimizer OrthoGrad": Peer(pytorch_optimizer, requires="pytorch_optimizer"),
        },
        note="Nothing is differentiated: 'forward' is the projection of all gradients, in place.",
    )


test_perp_grad = bench_cases(
    [case(list(resnet50_shapes()), "ResNet-50, 161 tensors float32")],
    quick=[case([(8, 3, 3, 3), (8,), (4, 8)], "3 tensors float32")],
)
