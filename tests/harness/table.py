"""The table: every record, gathered from ``tests/<room>/record_<method>.py``."""

from __future__ import annotations

import importlib
from pathlib import Path

from tests.harness.spec import OpSpec

TESTS = Path(__file__).parents[1]


def gather() -> list[OpSpec]:
    """The ``RECORDS`` of every record file, in the order of the files' names."""
    records: list[OpSpec] = []
    for path in sorted(TESTS.glob("*/record_*.py")):
        module = importlib.import_module(f"tests.{path.parent.name}.{path.stem}")
        records += module.RECORDS
    return records


RECORDS = gather()
