"""Entropic transport to a marginal error of 1e-9, plan included, against the solvers that people use.

min_P <M, P> + reg KL(P | a b'),  P 1 = a,  P' 1 = b;  reg = 1 / eta
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bench.harness import Case, Peer, Work, bench_cases
from bench.transport.families import FAMILIES, random
from bench.transport.peers import (
    ERROR,
    Reaching,
    Solver,
    ott_sinkhorn,
    pot_batch,
    pot_sinkhorn,
    regot,
    scaling,
)

REGOT = {"RegOT SSNS": "ssns", "RegOT SPLR": "splr", "RegOT Newton": "newton"}
POT = "POT ot.sinkhorn"
POT_BATCH = "POT ot.batch.solve_batch"
OTT = "OTT-JAX Sinkhorn"
LOOP = "scaling loop (torch)"
PASSES = "torch.exp of the costs, once an iteration of ours"
GIVEN = "costs given (fusee.sinkhorn_newton)"


# ADAPTER: the one place that knows our public API.
def fusee_solve() -> Solver:
    """Our solver; one problem or a batch."""
    function = importlib.import_module("fusee").sinkhorn_newton
    return lambda M, a, b, reg: function(M, a, b, reg=reg, tol=ERROR).plan


def passes() -> Callable[..., None]:
    """What our iterations cost at least: an exponential for each pair."""
    function = importlib.import_module("fusee").sinkhorn_newton
    counts: list[int] = []

    def run(M: Tensor, a: Tensor, b: Tensor, reg: float) -> None:
        if not counts:
            counts.append(int(function(M, a, b, reg=reg, tol=ERROR).n_iter))
        for _ in range(counts[0]):
            torch.exp(M)

    return run


def peers(names: list[str]) -> dict[str, Peer]:
    """Those that reach the error; the others say what they reach."""
    makers: dict[str, tuple[Callable[[], Solver], str]] = {
        LOOP: (lambda: scaling, ""),
        POT: (lambda: pot_sinkhorn, "ot"),
        POT_BATCH: (lambda: pot_batch, "ot"),
        OTT: (ott_sinkhorn, "ott"),
    }
    for name, solver in REGOT.items():
        makers[name] = (lambda solver=solver: regot(solver), "regot")

    def of(name: str) -> Peer:
        make, requires = makers[name]
        return Peer(lambda: Reaching(make()), requires=requires, slow_start=name == OTT)

    return {name: of(name) for name in names}


def case(family: str, n: int, eta: float, bars: Mapping[str, float], names: list[str]) -> Case:
    """One problem of a family."""

    def setup(device: str) -> dict[str, Any]:
        return {
            **{k: v.to(device) for k, v in FAMILIES[family](n)._asdict().items()},
            "reg": 1 / eta,
        }

    return Case(
        name="sinkhorn_newton",
        label=f"{family} {n} x {n} eta {eta:g} float64",
        setup=setup,
        work={"forward": Work(bars=bars)},
        ceiling="none",
        contenders={
            "fusee": Peer(fusee_solve, requires="fusee"),
            PASSES: Peer(passes, requires="fusee"),
            **peers(names),
        },
    )


def family_case(family: str) -> Case:
    """The size and regularisation at which the method was published."""
    bar = {"random": 1.0, "digits, L1": 10.0}.get(family, 3.0)
    bars = {**dict.fromkeys(REGOT, bar), **({POT: 20.0} if family == "random" else {})}
    names = [*REGOT, LOOP, *([POT] if family == "random" else [])]
    return case(family, 784 if family.startswith("digits") else 500, 1200, bars, names)


def weak_case(family: str) -> Case:
    """A regularisation so weak that Sinkhorn's iteration does the whole work."""
    n = 784 if family.startswith("digits") else 500
    return case(family, n, 10, {LOOP: 1 / 1.1}, [LOOP])


def problems(count: int, n: int) -> dict[str, Tensor]:
    """A batch of random problems."""
    each = [random(n) for _ in range(count)]
    return {name: torch.stack([getattr(p, name) for p in each]) for name in ("M", "a", "b")}


BATCHED = [POT, POT_BATCH, OTT]


