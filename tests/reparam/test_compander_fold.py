"""Companders taken off a model again, and the groups of an optimizer."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from fusee.nn import Compander, compand_model, compander_param_groups, fold_companders
from fusee.optim import PerpGrad
from torch import nn
from torch.nn.utils import parametrize

from tests.reparam.test_compander_model import INDEX, NAMES, Net, randn, tied, train

# --- off again ------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_channel", [False, True])
def test_fold(per_channel: bool) -> None:
    """Plain layers with the same weights, bit for bit, in the same parameters."""
    model = Net()
    before = {name: model.get_parameter(name) for name in NAMES}
    types = [type(module) for module in model.modules()]
    keys = list(model.state_dict())
    compand_model(model, per_channel=per_channel)
    train(model, INDEX)
    model.eval()
    weights = {n: model.get_submodule(n.rpartition(".")[0]).weight.detach() for n in NAMES}
    expected = model(INDEX)
    assert fold_companders(model) == NAMES
    assert [type(module) for module in model.modules()] == types
    assert sorted(model.state_dict()) == sorted(keys)
    for name, weight in weights.items():
        assert model.get_parameter(name) is before[name]
        assert torch.equal(model.get_parameter(name), weight)
    assert torch.equal(model(INDEX), expected)
    Net().load_state_dict(model.state_dict())
    assert fold_companders(model) == []
    train(model, INDEX)


def test_folding_a_copy() -> None:
    """The original goes on; by `remove_parametrizations` alone it would lose its weight."""
    model = Net()
    compand_model(model)
    deployed = copy.deepcopy(model)
    fold_companders(deployed)
    train(model, INDEX)
    assert compand_model(deployed) == NAMES
    assert fold_companders(model) == NAMES
    train(deployed, INDEX)


def test_folding_what_was_registered_by_hand() -> None:
    cell = nn.LSTMCell(3, 4)
    parametrize.register_parametrization(cell, "weight_hh", Compander(cell.weight_hh))
    parametrize.register_parametrization(cell, "bias_hh", nn.Identity())
    weight = cell.weight_hh.detach()
    assert fold_companders(cell) == ["weight_hh"]
    assert torch.equal(cell.weight_hh, weight)
    assert parametrize.is_parametrized(cell, "bias_hh") and cell.bias_hh.shape == (16,)


def test_folding_beside_another_parametrisation() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    compand_model(model)
    parametrize.register_parametrization(model[1], "weight", nn.Identity())
    with pytest.raises(ValueError, match=r"1\.weight must have no parametrisation beside"):
        fold_companders(model)
    assert parametrize.is_parametrized(model[0])


# --- the groups of an optimizer -------------------------------------------------------------------


def test_groups() -> None:
    model = Net()
    compand_model(model)
    others, ratios = compander_param_groups(model, 0.1, lr=1e-4)
    assert (others["weight_decay"], ratios["weight_decay"], ratios["lr"]) == (0.1, 0.0, 1e-4)
    assert "lr" not in others
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(ratios["params"]) == 8
    assert all("log_ratio" in names.pop(id(p)) for p in ratios["params"])
    assert all("log_ratio" not in names.pop(id(p)) for p in others["params"])
    assert not names


def test_groups_hold_what_is_shared_once() -> None:
    model = tied()
    compand_model(model)
    others, ratios = compander_param_groups(model, 0.1)
    assert (len(others["params"]), len(ratios["params"])) == (2 + 3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.optim.AdamW([others, ratios])


def test_groups_without_companders() -> None:
    (group,) = compander_param_groups(Net(), 0.1)
    assert len(group["params"]) == len(list(Net().parameters()))
    model = nn.Linear(3, 3, bias=False)
    compand_model(model, learnable=False)
    assert len(compander_param_groups(model, 0)) == 1


def test_a_and_b_do_not_decay() -> None:
    model = nn.Linear(3, 3)
    compand_model(model)
    compander = model.parametrizations.weight[0]
    with torch.no_grad():
        compander.log_ratio_a += 1.0
    optimizer = torch.optim.SGD(compander_param_groups(model, 0.5), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    v = model.parametrizations.weight.original.detach().clone()
    optimizer.step()
    assert compander.log_ratio_a.item() == 1.0
    torch.testing.assert_close(model.parametrizations.weight.original, 0.95 * v)


def test_perp_grad_leaves_a_and_b_alone() -> None:
    model = nn.Linear(3, 4)
    compand_model(model, per_channel=True)
    compander = model.parametrizations.weight[0]
    with torch.no_grad():
        compander.log_ratio_a += 1.0
    optimizer = PerpGrad(torch.optim.SGD(compander_param_groups(model, 0.0), lr=0.1))
    model(randn(5, 3)).square().sum().backward()
    grad = compander.log_ratio_a.grad.clone()
    optimizer.step()
    assert torch.equal(compander.log_ratio_a.grad, grad)


@pytest.mark.parametrize(
    ("decay", "error_type", "match"),
    [
        (-0.1, ValueError, "weight_decay must be finite and at least zero, got -0.1"),
        (float("nan"), ValueError, "weight_decay must be finite"),
        ("0.1", TypeError, "weight_decay must be a number, got str"),
    ],
)
def test_bad_decay(decay: Any, error_type: type[Exception], match: str) -> None:
    with pytest.raises(error_type, match=match):
        compander_param_groups(Net(), decay)
