"""Transport of DTensors: two processes find what one does, and problems of a split batch stay apart."""

from __future__ import annotations

from pathlib import Path

import fusee
import pytest
import torch

from tests.harness.processes import run_in_two_processes

BEGIN = """
import math
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
import fusee

torch.set_num_threads(1)
mesh = init_device_mesh("cpu", (2,))
DOUBLE = torch.float64
RESULTS = (
    "value", "value_linear", "plan", "marginal_error", "converged", "n_iter", "stages",
    "potentials", "marginals",
)


def tensors_of(result, name):
    found = getattr(result, name)
    return found if isinstance(found, tuple) else (found,)


def masses(*shape):
    given = torch.rand(shape, dtype=DOUBLE) + 0.5
    return given / given.sum(-1, keepdim=True)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed(tensors, place):
    return [distribute_tensor(t, mesh, [place]).requires_grad_() for t in tensors]


def close(actual, expected, bound=1e-12):
    torch.testing.assert_close(whole(actual), expected, rtol=bound, atol=bound)


def pulled_back(tensors, leaves):
    # Of half the sum of squares.
    return torch.autograd.grad(tensors, leaves, [t.detach() for t in tensors], retain_graph=True)


def compare(function, given, place, travels, bound):
    # Every result, and the gradients of those that have some.
    leaves, plain = placed(given, place), [t.clone().requires_grad_() for t in given]
    with CommDebugMode() as sent:
        result = function(*leaves)
        found = {name: tensors_of(result, name) for name in RESULTS}
    expected = function(*plain)
    gradients = {}
    for name, tensors in found.items():
        others = tensors_of(expected, name)
        assert all(isinstance(t, DTensor) for t in tensors), name
        for one, other in zip(tensors, others, strict=True):
            close(one, other, bound)
        if tensors[0].requires_grad:
            assert others[0].requires_grad
            with sent:
                sharded = pulled_back(tensors, leaves)
            want = pulled_back(others, plain)
            for one, other in zip(sharded, want, strict=True):
                close(one, other, bound)
            gradients[name] = sharded
        if not travels:
            assert all(t.placements == (place,) for t in tensors), name
            assert all(t.placements == (place,) for t in gradients.get(name, ())), name
    assert set(gradients) == {"value", "value_linear", "plan", "potentials", "marginals"}
    assert (sent.get_total_counts() > 0) == travels, sent.get_comm_counts()
    return result, expected


torch.manual_seed(0)
whole_batch = [torch.rand(5, 6, 4, dtype=DOUBLE), masses(5, 6), masses(5, 4)]
"""

COSTS = (
    BEGIN
    + """
# Five problems in two processes, fewer than processes, and without a batch.
for place, travels in ((Shard(0), False), (Replicate(), False), (Shard(1), True)):
    for options in ({"reg": 0.05}, {"reg": 0.1, "unbalanced": (0.5, math.inf)}):
        bound = 1e-10 if travels else 0
        solve = lambda *given: fusee.sinkhorn_newton(*given, **options)
        result, expected = compare(solve, whole_batch, place, travels, bound)
        close(result[3].plan, expected[3].plan)
        sparse = result[3].sparse_plan
        assert sparse.layout == torch.sparse_csr
        torch.testing.assert_close(sparse.to_dense(), expected[3].sparse_plan.to_dense())
one = [whole_batch[0][:1], whole_batch[1][:1], whole_batch[2][:1]]
alone = [t[0] for t in one]
for given, place, travels in (
    (one, Shard(0), True), (alone, Shard(0), True), (alone, Replicate(), False)
):
    bound = 1e-10 if travels else 0
    compare(lambda *given: fusee.sinkhorn_newton(*given, reg=0.05), given, place, travels, bound)
"""
)

