"""What the kernels do to memory, as the emulator counts it, against each operator's minimum."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from typing import Any

import fusee
import pytest
import torch
from fusee._library import library_path

from tests.harness.helpers import cotangent
from tests.harness.spec import OpSpec, Traffic, detached
from tests.harness.table import RECORDS

pytestmark = pytest.mark.emulated_only

EXCESS = 1.1
"""The most bytes, over the minimum."""
SECTOR_EFFICIENCY = 0.9
"""The least part of the 32-byte sectors touched that is used."""


class Counters:
    """The emulator's counters."""

    def __init__(self) -> None:
        library = ctypes.CDLL(str(library_path("fusee_emulated")))
        library.fusee_emulator_counters.restype = ctypes.c_char_p
        self._library = library

    def reset(self) -> None:
        self._library.fusee_emulator_reset()

    def read(self) -> dict[str, Any]:
        counted: dict[str, Any] = json.loads(self._library.fusee_emulator_counters())
        return counted


@pytest.fixture
def counters() -> Counters:
    if fusee.engine("cpu") != "emulated":
        pytest.skip("needs FUSEE_ENGINE=emulated")
    return Counters()


def _parts(spec: OpSpec, traffic: Traffic, dtype: torch.dtype, counters: Counters) -> Iterator[Any]:
    """Forward and backward: the counters, the launches and the bytes that are the minimum."""
    arguments = traffic.arguments(spec.make(dtype))
    minimum = traffic.minimum_bytes(arguments)
    leaves = detached(arguments, spec.has_gradient(arguments))
    counters.reset()
    output = spec.function(**leaves)
    yield "forward", counters.read(), traffic.launches[0], minimum[0]
    counters.reset()
    output.backward(cotangent(output))
    yield "backward", counters.read(), traffic.launches[1], minimum[1]


def moved_bytes(counted: dict[str, Any]) -> int:
    """Bytes that kernels load from global memory and store to it."""
    totals = counted["totals"]
    return sum(totals[kind]["bytes"] for kind in ("global_load", "global_store") if kind in totals)


def sector_bytes(counted: dict[str, Any]) -> int:
    """Bytes of the sectors that these accesses touch."""
    totals = counted["totals"]
    return 32 * sum(
        totals[kind]["sectors"] for kind in ("global_load", "global_store") if kind in totals
    )


CASES = [
    pytest.param(
        spec, traffic, dtype, id=f"{spec.name}-{traffic.name}-{dtype}".replace("torch.", "")
    )
    for spec in RECORDS
    for traffic in spec.traffic
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize(("record", "traffic", "dtype"), CASES)
def test_traffic(record: OpSpec, traffic: Traffic, dtype: torch.dtype, counters: Counters) -> None:
    """At most 1.1 times the bytes, 90 % of each sector used, and the stated number of launches."""
    for part, counted, launches, minimum in _parts(record, traffic, dtype, counters):
        assert counted["totals"]["launches"] == launches, part
        moved, sectors = moved_bytes(counted), sector_bytes(counted)
        assert moved >= 0.9 * minimum, f"{part}: {moved} bytes are under the minimum {minimum}"
        assert moved <= EXCESS * minimum, f"{part}: {moved} bytes, minimum {minimum}"
        if sectors:  # a pass made of torch's own operators launches nothing of ours
            used = moved / sectors
            assert used >= SECTOR_EFFICIENCY, f"{part}: {used:.0%} of the sectors are used"


@pytest.mark.parametrize("record", RECORDS, ids=[spec.name for spec in RECORDS])
def test_traffic_is_declared(record: OpSpec) -> None:
    """Every record says what its operator must move, or why it cannot."""
    assert record.traffic or "traffic" in record.not_applicable
