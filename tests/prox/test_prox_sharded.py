"""The group envelope and its relatives of DTensors: two processes find what one does, and only norms
travel."""

from __future__ import annotations

from pathlib import Path

import fusee
import pytest
import torch

from tests.harness.processes import run_in_two_processes

BEGIN = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
import fusee

torch.set_num_threads(1)
mesh = init_device_mesh("cpu", (2,))
DOUBLE = torch.float64


class Sent(TorchDispatchMode):
    # How many numbers each collective of this process is given.
    def __init__(self):
        super().__init__()
        self.numbers = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "_c10d_functional" and "wait" not in func.__name__:
            self.numbers.append(args[0].numel())
        return func(*args, **(kwargs or {}))


def leaf(value):
    return torch.tensor(value, dtype=DOUBLE, requires_grad=True)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
"""

DIMENSIONS = (
    BEGIN
    + """
FUNCTIONS = {
    "prox": lambda x, k, lam, **o: fusee.prox_group_envelope(x, k, lam, **o),
    "debiased": lambda x, k, lam, **o: fusee.prox_group_envelope(x, k, lam, debiased=True, **o),
    "project": lambda x, k, lam, **o: fusee.project_top_k_groups(x, k, **o),
    "value": lambda x, k, lam, **o: fusee.group_envelope(x, k, **o) * lam,
}
torch.manual_seed(0)
for shape, dim in (((5, 3, 2), 0), ((5, 3, 2), 1), ((5, 3, 2), (0, 1)), ((1, 4), 0), ((7,), 0)):
    whole = torch.randn(shape, dtype=DOUBLE)
    if shape[0] > 1:
        whole[1] = 0
    sent_back = torch.randn(shape, dtype=DOUBLE)
    groups = 1
    for d in (dim,) if isinstance(dim, int) else dim:
        groups *= shape[d]
    for placement in (Shard(0), Shard(len(shape) - 1), Replicate()):
        for weights in (None, "size", torch.linspace(0.5, 2, groups, dtype=DOUBLE)):
            for name, function in FUNCTIONS.items():
                results = []
                for sharded in (False, True):
                    k, lam = leaf(1.5), leaf(0.25)
                    x = whole.clone()
                    if sharded:
                        x = distribute_tensor(x, mesh, [placement])
                    x.requires_grad_()
                    with Sent() as sent:
                        y = function(x, k, lam, dim=dim, weights=weights)
                        # A scalar of the result, whose parts are summed as DTensor sums.
                        z = y
                        if name != "value":
                            g = sent_back
                            if sharded:
                                assert y.placements == x.placements and y.shape == x.shape
                                g = distribute_tensor(g, mesh, [placement], src_data_rank=None)
                            z = (y * g).sum()
                            z = z.full_tensor() if sharded else z
                        leaves = [x] if name == "project" else [x, k, lam]
                        (gx, *numbers) = torch.autograd.grad(z, leaves, create_graph=name != "value")
                    if sharded:
                        # One number a group, and the sum above.
                        assert all(n <= max(groups, 1) for n in sent.numbers), sent.numbers
                        assert len(sent.numbers) <= 6, sent.numbers
                        assert placement.is_replicate() or sent.numbers
                        y, gx = (t.full_tensor() if isinstance(t, DTensor) else t for t in (y, gx))
                    results.append([y, gx, *numbers])
                for a, e in zip(*reversed(results)):
                    close(a, e)

# FSDP2's parameters, half types, and what is not allowed.
from torch.distributed.fsdp import fully_shard

layer = torch.nn.Linear(6, 5, bias=False, dtype=torch.bfloat16)
whole = layer.weight.detach().clone()
fully_shard(layer, mesh=mesh)
torch.distributed.broadcast(whole, 0)
with torch.no_grad():
    layer.weight.copy_(distribute_tensor(whole, mesh, [Shard(0)]))
    moved = fusee.prox_group_envelope(layer.weight, 2, 0.25)
    expected = fusee.prox_group_envelope(whole, 2, 0.25)
assert moved.dtype == torch.bfloat16 and moved.placements == layer.weight.placements
torch.testing.assert_close(moved.full_tensor(), expected)
try:
    fusee.prox_group_envelope(layer.weight, 2, 0.25, metric=torch.ones(5, 6))
except ValueError as error:
    assert "metric must have shape (5,) where input is a DTensor" in str(error), error
else:
    raise AssertionError("no error")
"""
)

TABLES = (
    BEGIN
    + """
torch.manual_seed(0)
whole = [torch.randn(5, 3, dtype=DOUBLE), torch.randn(5, dtype=DOUBLE), torch.randn(4, 5, dtype=DOUBLE)]
table = fusee.GroupTable.filters(whole[0], rows=[whole[1]], consumers=[whole[2]])
placements = [[Shard(0)], None, [Shard(1)]]
FUNCTIONS = {
    "prox": lambda x, k, lam: fusee.prox_group_envelope(x, k, lam, groups=table, weights="size"),
    "project": lambda x, k, lam: fusee.project_top_k_groups(x, k, groups=table),
    "value": lambda x, k, lam: [fusee.group_envelope(x, k, groups=table) * lam],
}
for name, function in FUNCTIONS.items():
    results = []
    for sharded in (False, True):
        k, lam = leaf(1.5), leaf(0.25)
        x = [
            (distribute_tensor(t.clone(), mesh, p) if sharded and p else t.clone()).requires_grad_()
            for t, p in zip(whole, placements)
        ]
        with Sent() as sent:
            y = function(x, k, lam)
            z = sum((t * t.detach()).sum() for t in y[1:2] if not isinstance(t, DTensor))
            for t in (t for t in y if isinstance(t, DTensor)):
                z = z + (t * t.detach()).sum().full_tensor()
            if not sharded:
                z = sum((t * t.detach()).sum() for t in y)
            if name == "value":
                z = y[0]
            leaves = x if name == "project" else [*x, k, lam]
            grads = torch.autograd.grad(z, leaves)
        if sharded:
            assert sent.numbers and all(n <= 5 for n in sent.numbers), sent.numbers
        plain = [t.full_tensor() if isinstance(t, DTensor) else t for t in (*y, *grads)]
        results.append(plain)
    for a, e in zip(*reversed(results)):
        close(a, e)
"""
)


@pytest.mark.processes
@pytest.mark.skipif(fusee.engine() == "emulated", reason="says nothing about the kernels")
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="no gloo in this torch")
@pytest.mark.parametrize("script", [DIMENSIONS, TABLES], ids=["dimensions", "tables"])
def test_two_processes(script: str, tmp_path: Path) -> None:
    run_in_two_processes(script, tmp_path)
