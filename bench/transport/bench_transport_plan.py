"""The plan and sums over it, against eager expressions."""

from __future__ import annotations

from bench.harness import bench_cases
from bench.transport.operators import case

NAMES = ("transport_plan", "transport_plan_gradient")

test_transport_plan = bench_cases(
    [case(name, "random", 500, 1200) for name in NAMES],
    quick=[case(name, "random", 16, 50) for name in NAMES],
)