def batch_case(count: int, n: int, eta: float, names: list[str]) -> Case:
    """All problems in one call."""
    return Case(
        name="sinkhorn_newton",
        label=f"batch of {count} random {n} x {n} eta {eta:g} float64",
        setup=lambda device: {
            **{k: v.to(device) for k, v in problems(count, n).items()},
            "reg": 1 / eta,
        },
        work={"forward": Work()},
        ceiling="none",
        contenders={"fusee": Peer(fusee_solve, requires="fusee"), **peers(names)},
    )


def slowest(solver: Solver) -> Solver:
    """The solver on that problem of the batch which takes it longest, and no other."""
    chosen: list[int] = []

    def run(M: Tensor, a: Tensor, b: Tensor, reg: float) -> Tensor:
        def seconds(i: int) -> float:
            start = time.perf_counter()
            solver(M[i], a[i], b[i], reg)
            return time.perf_counter() - start

        if not chosen:
            seconds(0)
            chosen.append(max(range(len(M)), key=seconds))
        i = chosen[0]
        return solver(M[i], a[i], b[i], reg)

    return run


def slowest_case(count: int, n: int, eta: float) -> Case:
    """The slowest problem of the batch, for each contender its own, in a call of its own."""
    each = {"fusee": Peer(fusee_solve, requires="fusee"), **peers([LOOP, POT, OTT])}

    def of(peer: Peer) -> Peer:
        return Peer(lambda: slowest(peer.make()), peer.requires, peer.slow_start)

    return Case(
        name="sinkhorn_newton",
        label=f"slowest of {count} random {n} x {n} eta {eta:g} float64",
        setup=lambda device: {
            **{k: v.to(device) for k, v in problems(count, n).items()},
            "reg": 1 / eta,
        },
        work={"forward": Work()},
        ceiling="none",
        contenders={name: of(peer) for name, peer in each.items()},
    )


def samples_case(n: int, d: int) -> Case:
    """Costs computed where they are needed, against costs that are made first and kept."""

    def setup(device: str) -> dict[str, Any]:
        y = 0.7 * torch.randn(n, d, device=device) + 0.5
        return {"x": torch.randn(n, d, device=device), "y": y, "reg": d / 100}

    def on_the_fly() -> Callable[..., Tensor]:
        function = importlib.import_module("fusee").sinkhorn_newton_samples
        return lambda x, y, reg: function(x, y, reg=reg, tol=ERROR).value

    def given() -> Callable[..., Tensor]:
        function = importlib.import_module("fusee").sinkhorn_newton
        return lambda x, y, reg: function(torch.cdist(x, y).square(), reg=reg, tol=ERROR).value

    return Case(
        name="sinkhorn_newton_samples",
        label=f"two clouds of {n} in {d}-D float32",
        setup=setup,
        grad=("x", "y"),
        work={
            "forward": Work(memory_limit=4 * n * n),
            "forward+backward": Work(memory_limit=4 * n * n),
        },
        ceiling="none",
        contenders={
            "fusee": Peer(on_the_fly, requires="fusee"),
            GIVEN: Peer(given, requires="fusee"),
        },
        note=f"The value; costs alone would take {math.ceil(4 * n * n / 2**20)} MiB.",
    )


test_families = bench_cases(
    [family_case(family) for family in FAMILIES],
    quick=[case(family, 16, 50, {}, [*REGOT, LOOP, POT]) for family in ("digits, L1", "tree")],
)
test_weak = bench_cases(
    [weak_case(f) for f in ("random", "digits, squared L2", "clouds in 2-D", "circle")],
    quick=[case("random", 16, 10, {}, [LOOP])],
)
# At 1200 Sinkhorn's iteration does not get there in minutes.
test_batch = bench_cases(
    [batch_case(64, 64, 100, BATCHED), batch_case(64, 64, 1200, [])],
    quick=[batch_case(3, 8, 50, BATCHED)],
)
test_slowest = bench_cases([slowest_case(64, 64, 100)], quick=[slowest_case(3, 8, 50)])
test_samples = bench_cases([samples_case(2000, 3)], quick=[samples_case(40, 3)])
