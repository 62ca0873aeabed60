"""One chart per case, as an image tag that carries its SVG inside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from bench.summary import is_measured

COLOURS = {"subject": "#2e7d32", "contenders": "#7a8ca3", "ceilings": "#d8b365"}


def times_chart(rows: Sequence[Mapping[str, Any]], subject: str) -> str:
    """Return bars of the median times with their quartiles, on a log scale if they span 20x."""
    rows = [row for row in rows if is_measured(row)]
    if not rows:
        return "<p>Nothing was measured.</p>"
    try:
        import matplotlib
    except ImportError:
        return "<p>No chart: matplotlib is not installed.</p>"
    from matplotlib.figure import Figure

    medians = [row["time"]["median"] * 1e3 for row in rows]
    quartiles = [(row["time"]["q1"] * 1e3, row["time"]["q3"] * 1e3) for row in rows]
    errors = [
        [max(0.0, m - low) for m, (low, _) in zip(medians, quartiles, strict=True)],
        [max(0.0, high - m) for m, (_, high) in zip(medians, quartiles, strict=True)],
    ]
    colours = [COLOURS["subject" if row["name"] == subject else row["kind"]] for row in rows]
    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(8.5, 0.7 + 0.3 * len(rows)), layout="constrained")
        axes = figure.subplots()
        axes.barh([row["name"] for row in rows], medians, xerr=errors, color=colours, capsize=2)
        axes.invert_yaxis()
        if max(medians) > 20 * min(medians):
            axes.set_xscale("log")
        for i, median in enumerate(medians):
            axes.annotate(f" {median:.3g}", (quartiles[i][1], i), va="center", fontsize=8)
        axes.set_xlabel("milliseconds, median and quartiles")
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.12)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="times of all contenders" src="data:image/svg+xml;base64,{encoded}">'
