"""Companders under FSDP2: two processes train as one does."""

from __future__ import annotations

from pathlib import Path

import fusee
import pytest
import torch

from tests.harness.processes import run_in_two_processes

TRAIN = """
import warnings
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils import parametrize
import fusee

torch.set_num_threads(1)
mesh = init_device_mesh("cpu", (2,))


def made(per_channel):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 7))
    model[4].weight = model[2].weight
    fusee.nn.compand_model(model, per_channel=per_channel)
    return model


def sharded(model, **options):
    fully_shard(model[0], mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def train(model, x):
    groups = fusee.nn.compander_param_groups(model, weight_decay=0.1, lr=0.5)
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def whole(model):
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


torch.manual_seed(1)
x = torch.randn(8, 5)
mine = x[4 * rank : 4 * rank + 4]
for per_channel in (False, True):
    one, two = made(per_channel), sharded(made(per_channel))
    start = {name: t.clone() for name, t in one.state_dict().items()}
    train(one, x)
    train(two, mine)
    expected = one.state_dict()
    for name, parameter in two.named_parameters():
        full = parameter.full_tensor()
        torch.testing.assert_close(full, expected[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(full, start[name]), name
    assert len(list(two.parameters())) == 5 + 4

    # What is gathered: a and b, the report, the state dict.
    for index in (0, 4):
        there, here = (m[index].parametrizations.weight[0] for m in (two, one))
        torch.testing.assert_close(there.a, here.a)
        torch.testing.assert_close(there.b, here.b)
    for there, here in zip(fusee.nn.weight_report(two).rows, fusee.nn.weight_report(one).rows):
        assert (there.name, there.near_zero, there.saturated) == (
            here.name, here.near_zero, here.saturated
        )
        torch.testing.assert_close(there.sample, here.sample, rtol=1e-5, atol=1e-6)
    two.zero_grad()
    one.zero_grad()
    weight = two[4].weight
    torch.testing.assert_close(weight.full_tensor(), one[4].weight, rtol=1e-5, atol=1e-6)
    assert weight.placements[0].is_shard(0)
    weight.square().sum().full_tensor().backward()
    one[4].weight.square().sum().backward()
    grads = {name: p.grad for name, p in one.named_parameters()}
    for name, parameter in two.named_parameters():
        if grads[name] is not None:
            torch.testing.assert_close(parameter.grad.full_tensor(), grads[name])
    assert sum(grad is not None for grad in grads.values()) == 3
    state = whole(two)
    if rank == 0:
        plain = made(per_channel)
        plain.load_state_dict(state)
        fusee.nn.fold_companders(plain)
        fusee.nn.fold_companders(one)
        torch.testing.assert_close(plain(x), one(x), rtol=1e-5, atol=1e-6)

    # What must come before sharding says so, and leaves things as they are.
    for wrong in (
        lambda: fusee.nn.fold_companders(two),
        lambda: fusee.nn.Compander(two[0].bias),
        lambda: setattr(two[0], "weight", torch.zeros(7, 5)),
    ):
        try:
            wrong()
        except ValueError as error:
            assert "must not be sharded" in str(error), error
        else:
            raise AssertionError("no error")
    bare = sharded(nn.Sequential(nn.Linear(3, 4)))
    try:
        fusee.nn.compand_model(bare)
    except ValueError as error:
        assert str(error).startswith("0.weight: weight must not be sharded"), error
    else:
        raise AssertionError("no error")
    two(mine)

# In bfloat16 the constants keep their precision, and a learns in steps that log a would lose.
half = sharded(made(False), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
seen = []
compander = half[0].parametrizations.weight[0]
compander.register_forward_hook(lambda module, args, out: seen.append((module.a.item(), out.dtype)))
half(mine)
assert seen[0] == (made(False)[0].parametrizations.weight[0].a.item(), torch.bfloat16)
with torch.no_grad():
    compander.log_ratio_a.add_(1e-3)
half(mine)
assert 0.0009 < seen[1][0] / seen[0][0] - 1 < 0.0011
train(half, mine)
"""


@pytest.mark.processes
@pytest.mark.skipif(fusee.engine() == "emulated", reason="says nothing about the kernels")
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="no gloo in this torch")
def test_fully_shard(tmp_path: Path) -> None:
    run_in_two_processes(TRAIN, tmp_path, "-W", "error::UserWarning:fusee")
