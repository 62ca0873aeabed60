"""A convolutional network on 8 x 8 digits, and ways to leave it exactly k filters in each layer.

What sparse_digits.py and demo.py have in common.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import fusee
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

FILTERS = (32, 64)
"""Of the two convolutions."""
BATCH = 64
WARMUP, HOLD = 0.1, 0.05
"""Shares of the training: without a penalty at first, and with k and its strength as they are in the end
before the filters to keep are fixed."""


class Setting(NamedTuple):
    """What may be chosen for a method."""

    lr: float
    decay: float
    until: float = 1.0
    """After what share of the training the filters to keep are fixed."""
    lam: float = 0.0
    """The strength of the penalty."""


@dataclass
class Run:
    """One training."""

    model: nn.Module
    kept: list[int]
    """How many filters of each convolution are not exactly zero, with bias, scale and shift."""
    left: list[int]
    """The same just before their number was made exact."""
    norms: Tensor
    """Of the groups of the first convolution, a row for each step."""


def network(filters: Sequence[int] = FILTERS) -> nn.Module:
    """Two convolutions with batch normalisation, and a linear layer."""
    first, second = filters
    return nn.Sequential(
        *(nn.Conv2d(1, first, 3, padding=1), nn.BatchNorm2d(first), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(first, second, 3, padding=1), nn.BatchNorm2d(second), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * second, 10)),
    )


def wanted(density: float) -> list[int]:
    """How many filters each convolution is to have."""
    return [round(density * filters) for filters in FILTERS]


def norms_of(coupled: Any) -> Tensor:
    """The norms of groups. They are in float64, and zero only where each element is."""
    return coupled.table.norms([parameter.detach() for parameter in coupled.parameters])


def count(groups: Any) -> list[int]:
    """How many groups of each set are not exactly zero."""
    return [int((norms_of(coupled) > 0).sum()) for coupled in groups]


def shrink(coupled: Any, threshold: float, k: int) -> None:
    """The proximal operator of the group lasso: it takes `threshold` from the norm of each group. Where
    that would leave fewer than k of them, it takes less."""
    norms = norms_of(coupled)
    threshold = min(threshold, 0.99 * norms.topk(k).values[-1].item())
    scales = (1 - threshold / norms.clamp(min=1e-30)).clamp(min=0)
    with torch.no_grad():
        for parameter, value in zip(
            coupled.parameters, coupled.table.scale(coupled.parameters, scales), strict=True
        ):
            parameter.copy_(value)


def host(method: str, density: float, groups: Any, options: dict[str, Any], lam: float) -> Any:
    """The optimizer that brings groups to zero; without a penalty of its own for some methods."""
    penalised = method in ("envelope", "debiased", "latent")
    of_groups = groups.param_groups(
        density=density,
        lam=lam if penalised else 0.0,
        debiased=method in ("debiased", "latent"),
    )
    if method == "latent":
        return fusee.optim.LatentProx(torch.optim.SGD(of_groups, **options))
    return fusee.optim.ProxSGD(of_groups, **options)


def train(
    method: str,
    density: float,
    setting: Setting,
    x: Tensor,
    y: Tensor,
    seed: int,
    epochs: int,
    advance: Callable[[], object] = lambda: None,
) -> Run:
    """Trains one network with SGD, the learning rate falling as a cosine to zero.

    Methods: `dense`; `small`, a network that has k filters from the start; `debiased` and `envelope`,
    the two forms of the group envelope; `latent`, the first of these with latent weights; `group lasso`;
    and others, such as `magnitude`, dense at first. All but the first two keep the k filters of largest
    norm after the setting's share of the training, and train these on without a penalty.
    """
    torch.manual_seed(seed)
    model = network(wanted(density) if method == "small" else FILTERS)
    groups = fusee.nn.prunable_groups(model, x[:2])
    order = torch.Generator().manual_seed(seed)
    steps = epochs * math.ceil(len(x) / BATCH)
    options = {"lr": setting.lr, "momentum": 0.9, "weight_decay": setting.decay}
    control = None
    if method in ("dense", "small"):
        optimizer: Any = torch.optim.SGD(model.parameters(), **options)
    else:
        optimizer = host(method, density, groups, options, setting.lam)
        warmup, hold = round(WARMUP * steps), round(HOLD * steps)
        ramp = max(round(setting.until * steps) - warmup - hold, 0)
        control = fusee.optim.SparsityController(optimizer, warmup=warmup, ramp=ramp, hold=hold)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    left, norms = [], []
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=order).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            if control is not None and not control.finished:
                if method == "group lasso" and control.last_step >= control.warmup:
                    for coupled, k in zip(groups, wanted(density), strict=True):
                        shrink(coupled, schedule.get_last_lr()[0] * setting.lam, k)
                left = count(groups)
                control.step()
            schedule.step()
            norms.append(norms_of(groups[0]))
        advance()
    model.eval()
    return Run(model, count(groups), left, torch.stack(norms))


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of images that are read rightly, in percent."""
    with torch.inference_mode():
        return 100 * (model(x).argmax(1) == y).float().mean().item()


def cut(run: Run, x: Tensor) -> tuple[nn.Module, Any]:
    """The network without its zero filters, and the report; it must compute the same for x."""
    small, report = fusee.nn.cut_zero_groups(run.model, x[:2])
    with torch.inference_mode():
        before, after = run.model(x), small(x)
    difference = (after - before).abs().max() / before.abs().max()
    if difference > 1e-5:
        raise AssertionError(f"the outputs differ by {difference:.1e} of the largest")
    return small, report


def milliseconds(models: Sequence[nn.Module], x: Tensor, rounds: int = 100) -> list[float]:
    """The median time of each network for x, the networks taking turns. It is the processor's time for
    this thread, which other programs disturb little."""
    times: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for repetition in range(rounds + 5):
            for model, of_model in zip(models, times, strict=True):
                start = time.thread_time()
                model(x)
                if repetition >= 5:
                    of_model.append(1e3 * (time.thread_time() - start))
    return [median(of_model) for of_model in times]


def draw_filters(axis: plt.Axes, model: nn.Module, columns: int = 16) -> None:
    """The 3 x 3 filters of the first convolution; those that are zero are empty."""
    weight = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).weight.detach()[:, 0]
    rows = math.ceil(len(weight) / columns)
    picture = torch.full((4 * rows - 1, 4 * columns - 1), math.nan)
    for i, kernel in enumerate(weight):
        top, left = 4 * (i // columns), 4 * (i % columns)
        largest = kernel.abs().max()
        if largest > 0:
            picture[top : top + 3, left : left + 3] = kernel / largest
        axis.add_patch(
            plt.Rectangle((left - 0.5, top - 0.5), 3, 3, fill=False, color="0.75", linewidth=0.6)
        )
    axis.imshow(picture, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    axis.set_axis_off()


def draw_norms(axis: plt.Axes, run: Run, epochs: int) -> None:
    """The norms of the groups of the first convolution in training; in color those that were kept."""
    steps = torch.arange(1, len(run.norms) + 1) / len(run.norms) * epochs
    kept = run.norms[-1] > 0
    axis.plot(steps, run.norms[:, ~kept], color="0.55", linewidth=0.7)
    axis.plot(steps, run.norms[:, kept], color="#c44e52", linewidth=1.2)
    axis.set_xlabel("epoch")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
