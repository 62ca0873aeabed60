"""Arithmetic on raw timings: medians, spreads, ratios, bars. Pure functions, so that tests can feed
them.

A contender's times are a mapping from round number (as a string, since it lives in JSON) to
seconds.

A ratio is the **median of the per-round ratios**, peer / subject, over the rounds in which both
ran, and its spread is their interquartile range. Contenders are interleaved, so a round sees one
state of the machine and its drift cancels in the ratio, which it would not in a ratio of two
medians.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

Times = Mapping[str, float]


def spread(values: Iterable[float]) -> dict[str, float]:
    """Return median, quartiles, extremes and count of `values`."""
    data = sorted(values)
    if not data:
        raise ValueError("spread of no values")
    q1, median, q3 = (
        statistics.quantiles(data, n=4, method="inclusive") if len(data) > 1 else data * 3
    )
    return {"median": median, "q1": q1, "q3": q3, "min": data[0], "max": data[-1], "n": len(data)}


def paired_ratios(peer: Times, subject: Times) -> list[float]:
    """Return peer / subject for each round in which both ran."""
    common = [r for r in peer if r in subject]
    return [peer[r] / subject[r] for r in common]


def ratio(peer: Times, subject: Times) -> dict[str, float] | None:
    """Return the spread of the per-round ratios, or None when no round has both."""
    values = paired_ratios(peer, subject)
    return spread(values) if values else None


def is_measured(entry: Mapping[str, Any] | None) -> TypeGuard[Mapping[str, Any]]:
    """Whether a contender or ceiling of a result has timings."""
    return entry is not None and entry["status"] == "measured"


def find(result: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """Return the contender or ceiling called `name` in one case's result."""
    return result["contenders"].get(name) or result["ceilings"].get(name)


def subject_of(result: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the subject of a result if it was measured."""
    entry = result["contenders"].get(result["subject"])
    return entry if is_measured(entry) else None


def rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row per contender and ceiling with everything that a table shows."""
    subject = subject_of(result)
    ceiling = next((c for c in result["ceilings"].values() if is_measured(c)), None)
    table = []
    for kind in ("contenders", "ceilings"):
        for name, entry in result[kind].items():
            row: dict[str, Any] = {"name": name, "kind": kind, **entry}
            if is_measured(entry):
                time = spread(entry["times"].values())
                row["time"] = time
                row["gbps"] = result["bytes"] / time["median"] / 1e9
                row["gflops"] = result["flops"] / time["median"] / 1e9
                row["ratio"] = ratio(entry["times"], subject["times"]) if subject else None
                row["share"] = ratio(ceiling["times"], entry["times"]) if ceiling else None
            table.append(row)
    return table


def bars(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return each promise of a result with what was measured and whether it is met.

    `met` is None when it could not be judged; `why` then says what was missing. A speed bar is
    judged by the median alone; `firm` tells whether the whole interquartile range, of more
    than one round, is on the same side.
    """
    subject, found = subject_of(result), []
    for against, bar in result["bars"].items():
        row: dict[str, Any] = {"against": against, "bar": bar, "kind": "speed", "met": None}
        peer = find(result, against)
        value = ratio(peer["times"], subject["times"]) if subject and is_measured(peer) else None
        if value:
            row.update(value=value, met=value["median"] >= bar)
            same_side = (value["q1"] >= bar) == (value["q3"] >= bar)
            row["firm"] = value["n"] > 1 and same_side
        else:
            missing = result["subject"] if not subject else against
            entry = find(result, missing) or {}
            row["why"] = f"{missing}: {entry.get('why') or 'not run'}"
        found.append(row)
    if result["memory_limit"] is not None:
        row = {
            "against": "peak memory",
            "bar": result["memory_limit"],
            "kind": "memory",
            "met": None,
        }
        used = subject["peak_extra_bytes"] if subject else None
        if used is not None:
            row.update(value=used, met=used <= result["memory_limit"], firm=True)
        else:
            row["why"] = "not measured"
        found.append(row)
    return found
