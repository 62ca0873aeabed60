"""The operator in a metric of elements, as Adam's denominator, in place, against the step it follows.

argmin_x 1/2 sum_i H_i (x_i - v_i)^2 + lam S_k(x), exactly, also where H differs within groups
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.harness import Case, Peer, Work, bench_cases

ADAM = "torch.optim.AdamW(fused=True), a step without an operator"
K, LAM = 0.5, 1e-3


# ADAPTER: the one place that knows our public API.
def fusee_prox() -> Callable[..., Any]:
    """Our operator; every call begins with the same weights."""
    prox = importlib.import_module("fusee.optim").prox_group_envelope_

    def run(start: Tensor, work: Tensor, metric: Tensor, **_: Any) -> None:
        work.copy_(start)
        prox(work, int(K * len(work)), LAM, metric=metric)

    return run


def adam() -> Callable[..., Any]:
    """A step of the optimizer whose denominator the metric is."""
    made: list[torch.optim.Optimizer] = []

    def run(param: Tensor, **_: Any) -> None:
        if not made:
            made.append(torch.optim.AdamW([param], fused=True))
        made[0].step()

    return run


def mean_prox() -> Callable[..., Any]:
    """The usual approximation: one number a group in the place of the metric."""
    prox = importlib.import_module("fusee").prox_group_envelope

    def run(start: Tensor, metric: Tensor, **_: Any) -> None:
        prox(start, int(K * len(start)), LAM, metric=metric.flatten(1).mean(1))

    return run


def case(shape: tuple[int, ...], label: str) -> Case:
    """At the least: read weights and metric for both ends of the search, and again to move them."""
    n = 4 * torch.Size(shape).numel()

    def setup(device: str) -> dict[str, Any]:
        start = 0.02 * torch.randn(shape, device=device)
        param = torch.nn.Parameter(start.clone())
        param.grad = 1e-3 * torch.randn_like(start)
        # The root of a mean of squares over some hundred steps.
        metric = 1e-3 * (torch.randn(shape, device=device).square() + 0.1).sqrt()
        work = torch.empty_like(start)
        return {"start": start, "work": work, "metric": metric, "param": param}

    return Case(
        name="prox_in_metric",
        label=label,
        setup=setup,
        ceiling="copy_",
        work={"forward": Work(bytes=5 * n)},
        contenders={
            "fusee": Peer(fusee_prox, requires="fusee"),
            "fusee, the mean of each group": Peer(mean_prox, requires="fusee"),
            ADAM: Peer(adam),
        },
        note="Nothing is differentiated: 'forward' is the operator and a copy that undoes it.",
    )


test_prox_in_metric = bench_cases(
    [
        case((512, 256, 3, 3), "512 filters of 256 x 3 x 3 float32"),
        case((512, 4608), "512 rows of 4608 float32"),
    ],
    quick=[case((8, 4, 3, 3), "8 filters")],
)
