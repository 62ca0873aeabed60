"""The pictures of certified_digits.py."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from certified_digits import METHODS, RADII, Result, Row, of_row

COLORS = dict(
    zip(METHODS, ("0.3", "#8172b3", "#c44e52", "#dd8452", "#4c72b0", "#55a868"), strict=True)
)


def draw_curves(axis: plt.Axes, results: list[Result], eps: float) -> None:
    """Certified images against the radius, of networks trained with one radius."""
    for method in METHODS:
        curves = of_row(results, Row(method, 256, 2, eps), "curve")
        if not curves:
            continue
        values = torch.tensor(curves)
        axis.plot(RADII, values.mean(0), color=COLORS[method], label=method, linewidth=2)
        axis.fill_between(
            RADII, values.amin(0), values.amax(0), color=COLORS[method], alpha=0.2, linewidth=0
        )
    axis.axvline(eps, color="0.6", linewidth=1, linestyle=":")
    axis.set(title=f"certified test images, %; trained with {eps}", xlabel="radius", ylim=(0, 100))


def draw_tightness(axis: plt.Axes, results: list[Result]) -> None:
    """Before and after training, for both radii."""
    for place, method in enumerate(METHODS):
        for offset, marker, eps in ((-0.15, "o", 0.1), (0.15, "s", 0.2)):
            row = Row(method, 256, 2, eps)
            before, after = (of_row(results, row, name) for name in ("before", "after"))
            if not before:
                continue
            ends, y = (mean(before), mean(after)), place + offset
            axis.plot(ends, (y, y), color=COLORS[method], linewidth=1.5)
            axis.plot(ends[0], y, "|", color=COLORS[method], markersize=9)
            axis.plot(ends[1], y, marker, color=COLORS[method], label=f"radius {eps}")
    axis.set(title="tightness, before | and after training", xscale="log", xlim=(None, 1.1))
    axis.set_yticks(range(len(METHODS)), METHODS)
    axis.invert_yaxis()
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[:2], labels[:2], fontsize=8, loc="upper right")


def draw_width(axis: plt.Axes, results: list[Result]) -> None:
    """Certified images and tightness against the width of a network."""
    other = axis.twinx()
    for eps, style in ((0.1, "-"), (0.2, "--")):
        for axes, name, color in (
            (axis, "certified", "#4c72b0"),
            (other, "before", "0.5"),
            (other, "after", "#c44e52"),
        ):
            found = {
                width: values
                for width in (64, 256, 1024)
                if (values := of_row(results, Row("IBP, warm-up", width, 2, eps), name))
            }
            means = [mean(values) for values in found.values()]
            axes.plot(list(found), means, style, color=color, marker="o")
    axis.set(title="IBP, warm-up, by width", xscale="log", xlabel="units in a layer", ylim=(0, 100))
    axis.set_ylabel("certified, %", color="#4c72b0")
    axis.set_xticks((64, 256, 1024), ("64", "256", "1024"))
    axis.minorticks_off()
    other.set(ylim=(0, 1))
    other.set_ylabel("tightness before (grey) and after", color="#c44e52")
    handles = [plt.Line2D([], [], color="0.3", linestyle=style) for style in ("-", "--")]
    axis.legend(
        handles,
        ("radius 0.1", "radius 0.2"),
        fontsize=8,
        loc="lower right",
        bbox_to_anchor=(1, 0.05),
    )


def plot(results: list[Result], path: Path) -> None:
    """Certified accuracy and tightness, by radius, method and width."""
    figure, axes = plt.subplots(1, 4, figsize=(18, 4.2), layout="constrained")
    for axis, eps in zip(axes[:2], (0.1, 0.2), strict=True):
        draw_curves(axis, results, eps)
    axes[0].legend(fontsize=8)
    draw_tightness(axes[2], results)
    draw_width(axes[3], results)
    for axis in axes:
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.25)
        axis.spines["top"].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
