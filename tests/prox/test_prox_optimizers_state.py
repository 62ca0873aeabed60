"""States and parameter groups of ProxSGD and ProxAdamW: saved, loaded, copied, added, used again."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import fusee
import pytest
import torch
from fusee.optim import ProxAdamW, ProxSGD
from fusee.prox.prox_host import ProxHost
from torch import nn

from tests.prox.hosts import (
    backward,
    network,
    param_groups,
    same,
    table_of,
    train,
)

EMULATED = fusee.engine() == "emulated"


@pytest.mark.parametrize("kind", [ProxSGD, ProxAdamW])
@pytest.mark.parametrize("way", ["tensors", "table", "together"])
@pytest.mark.parametrize("fixed", [False, True])
def test_resumes_exactly(kind: type[ProxHost], way: str, fixed: bool) -> None:
    def optimizer_of(model: nn.Sequential) -> ProxHost:
        options: Any = {"momentum": 0.9} if kind is ProxSGD else {"amsgrad": True}
        return kind(param_groups(model, way), lr=0.05, **options)

    model = network()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(3))
    if fixed:
        optimizer.fix_support()
        train(model, optimizer, range(1))
    optimizer.param_groups[0]["debiased"] = True
    buffer = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), buffer)
    train(model, optimizer, range(3, 6))
    buffer.seek(0)
    weights, state = torch.load(buffer, weights_only=True)
    other = network(1)
    resumed = optimizer_of(other)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    train(other, resumed, range(3, 6))
    assert same(model, other)
    assert optimizer.report() == resumed.report()
    assert str(optimizer.state_dict()) == str(resumed.state_dict())


def test_state_of_a_plain_optimizer() -> None:
    model, twin = network(), network()
    plain = torch.optim.SGD([model[0].weight], lr=0.3, momentum=0.9)
    backward(model, 0)
    plain.step()
    optimizer = ProxSGD([twin[0].weight], lr=0.1, k=2, lam=0.5, dim=1)
    optimizer.load_state_dict(plain.state_dict())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["k"], group["dim"]) == (0.3, 0.9, 2, 1)
    assert torch.equal(
        optimizer.state[twin[0].weight]["momentum_buffer"],
        plain.state[model[0].weight]["momentum_buffer"],
    )
    torch.optim.SGD([model[0].weight]).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
@pytest.mark.parametrize("way", ["table", "weights", "tensors"])
def test_copies(how: str, way: str) -> None:
    model = network()
    optimizer = ProxSGD(param_groups(model, way), lr=0.1, momentum=0.9)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # puts a function into the instance
    train(model, optimizer, range(2))
    pair = (model, optimizer)
    twin, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    train(model, optimizer, range(2, 4))
    train(twin, other, range(2, 4))
    assert same(model, twin)
    other.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], "k": 1, "lam": 1.0})
    assert other.report()[-1].groups == 2


def test_added_groups() -> None:
    model = network()
    optimizer = ProxSGD([model[0].weight], lr=0.1, k=2, lam=50.0, debiased=True)
    train(model, optimizer, range(1))
    optimizer.add_param_group({"params": [model[2].weight], "density": 0.25})
    train(model, optimizer, range(1))
    assert [int(c) for c in optimizer.kept] == [2, 1]
    with pytest.raises(ValueError, match="lam must not be negative"):
        optimizer.add_param_group({"params": [model[2].bias], "lam": -1.0})
    assert len(optimizer.param_groups) == 2
    train(model, optimizer, range(1))
    optimizer.param_groups[1]["params"].append(model[2].bias)
    train(model, optimizer, range(1))
    assert [int(c) for c in optimizer.kept] == [2, 1, 1]


@pytest.mark.parametrize("kind", [ProxSGD, ProxAdamW])
def test_parameter_groups_may_be_used_again(kind: type[ProxHost]) -> None:
    model = network()
    groups = param_groups(model, "table")
    before = [dict(group) for group in groups]
    rows = [kind(groups, lr=0.1).report() for _ in range(2)]
    assert rows[0] == rows[1]
    assert [row.groups for row in rows[0]] == [6]
    assert groups == before


def test_groups_of_another_optimizer_lack_their_table() -> None:
    model = network()
    old = ProxSGD(param_groups(model, "table"), lr=0.1)
    with pytest.raises(ValueError, match="groups must be given again"):
        ProxSGD(old.param_groups, lr=0.1)
    again = [{**old.param_groups[0], "groups": table_of(model)}, old.param_groups[1]]
    assert ProxSGD(again, lr=0.1).report() == old.report()
    tableless = [{**g, "scope": "tensor", "k": None} for g in old.param_groups]
    other = ProxSGD(tableless, lr=0.1)
    other.load_state_dict(old.state_dict())
    with pytest.raises(ValueError, match="groups must be given again"):
        other.step()


def test_groups_of_another_optimizer_keep_their_weights() -> None:
    weight = nn.Parameter(torch.ones(3, 2))
    old = ProxSGD([weight], lr=0.1, k=2, lam=1.0, weights=torch.tensor([1.0, 0.0, 1.0]))
    assert ProxSGD(old.param_groups).report()[0].kept == old.report()[0].kept == 2


def test_added_groups_take_the_table_of_the_constructor() -> None:
    model, twin = network(), network(1)
    weights = [model[0].weight, model[2].weight]
    optimizer = ProxSGD(weights, lr=0.1, k=2, lam=1.0, groups=table_of(model))
    with pytest.raises(ValueError, match=r"params must have the shapes .* of groups"):
        optimizer.add_param_group({"params": [model[0].bias]})
    optimizer.add_param_group({"params": [twin[0].weight, twin[2].weight]})
    optimizer.add_param_group({"params": [twin[0].bias], "groups": None})
    assert [row.groups for row in optimizer.report()] == [6, 6, 6]
    assert [len(row.params) for row in optimizer.report()] == [2, 2, 1]
