"""Tables of what the examples measured."""

from __future__ import annotations

from statistics import mean, stdev


def spread(values: list[float], digits: int, scale: float = 1.0) -> str:
    """Mean over the seeds, and standard deviation where there are several."""
    deviation = f" ± {scale * stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * mean(values):.{digits}f}{deviation}"


def aligned(rows: list[tuple[str, ...]]) -> str:
    """A table, with a line below its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)
