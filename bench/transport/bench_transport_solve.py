"""The system of implicit derivatives, against a dense factorisation."""

from __future__ import annotations

from bench.harness import bench_cases
from bench.transport.operators import case

FAMILIES = (("random", 500), ("digits, L1", 784), ("clouds in 2-D", 500))

test_transport_solve = bench_cases(
    [case("transport_solve", family, n, 1200) for family, n in FAMILIES],
    quick=[case("transport_solve", "random", 16, 50)],
)
