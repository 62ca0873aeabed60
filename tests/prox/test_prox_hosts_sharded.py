"""Optimisers that host the operator on FSDP2 and tensor parallel weights: two processes step as one."""

from __future__ import annotations

from pathlib import Path

import fusee
import pytest
import torch

from tests.harness.processes import run_in_two_processes

SCRIPT = """
import copy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor, DTensor, Replicate, Shard
import fusee

torch.set_num_threads(1)
mesh = init_device_mesh("cpu", (2,))
DOUBLE = torch.float64


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 4)).to(DOUBLE)


def table(model):
    return fusee.GroupTable.units(
        [torch.empty(p.shape) for p in (model[0].weight, model[0].bias)],
        [torch.empty(model[2].weight.shape)],
        7,
    )


def options(model, way):
    first = {"params": [model[0].weight, model[2].weight], "k": 2, "lam": 0.5, "debiased": True}
    if way == "table":
        first |= {"params": [model[0].weight, model[0].bias, model[2].weight]}
        first |= {"groups": table(network())}
    elif way == "columns":
        first |= {"dim": 1, "scope": "group", "weights": "size", "lam": 0.1}
    taken = {id(p) for p in first["params"]}
    return [first, {"params": [p for p in model.parameters() if id(p) not in taken]}]


def host(kind, groups):
    if kind == "SGD":
        return fusee.optim.ProxSGD(groups, lr=0.1, momentum=0.9)
    return fusee.optim.LatentProx(torch.optim.AdamW(groups, lr=0.1))


def steps(model, optimizer, inputs):
    for number, x in enumerate(inputs):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if number == 3:
            optimizer.fix_support()
    return [(row.requested, row.kept) for row in optimizer.report()]


torch.manual_seed(1)
inputs = [torch.randn(8, 6, dtype=DOUBLE) for _ in range(6)]
for kind in ("SGD", "latent AdamW"):
    for way in ("rows", "columns", "table"):
        plain = network()
        expected = steps(plain, host(kind, options(plain, way)), inputs)
        sharded = network()
        fully_shard(sharded[0], mesh=mesh)
        fully_shard(sharded[2], mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        # Each process has half of every batch; gradients are averaged.
        halves = [x.chunk(2)[rank] for x in inputs]
        actual = steps(sharded, host(kind, options(sharded, way)), halves)
        assert actual == expected, (kind, way, actual, expected)
        assert all(kept == int(k) for k, kept in actual)
        for x, y in zip(sharded.parameters(), plain.parameters()):
            assert isinstance(x, DTensor)
            torch.testing.assert_close(x.full_tensor(), y, rtol=1e-10, atol=1e-12)
            assert torch.equal(x.full_tensor() == 0, y == 0)

# A run goes on from what torch.distributed.checkpoint saves, the latents too.
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict, set_optimizer_state_dict
)

def sharded_network():
    model = network()
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=mesh)
    return model

def train(model, optimizer, inputs):
    for x in inputs:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

halves = [x.chunk(2)[rank] for x in inputs]
first, second = sharded_network(), sharded_network()
one, two = (host("latent AdamW", options(m, "rows")) for m in (first, second))
train(first, one, halves[:3])
second.load_state_dict(copy.deepcopy(first.state_dict()))
state = copy.deepcopy(get_optimizer_state_dict(first, one))
assert isinstance(state["state"]["0.weight"]["latent"], DTensor)
set_optimizer_state_dict(second, two, state)
train(first, one, halves[3:])
train(second, two, halves[3:])
for x, y in zip(first.parameters(), second.parameters()):
    assert torch.equal(x.to_local(), y.to_local())

# Rows and columns of the weights themselves, as tensor parallelism has them.
for placement in (Shard(0), Shard(1), Replicate()):
    torch.manual_seed(2)
    whole = torch.randn(5, 7, dtype=DOUBLE)
    split = distribute_tensor(whole.clone(), mesh, [placement])
    for dim in (0, 1):
        left = fusee.optim.prox_group_envelope_(split, 2, 0.5, dim=dim)
        assert left.tolist() == fusee.optim.prox_group_envelope_(whole, 2, 0.5, dim=dim).tolist()
        torch.testing.assert_close(split.full_tensor(), whole, rtol=1e-12, atol=1e-14)

try:
    fusee.optim.ProxAdamW([nn.Parameter(split)], k=2, lam=0.1)
except NotImplementedError as error:
    assert "LatentProx" in str(error)
else:
    raise AssertionError("ProxAdamW took a DTensor")
"""


@pytest.mark.processes
@pytest.mark.skipif(fusee.engine() == "emulated", reason="says nothing about the kernels")
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="no gloo in this torch")
def test_two_processes_step_as_one(tmp_path: Path) -> None:
    run_in_two_processes(SCRIPT, tmp_path)
