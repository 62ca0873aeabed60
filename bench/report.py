"""Turns results into a terminal table, JSON, and one HTML page that needs nothing else.

`python -m bench.report build/bench/results.json -o report.html` renders an earlier run again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from bench import charts, summary

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 1rem }
table { border-collapse: collapse; margin: .6rem 0 1.2rem; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
th { font-weight: 600; border-bottom: 2px solid #999 }
tr.subject td { font-weight: 600; background: #eef6ee }
tr.ceilings td { color: #666; font-style: italic }
.met { color: #176b2c } .missed { color: #b00020; font-weight: 700 } .unjudged { color: #8a6d00 }
pre { background: #f6f6f6; padding: .7rem; overflow-x: auto } img { max-width: 100% }
"""
METHOD = """
Contenders of a case are timed interleaved (A B C A B C ...) in one process. A time is the median
over rounds with its quartiles. A ratio is the median of the per-round ratios peer / subject, with
their quartiles: above 1 means that the subject is faster. GB/s and GFLOP/s divide the case's
minimum traffic and operations by the median time. Share of ceiling is the ceiling's time / the
contender's time, per round, against the first ceiling named in the table. Extra memory is the peak
of one call beyond inputs, outputs and gradients (CPU: the kernel's high-water mark; CUDA: torch's
allocator).
"""
HEADER = (
    *("contender", "median", "quartiles", "rounds", "GB/s", "GFLOP/s"),
    *("of ceiling", "ratio", "extra memory"),
)


def seconds(value: float) -> str:
    """Format a duration with three significant digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 1000 * size else f"{value:.0f} s"
    return f"{value / 1e-9:.3g} ns"


def mebibytes(value: float | None) -> str:
    """Format bytes as MiB, or a dash when they are not known."""
    return "-" if value is None else f"{value / (1 << 20):.1f} MiB"


def times_text(value: Mapping[str, float]) -> str:
    """Format a ratio with its quartiles, or say that a single round has none."""
    if value["n"] == 1:
        return f"{value['median']:.2f}x [1 round]"
    return f"{value['median']:.2f}x [{value['q1']:.2f}-{value['q3']:.2f}]"


def cells(row: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    """Return one table row as text; an absent or failed contender says so in place of numbers."""
    if not summary.is_measured(row):
        return [row["name"], f"{row['status']}: {row['why']}", *[""] * (len(HEADER) - 2)]
    time = row["time"]
    return [
        row["name"],
        seconds(time["median"]),
        f"{seconds(time['q1'])} - {seconds(time['q3'])}" if time["n"] > 1 else "unknown",
        str(time["n"]),
        f"{row['gbps']:.2f}" if result["bytes"] else "-",
        f"{row['gflops']:.2f}" if result["flops"] else "-",
        f"{100 * row['share']['median']:.0f} %" if row["share"] else "-",
        times_text(row["ratio"]) if row["ratio"] else "-",
        mebibytes(row.get("peak_extra_bytes")),
    ]


def bar_cells(row: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    """Return case, promise, measurement and verdict of one bar."""
    case = f"{result['name']} {result['label']}, {result['mode']}"
    memory = row["kind"] == "memory"
    promise = (
        f"at most {mebibytes(row['bar'])} extra"
        if memory
        else f">= {row['bar']:.2f}x {row['against']}"
    )
    if row["met"] is None:
        return [case, promise, row["why"], "NOT JUDGED"]
    value = mebibytes(row["value"]) if memory else times_text(row["value"])
    verdict = "met" if row["met"] else "MISSED"
    doubt = (
        "" if row["firm"] else " (1 round)" if row["value"]["n"] == 1 else " (within the spread)"
    )
    return [case, promise, value, verdict + doubt]


def all_bars(document: Mapping[str, Any]) -> list[list[str]]:
    """Return the bars of all cases, as text rows."""
    return [
        bar_cells(row, result) for result in document["results"] for row in summary.bars(result)
    ]


def ceiling_cells(document: Mapping[str, Any]) -> list[list[str]]:
    """Return the machine's ceilings, as text rows."""
    rows = []
    for name, value in document["ceilings"].items():
        if "absent" in value:
            rows.append([name, f"absent: {value['absent']}", ""])
        else:
            size = f" ({value['detail']})" if "detail" in value else ""
            spread = f"{value['q1']:.1f} - {value['q3']:.1f}"
            rows.append([name + size, f"{value['median']:.1f} {value['unit']}", spread])
    rows.append(["copy at the end against the start", f"{100 * document['drift']:+.1f} %", ""])
    return rows


