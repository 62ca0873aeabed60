"""Checks that the peers solve the problem that we solve, so that a ratio compares like with like."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from bench.harness import Absent
from bench.transport import peers
from bench.transport.bench_sinkhorn_newton import fusee_solve, problems, slowest
from bench.transport.families import FAMILIES
from bench.transport.operators import OPERATORS, operator, solved

REG = 1 / 50


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_problems(family: str) -> None:
    torch.manual_seed(0)
    M, a, b = FAMILIES[family](25)
    assert M.shape == (25, 25) and M.isfinite().all() and a.min() > 0 and b.min() > 0
    torch.testing.assert_close(torch.stack([a.sum(), b.sum()]), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("name", ["scaling", "pot", "ott", "ssns", "splr", "newton"])
def test_solvers_agree(name: str) -> None:
    package = {"scaling": "torch", "pot": "ot", "ott": "ott"}.get(name, "regot")
    pytest.importorskip(package)
    solver = {
        "scaling": lambda: peers.scaling,
        "pot": lambda: peers.pot_sinkhorn,
        "ott": peers.ott_sinkhorn,
    }.get(name, lambda: peers.regot(name))()
    torch.manual_seed(0)
    problem = (*FAMILIES["tree"](12), REG)
    expected = fusee_solve()(*problem)
    torch.testing.assert_close(solver(*problem, 1e-10), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["pot", "pot batch", "ott"])
def test_batches_agree(name: str) -> None:
    pytest.importorskip("ott" if name == "ott" else "ot")
    solver = {
        "pot": lambda: peers.pot_sinkhorn,
        "pot batch": lambda: peers.pot_batch,
        "ott": peers.ott_sinkhorn,
    }[name]()
    torch.manual_seed(0)
    batch = problems(3, 8)
    expected = fusee_solve()(**batch, reg=REG)
    torch.testing.assert_close(
        peers.Reaching(solver)(**batch, reg=REG), expected, rtol=0, atol=1e-8
    )


def test_who_does_not_arrive_is_absent() -> None:
    def lazy(M: Tensor, a: Tensor, b: Tensor, reg: float, tolerance: float) -> Tensor:
        return a[:, None] * b * (1 + tolerance * looseness)

    torch.manual_seed(0)
    problem = (*FAMILIES["random"](8), REG)
    looseness = 2.0  # what a tolerance may mean; so the second is needed
    assert peers.marginal_error(peers.Reaching(lazy)(*problem), *problem[1:3]) < peers.ERROR
    looseness = 1e6
    with pytest.raises(Absent, match="does not reach"):
        peers.Reaching(lazy)(*problem)
    looseness = float("nan")
    with pytest.raises(Absent, match="nan"):
        peers.Reaching(lazy)(*problem)


def test_slowest_is_one_problem_of_the_batch() -> None:
    batch = problems(3, 8)
    plan = slowest(fusee_solve())(**batch, reg=REG)
    assert any(torch.equal(plan, each) for each in fusee_solve()(**batch, reg=REG))


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_agree(name: str) -> None:
    torch.manual_seed(0)
    vectors = {"transport_plan_gradient": ("left", "right"), "transport_solve": ("p", "q")}
    inputs = solved("clouds in 2-D", 12, 1 / REG, "cpu", *vectors.get(name, ()))
    ours = operator(name)()(**inputs)
    if name == "transport_plan":
        pairs = [(ours, peers.eager_plan(**inputs))]
    elif name == "transport_plan_gradient":
        pairs = list(zip((ours[0], *ours[2:]), peers.eager_gradient(**inputs), strict=True))
    else:  # up to the constant between u and v
        u, v = (each.squeeze(0) for each in ours)
        dense_u, dense_v = peers.dense_solve(**inputs)
        pairs = [(u + v[-1], dense_u), (v - v[-1], dense_v)]
    for each, expected in pairs:
        torch.testing.assert_close(each.view_as(expected), expected, rtol=1e-6, atol=1e-6)


def test_tolerance_is_met() -> None:
    torch.manual_seed(0)
    problem = FAMILIES["random"](30)
    result = importlib.import_module("fusee").sinkhorn_newton(*problem, reg=REG, tol=peers.ERROR)
    assert peers.marginal_error(result.plan, *problem[1:]) <= peers.ERROR
