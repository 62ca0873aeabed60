"""Cases of the operators below the solver: the plan, sums over it, and the system of derivatives."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.harness import Case, Peer, Work
from bench.transport.families import FAMILIES
from bench.transport.peers import ERROR, dense_solve, eager_gradient, eager_plan

OPERATORS = ("transport_plan", "transport_plan_gradient", "transport_solve")
EAGER = "eager expression"
DENSE = "Cholesky of the dense Schur complement (torch)"


def solved(family: str, n: int, eta: float, device: str, *names: str) -> dict[str, Any]:
    """A problem with its potentials, and random vectors of the given names: rows, then columns."""
    problem = {k: v.to(device) for k, v in FAMILIES[family](n)._asdict().items()}
    solve = importlib.import_module("fusee").sinkhorn_newton
    f, g = solve(**problem, reg=1 / eta, tol=ERROR).potentials
    vectors = [torch.randn_like(potential) for potential in (f, g)]
    vectors[1] += (vectors[0].sum() - vectors[1].sum()) * problem["b"]  # as the system asks for
    return {**problem, "reg": 1 / eta, "f": f, "g": g, **dict(zip(names, vectors, strict=False))}


# ADAPTER: the one place that knows our operators.
def operator(name: str) -> Callable[[], Callable[..., Any]]:
    """One of our operators, for a single problem with given costs."""

    def make() -> Callable[..., Any]:
        importlib.import_module("fusee")
        function = getattr(torch.ops.fusee, name)

        def run(M: Tensor, a: Tensor, b: Tensor, reg: float, **vectors: Tensor) -> Any:
            weight = torch.full((1,), reg, dtype=torch.float64, device=M.device)
            problem = [M[None], None, 0, a[None], b[None], weight]
            if name == "transport_solve":
                problem.append(weight.new_full((1, 2), torch.inf))
            return function(*problem, *(vector[None] for vector in vectors.values()))

        return run

    return make


def case(name: str, family: str, n: int, eta: float) -> Case:
    """Read the costs; the plan and the gradient are written."""
    bytes_of_costs = 8 * n * n
    written = 0 if name == "transport_solve" else bytes_of_costs
    expression, vectors, label = {
        "transport_plan": (eager_plan, (), EAGER),
        "transport_plan_gradient": (eager_gradient, ("left", "right"), EAGER),
        "transport_solve": (dense_solve, ("p", "q"), DENSE),
    }[name]
    return Case(
        name=name,
        label=f"{family} {n} x {n} eta {eta:g} float64",
        setup=lambda device: solved(family, n, eta, device, *vectors),
        ceiling="copy" if written else "none",
        work={"forward": Work(bytes=bytes_of_costs + written, written=written)},
        contenders={
            "fusee": Peer(operator(name), requires="fusee"),
            label: Peer(lambda: expression),
        },
    )