def machine_cells(document: Mapping[str, Any]) -> list[list[str]]:
    """Return what describes machine and software, without fusee's own diagnosis."""
    items = document["machine"].items()
    return [[k, str(v)] for k, v in items if k != "fusee" and v not in ("", None, {})]


def _columns(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Align text in columns; the reason of an absent contender may run over them."""
    table = [list(header), *map(list, rows)]
    whole = [row for row in table if row[-1] or len(row) < 4] or table
    widths = [max(len(row[i]) for row in whole) for i in range(len(header))]
    widths[0] = max(len(row[0]) for row in table)
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in table)
    return "\n".join(line.rstrip() for line in lines)


def text(document: Mapping[str, Any]) -> str:
    """Return the report for a terminal."""
    parts = ["\n".join(f"{k}: {v}" for k, v in machine_cells(document))]
    parts.append("fusee: " + document["machine"]["fusee"])
    parts.append(_columns(("ceiling", "median", "quartiles"), ceiling_cells(document)))
    for result in document["results"]:
        rows = [cells(row, result) for row in summary.rows(result)]
        title = f"{result['name']}  {result['label']}  {result['mode']}"
        parts.append(f"{title}\n{'-' * len(title)}\n{_columns(HEADER, rows)}")
    bars = all_bars(document)
    if bars:
        parts.append(_columns(("case", "bar", "measured", "verdict"), bars))
    return "\n\n".join(parts)


def _table(
    header: Sequence[str], rows: Iterable[Sequence[str]], classes: Sequence[str] = ()
) -> str:
    rows = list(rows)
    head = "".join(f"<th>{escape(h)}</th>" for h in header)
    body = []
    for i, row in enumerate(rows):
        filled = [c for c in row if c]
        span = len(row) - len(filled) + 1  # an absent contender's reason fills the rest of its row
        tags = [f"<td>{escape(c)}</td>" for c in filled[:-1]]
        tags.append(f'<td colspan="{span}">{escape(filled[-1])}</td>')
        body.append(f'<tr class="{classes[i] if classes else ""}">{"".join(tags)}</tr>')
    return f"<table><tr>{head}</tr>{''.join(body)}</table>"


def _verdict_class(row: Sequence[str]) -> str:
    return {"m": "met", "M": "missed"}.get(row[3][0], "unjudged")


def _case_html(result: Mapping[str, Any]) -> str:
    table = summary.rows(result)
    classes = ["subject" if row["name"] == result["subject"] else str(row["kind"]) for row in table]
    facts = f"minimum traffic {result['bytes'] / 1e6:.1f} MB, {result['flops'] / 1e9:.3g} GFLOP"
    return (
        f"<h2>{escape(result['name'])}, {escape(result['label'])}, {escape(result['mode'])}</h2>"
        f"<p>{facts}. Ratios are against {escape(result['subject'])}. {escape(result['note'])}</p>"
        f"{_table(HEADER, (cells(row, result) for row in table), classes)}"
        f"{charts.times_chart(table, result['subject'])}"
    )


def html(document: Mapping[str, Any]) -> str:
    """Return the report as one self-contained page."""
    bars = all_bars(document)
    counts = [sum(_verdict_class(b) == c for b in bars) for c in ("met", "missed", "unjudged")]
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>fusee benchmarks</title>',
        f"<style>{STYLE}</style><h1>fusee benchmarks</h1><p>{escape(METHOD)}</p>",
        "<h2>Bars</h2><p>{} met, {} missed, {} not judged.</p>".format(*counts),
        _table(("case", "bar", "measured", "verdict"), bars, [_verdict_class(b) for b in bars])
        if bars
        else "<p>These cases state no bars.</p>",
        "<h2>Ceilings of this machine</h2>",
        _table(("ceiling", "median", "quartiles"), ceiling_cells(document)),
        "<h2>Machine and build</h2>",
        _table(("what", "value"), machine_cells(document)),
        f"<pre>{escape(document['machine']['fusee'])}</pre>",
        *(_case_html(result) for result in document["results"]),
        "</html>",
    ]
    return "\n".join(parts)


def write(document: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Write results.json and report.html into `folder` and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"results": folder / "results.json", "report": folder / "report.html"}
    files["results"].write_text(json.dumps(document, indent=1))
    files["report"].write_text(html(document))
    return files


def main(argv: Sequence[str] | None = None) -> None:
    """Render a results file again."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=main.__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"))
    options = parser.parse_args(argv)
    document = json.loads(options.results.read_text())
    options.output.write_text(html(document))
    print(text(document))


if __name__ == "__main__":
    main()
