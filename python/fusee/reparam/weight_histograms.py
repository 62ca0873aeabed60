"""Histograms of the weights of a model, or of several beside one another."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusee.reparam.weight_report import WeightReport, WeightRow

if TYPE_CHECKING:
    import os

    from matplotlib.figure import Figure

COLORS = ("#4c72b0", "#c44e52", "#55a868", "#8172b3", "#ccb974", "#64b5cd")
BINS = 101
"""The most bins of a panel."""


def plot_weight_histograms(
    reports: Mapping[str, WeightReport],
    path: str | os.PathLike[str] | None = None,
    *,
    layers: int = 12,
) -> Figure:
    """Draws the weights of one model or several: a histogram of all, and one for each layer.

    Args:
        reports: what :func:`fusee.nn.weight_report` returned, by the label to be shown. Layers of the
            same name share a panel.
        path: where to save the picture, if given; the ending says in which format.
        layers: at most how many layers get a panel; those with most weights, in the order of the
            model.

    Returns:
        The ``matplotlib.figure.Figure``. The height is the density of weights, whose integral is one; a
        panel reaches to the 99.9 % quantile of the absolute values.

    Raises:
        ImportError: matplotlib is not installed; nothing else here needs it.
        ValueError: there is no report, or none with finite weights, or ``layers`` is negative.

    Deterministic.

    Example:
        >>> import torch, fusee
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 9))
        >>> before = fusee.nn.weight_report(model)
        >>> _ = fusee.nn.compand_model(model)
        >>> reports = {"plain": before, "companded": fusee.nn.weight_report(model)}
        >>> figure = fusee.nn.plot_weight_histograms(reports)
        >>> [axis.get_title() for axis in figure.axes]
        ['all weights', '0.weight', '2.weight']
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plotting weights needs matplotlib, which is not installed: pip install matplotlib"
        ) from error
    if layers < 0:
        raise ValueError(f"layers must be at least zero, got {layers}")
    every = [row for report in reports.values() for row in report.rows]
    if not any(row.sample.isfinite().any() for row in every):
        raise ValueError("reports must hold finite weights, got none")
    sizes = {row.name: row.numel for row in every}
    most = sorted(sizes, key=lambda name: -sizes[name])[:layers] if len(sizes) > 1 else []
    names = [name for name in sizes if name in most]
    columns = min(4, max(len(names), 1))
    lines = math.ceil(len(names) / columns)
    figure = Figure(figsize=(max(3.2 * columns, 6.4), 3.6 + 1.9 * lines), layout="constrained")
    grid = figure.add_gridspec(1 + lines, columns, height_ratios=[2] + [1] * lines)
    top = figure.add_subplot(grid[0, :])
    _histograms(top, {label: report.rows for label, report in reports.items()})
    top.set_title("all weights" if len(sizes) > 1 else next(iter(sizes)))
    top.set_ylabel("density")
    if any(reports):
        top.legend(frameon=False)
    for place, name in enumerate(names):
        axis = figure.add_subplot(grid[1 + place // columns, place % columns])
        rows = {k: [row for row in r.rows if row.name == name] for k, r in reports.items()}
        _histograms(axis, rows)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.locator_params(axis="x", nbins=5)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _histograms(axis: Any, rows: Mapping[str, list[WeightRow]]) -> None:
    """One panel: the weights of some rows of each report, over a common range."""
    drawn = {label: _values(of_label) for label, of_label in rows.items()}
    reach = max((_quantile(values.abs(), each) for values, each in drawn.values()), default=0.0)
    reach = reach or 1.0
    count = max((values.numel() for values, _ in drawn.values()), default=0)
    # An odd number, so that zero is in the middle of a bin; few weights make a comb of many bins.
    bins = min(BINS, math.isqrt(count) | 1)
    edges = torch.linspace(-reach, reach, bins + 1, dtype=torch.float64)
    for i, (label, (values, each)) in enumerate(drawn.items()):
        if values.numel():
            counts, _ = torch.histogram(values, edges, weight=each)
            density = counts / each.sum() / edges.diff()
            color = COLORS[i % len(COLORS)]
            axis.stairs(density, edges, fill=True, alpha=0.2, color=color)
            axis.stairs(density, edges, linewidth=1.2, color=color, label=label)
    axis.set_xlim(-reach, reach)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _values(rows: list[WeightRow]) -> tuple[Tensor, Tensor]:
    """The finite elements of some rows, and for how many each stands where there is but a sample."""
    values = [row.sample[row.sample.isfinite()].double() for row in rows]
    each = [
        torch.full_like(v, row.numel / max(row.sample.numel(), 1))
        for row, v in zip(rows, values, strict=True)
    ]
    empty = torch.empty(0, dtype=torch.float64)
    return torch.cat([empty, *values]), torch.cat([empty, *each])


def _quantile(values: Tensor, each: Tensor, share: float = 0.999) -> float:
    """The value below which this share lies."""
    if not values.numel():
        return 0.0
    ordered, order = values.sort()
    below = each[order].cumsum(0)
    place = int(torch.searchsorted(below, share * below[-1]))
    return float(ordered[min(place, len(ordered) - 1)])
