"""The engines against each other, through the results that each one's own run has saved.

``tests/run.py`` runs the harness once per engine with ``--save-outputs``, then this file with
``--outputs``. Engines agree within ``OpSpec.ulps``: 4 units of the last place (16 in float64) of
the largest element of a result or gradient. ``<engine>.again.pt``, from a second process, has the
same bits.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness.measure import same_bits, ulps
from tests.harness.table import RECORDS

Results = dict[str, list[torch.Tensor]]
SPECS = {spec.name: spec for spec in RECORDS}


@pytest.fixture
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path | None = request.config.getoption("outputs")
    if path is None:
        pytest.skip(
            "needs --outputs, a folder of files that --save-outputs wrote; see tests/run.py"
        )
    return path


def load(folder: Path, *, again: bool) -> dict[str, Results]:
    """The saved results by engine; from the first processes, or from the second ones."""
    found = {}
    for path in sorted(folder.glob("*.pt")):
        if path.name.endswith(".again.pt") == again:
            saved: dict[str, Any] = torch.load(path)
            found[saved["engine"]] = saved["results"]
    return found


def differences(one: Results, other: Results) -> list[str]:
    """The samples in which two engines differ by more than their record allows."""
    worst = []
    for key in one.keys() & other.keys():
        spec = SPECS[key.split(" | ")[0]]
        for place, (a, b) in enumerate(zip(one[key], other[key], strict=True)):
            if a.dtype != b.dtype:
                worst.append(f"{key}, {place}: {a.dtype} and {b.dtype}")
            elif (apart := ulps(a, b, spec.least_scale)) > spec.ulps(a.dtype):
                worst.append(f"{key}, {place}: {apart:.3g} ulp")
    return worst


def test_engines_agree(folder: Path) -> None:
    """Every two engines give the same results, but for a few units of the last place."""
    engines = load(folder, again=False)
    assert len(engines) >= 2, f"nothing to compare: {sorted(engines)}"
    for one, other in combinations(sorted(engines), 2):
        assert engines[one].keys() & engines[other].keys(), f"{one} and {other} share no sample"
        worst = differences(engines[one], engines[other])
        assert not worst, f"{one} and {other}: {worst[:5]}, {len(worst)} in all"


def test_processes_agree(folder: Path) -> None:
    """Each engine gives the same bits in another process."""
    first, again = load(folder, again=False), load(folder, again=True)
    assert again, "no second run was saved"
    for engine, results in again.items():
        assert results.keys() == first[engine].keys()
        for key, tensors in results.items():
            assert all(map(same_bits, tensors, first[engine][key])), f"{engine}: {key}"


def test_differences_are_found() -> None:
    """The comparison sees one wrong element, a NaN, and another dtype."""
    key = "stablemax | float32 | x"
    good = {key: [torch.linspace(0.5, 1, 9)]}
    for change in (lambda t: t + 1e-6, lambda t: t * torch.nan, lambda t: t.double()):
        assert not differences(good, good)
        assert differences(good, {key: [change(good[key][0])]})