BESIDE = (
    BEGIN
    + """
# Beside a DTensor plain tensors are the same in every process.
M, a, b = whole_batch
reg = torch.linspace(0.05, 0.1, 5)
expected = fusee.sinkhorn_newton(M, a, b, reg=reg)
(x,) = placed([M], Shard(0))
first = tuple(t.detach() for t in expected.potentials)
with CommDebugMode() as sent:
    again = fusee.sinkhorn_newton(x, a, b, reg=reg, potentials_init=first)
    assert again.plan.placements == (Shard(0),)
assert sent.get_total_counts() == 0
assert whole(again.n_iter).tolist() == [1] * 5
close(again.plan, expected.plan, 1e-8)
grads = []
for costs in (x, M):
    leaf = a[0].clone().requires_grad_()
    result = fusee.sinkhorn_newton(costs, leaf, b, reg=0.1, unbalanced=1.0)
    grads += torch.autograd.grad(result.value.square().sum(), [leaf])
assert not isinstance(grads[0], DTensor)
close(*grads)
for wrong, kind, message in (
    (lambda: fusee.sinkhorn_newton(M, *placed([a, b], Shard(0)), reg=0.1), RuntimeError, "mixed"),
    (lambda: fusee.sinkhorn_newton(x, a[:3], b, reg=0.1), ValueError, "a must have shape (6,)"),
):
    try:
        wrong()
    except kind as error:
        assert message in str(error), error
    else:
        raise AssertionError("no error")

# Parts of a sum are summed, values out of range are NaN, and uniform masses need none given.
parts = DTensor.from_local(M / 2, mesh, [Partial()], run_check=False)
close(fusee.sinkhorn_newton(parts, a, b, reg=0.1).value, fusee.sinkhorn_newton(M, a, b, reg=0.1).value)
wrong = a.clone()
wrong[3, 1] = -1
value = whole(fusee.sinkhorn_newton(x, wrong, b, reg=0.1).value)
assert value.isnan().tolist() == [False, False, False, True, False]
close(fusee.sinkhorn_newton(x, reg=0.1).value, fusee.sinkhorn_newton(M, reg=0.1).value, 0)

# In compiled code, and second order of the value.
solve = torch.compile(
    lambda x: fusee.sinkhorn_newton(x, a, b, reg=0.1).plan, fullgraph=True, backend="aot_eager"
)
plan = solve(x)
assert plan.placements == (Shard(0),)
close(plan, fusee.sinkhorn_newton(M, a, b, reg=0.1).plan)
curvatures = []
for given in (placed(whole_batch, Shard(0)), [t.clone().requires_grad_() for t in whole_batch]):
    value = fusee.sinkhorn_newton(*given, reg=0.2).value
    gradients = torch.autograd.grad(value.sum(), given, create_graph=True)
    squares = sum((g * g).sum() for g in gradients)
    curvatures.append(torch.autograd.grad(squares, given))
for one, other in zip(*curvatures, strict=True):
    close(one, other)
"""
)

POINTS = (
    BEGIN
    + """
points = [torch.randn(5, 6, 3, dtype=DOUBLE), torch.randn(5, 4, 3, dtype=DOUBLE)]
given = [*points, *whole_batch[1:]]
for metric in ("sqeuclidean", "euclidean", "cityblock", "dot"):
    solve = lambda *given: fusee.sinkhorn_newton_samples(*given, metric=metric, reg=0.5)
    for place in (Shard(0), Replicate()):
        compare(solve, given, place, False, 0)
compare(solve, given, Shard(1), True, 1e-10)
# Points of one side are a plain tensor.
(x,) = placed(points[:1], Shard(0))
value = fusee.sinkhorn_newton_samples(x, points[1], reg=0.5).value
close(value, fusee.sinkhorn_newton_samples(*points, reg=0.5).value, 0)
"""
)


@pytest.mark.processes
@pytest.mark.skipif(fusee.engine() == "emulated", reason="says nothing about the kernels")
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="no gloo in this torch")
@pytest.mark.parametrize("script", [COSTS, BESIDE, POINTS], ids=["costs", "beside", "points"])
def test_two_processes(script: str, tmp_path: Path) -> None:
    run_in_two_processes(script, tmp_path)
