"""Products with structured matrices as DTensors: two processes find what one does, and without
communication where the mesh divides what is sharded."""

from __future__ import annotations

import fusee
import pytest
import torch

from tests.harness.processes import run_in_two_processes

EMULATED = fusee.engine("cpu") == "emulated"

SCRIPT = """
import fusee
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

torch.set_num_threads(1)
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
R, S = Replicate(), Shard
# k q p l s r = 4 2 3 4 6 2; the rows, the outputs, the inputs, nothing.
monarch = [torch.randn(8, 12), torch.randn(4, 2, 3), torch.randn(4, 6, 2), torch.randn(24)]
blocks = [torch.randn(8, 12), torch.randn(4, 2, 3), torch.randn(8)]
cases = [
    (fusee.monarch_matmul, monarch, (S(0), R, R, R), S(0)),
    (fusee.monarch_matmul, monarch, (R, R, S(1), S(0)), S(1)),
    (fusee.monarch_matmul, monarch[:3], (S(1), S(0), S(2)), Partial("sum")),
    (fusee.monarch_matmul, monarch, (R, R, R, R), R),
    (fusee.block_diagonal_matmul, blocks, (S(0), R, R), S(0)),
    (fusee.block_diagonal_matmul, blocks, (S(1), S(0), S(0)), S(1)),
]
for function, tensors, placements, expected in cases:
    plain = [t.clone().requires_grad_() for t in tensors]
    output = function(*plain)
    g = torch.randn_like(output)
    placed = [
        distribute_tensor(t, mesh, [where]).requires_grad_()
        for t, where in zip(tensors, placements)
    ]
    with CommDebugMode() as forward:
        sharded = function(*placed)
    assert forward.get_total_counts() == 0, forward.get_comm_counts()
    assert sharded.placements == (expected,), sharded.placements
    torch.testing.assert_close(sharded.full_tensor(), output.detach())
    of_output = R if expected == Partial("sum") else expected
    sharded.backward(distribute_tensor(g, mesh, [of_output]))
    output.backward(g)
    for one, other in zip(placed, plain):
        torch.testing.assert_close(one.grad.full_tensor(), other.grad)

# Sizes that the mesh does not divide are made whole first.
x, w1, w2 = torch.randn(5, 9), torch.randn(3, 2, 3), torch.randn(3, 5, 2)
expected = fusee.monarch_matmul(x, w1, w2)
for of_x, of_w2 in ((R, S(1)), (S(1), R), (S(0), S(0))):
    placed = [distribute_tensor(t, mesh, [where]) for t, where in ((x, of_x), (w1, R), (w2, of_w2))]
    torch.testing.assert_close(fusee.monarch_matmul(*placed).full_tensor(), expected)

# A gradient of the weights alone, then one of the input alone: what is empty must not be remembered.
for wanted in (1, 2, 0):
    placed = [distribute_tensor(t, mesh, [w]) for t, w in ((x, S(0)), (w1, R), (w2, R))]
    plain = [t.clone() for t in (x, w1, w2)]
    placed[wanted].requires_grad_(), plain[wanted].requires_grad_()
    fusee.monarch_matmul(*placed).sum().backward()
    fusee.monarch_matmul(*plain).sum().backward()
    torch.testing.assert_close(placed[wanted].grad.full_tensor(), plain[wanted].grad)
"""

FSDP = """
import copy
import fusee
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

torch.set_num_threads(1)
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
one = nn.Sequential(fusee.nn.MonarchLinear(12, 10, nblocks=4), nn.ReLU(), nn.Linear(10, 3))
two = copy.deepcopy(one)
fully_shard(two[0], mesh=mesh)
fully_shard(two, mesh=mesh)
x, y = torch.randn(8, 12), torch.randn(8, 3)
for model, given, wanted in ((one, x, y), (two, x[4 * rank :][:4], y[4 * rank :][:4])):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(given), wanted).backward()
        optimizer.step()
for (name, p), q in zip(one.named_parameters(), two.parameters()):
    torch.testing.assert_close(q.full_tensor(), p, msg=name)
"""


@pytest.mark.processes
@pytest.mark.skipif(EMULATED, reason="the sharding of an operator does not depend on its engine")
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="no gloo in this torch")
@pytest.mark.parametrize("script", [SCRIPT, FSDP], ids=["placements", "FSDP2"])
def test_two_processes(script: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    run_in_two_processes(script, tmp_path)
