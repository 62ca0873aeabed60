"""The proximal operator of the group envelope: of single elements, and of the filters of a layer.

s_j = max(0, min(1 / (1 + lam), 1 - lam theta / n_j)),  sum_j clip(n_j / theta - lam, 0, 1) = k
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.harness import Case, Peer, Work, bench_cases

SORT = "sort of breakpoints, prefix sums (torch)"
ONE_SORT = "sort of norms, bisection (torch)"


# ADAPTER: the one place that knows our public API.
def fusee_prox() -> Callable[..., Tensor]:
    """Our operator."""
    prox = importlib.import_module("fusee").prox_group_envelope
    return lambda input, k, lam: prox(input, k, lam)


def sorted_prox(input: Tensor, k: int, lam: float) -> Tensor:
    """What one writes without the operator: theta from the sorted breakpoints and their prefix sums.

    With eta = 1 / theta, sum_j clip(eta n_j - lam, 0, 1) is linear between its breakpoints lam / n_j,
    where its slope grows by n_j, and (1 + lam) / n_j, where it falls by n_j.
    """
    norms = input.flatten(1).norm(dim=1) if input.dim() > 1 else input.abs()
    points = torch.cat([lam / norms, (1 + lam) / norms])
    points, order = points.sort()
    slopes = torch.cat([norms, -norms])[order].cumsum(0)
    values = torch.cat([points.new_zeros(1), (slopes[:-1] * points.diff()).cumsum(0)])
    i = (torch.searchsorted(values, float(k)) - 1).clamp(min=0)
    theta = 1 / (points[i] + (k - values[i]) / slopes[i])
    scale = (1 - lam * theta / norms).clamp(0, 1 / (1 + lam))
    return input * (scale.view(-1, *(1,) * (input.dim() - 1)) if input.dim() > 1 else scale)


def bisected_prox(input: Tensor, k: int, lam: float) -> Tensor:
    """The same from one sort of the norms: at an eta, the sum is two searches and prefix sums.

    Half the sort of the other form, and some forty small operators for the bisection.
    """
    norms = input.flatten(1).norm(dim=1) if input.dim() > 1 else input.abs()
    ascending = norms.sort().values
    sums = torch.cat([norms.new_zeros(1), ascending.cumsum(0)])

    def parts(eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, high = torch.searchsorted(ascending, torch.stack([lam / eta, (1 + lam) / eta]))
        return len(norms) - high, high - low, sums[high] - sums[low]

    low, high = lam / ascending[-1], (1 + lam) / ascending[0].clamp(min=1e-30)
    for _ in range(20):
        eta = (low * high).sqrt()
        saturated, middle, total = parts(eta)
        below = saturated + eta * total - lam * middle < k
        low, high = torch.where(below, eta, low), torch.where(below, high, eta)
    saturated, middle, total = parts(eta)
    theta = total / (k - saturated + lam * middle)
    scale = (1 - lam * theta / norms).clamp(0, 1 / (1 + lam))
    return input * (scale.view(-1, *(1,) * (input.dim() - 1)) if input.dim() > 1 else scale)


def case(shape: tuple[int, ...], label: str, bar: float) -> Case:
    """Read the input, write the output; groups of several elements are read twice, for their norms."""
    n = 4 * torch.Size(shape).numel()
    reads = 1 if len(shape) == 1 else 2

    def setup(device: str) -> dict[str, Any]:
        return {"input": torch.randn(shape, device=device), "k": shape[0] // 10, "lam": 0.1}

    return Case(
        name="prox_group_envelope",
        label=label,
        setup=setup,
        work={
            "forward": Work(
                bytes=(1 + reads) * n, written=n, bars={SORT: bar, ONE_SORT: bar} if bar else {}
            )
        },
        contenders={
            "fusee": Peer(fusee_prox, requires="fusee"),
            SORT: Peer(lambda: sorted_prox),
            ONE_SORT: Peer(lambda: bisected_prox),
        },
    )


test_prox_group_envelope = bench_cases(
    [
        case((512,), "512 single elements float32", 3.0),
        case((65536,), "65536 single elements float32", 3.0),
        case((1_000_000,), "1000000 single elements float32", 15.0),
        case((512, 256, 3, 3), "512 filters of 256 x 3 x 3 float32", 0.0),
    ],
    quick=[case((100,), "100 single elements float32", 0.0), case((8, 4, 3, 3), "8 filters", 0.0)],
)
