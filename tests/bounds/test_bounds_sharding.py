"""Layers of boxes as DTensors: two processes find what one does, without communication in the forward
pass."""

from __future__ import annotations

import fusee
import pytest
import torch

from tests.harness.processes import run_in_two_processes

EMULATED = fusee.engine("cpu") == "emulated"

SCRIPT = """
import fusee
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

torch.set_num_threads(1)
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
R, S = Replicate(), Shard
box = [torch.randn(8, 6), torch.rand(8, 6)]
layer = [*box, torch.randn(4, 6), torch.randn(4)]
images = [torch.randn(4, 2, 3, 5), torch.rand(4, 2, 3, 5)]
target = torch.randint(4, (8,))

def linear(*tensors):
    return fusee.interval_linear(*tensors, relu=True)

def norm(*tensors):
    return fusee.interval_batch_norm(*tensors, relu=True)

def margins(*tensors):
    return (fusee.interval_margins(*tensors),)

statistics = [torch.randn(2), torch.rand(2) + 0.5, torch.randn(2), torch.randn(2)]
cases = [
    (linear, layer, (S(0), S(0), R, R), S(0)),
    (linear, layer, (R, R, S(0), S(0)), S(1)),
    (linear, layer, (R, R, R, R), R),
    (fusee.interval_relu, images, (S(0), S(0)), S(0)),
    (norm, images + statistics, (S(0), S(0), R, R, R, R), S(0)),
    (norm, images + statistics, (S(1), S(1), S(0), S(0), S(0), S(0)), S(1)),
    (margins, [*layer, target], (S(0), S(0), R, R, S(0)), S(0)),
]
for function, tensors, placements, expected in cases:
    def leaf(t):
        return t.requires_grad_() if t.is_floating_point() else t

    plain = [leaf(t.clone()) for t in tensors]
    outputs = function(*plain)
    g = [torch.randn_like(output) for output in outputs]
    placed = [leaf(distribute_tensor(t, mesh, [w])) for t, w in zip(tensors, placements)]
    with CommDebugMode() as forward:
        sharded = function(*placed)
    assert forward.get_total_counts() == 0, (function, forward.get_comm_counts())
    for one, other in zip(sharded, outputs):
        assert one.placements == (expected,), (function, one.placements)
        torch.testing.assert_close(one.full_tensor(), other.detach())
    grads = [distribute_tensor(each, mesh, [expected]) for each in g]
    torch.autograd.backward(list(sharded), grads)
    torch.autograd.backward(list(outputs), g)
    for one, other in zip(placed, plain):
        if other.requires_grad:
            torch.testing.assert_close(one.grad.full_tensor(), other.grad)
"""


@pytest.mark.processes
@pytest.mark.skipif(EMULATED, reason="the sharding of an operator does not depend on its engine")
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="no gloo in this torch")
def test_two_processes(tmp_path) -> None:  # type: ignore[no-untyped-def]
    run_in_two_processes(SCRIPT, tmp_path)
