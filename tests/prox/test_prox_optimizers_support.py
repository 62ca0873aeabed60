"""The fixed support of ProxSGD and ProxAdamW: exact numbers of groups, and zeros that stay."""

from __future__ import annotations

import copy
from typing import Any

import fusee
import pytest
import torch
from fusee.optim import ProxAdamW, ProxSGD
from fusee.prox.prox_host import ProxHost

from tests.prox.hosts import (
    WAYS,
    backward,
    error,
    joined_ids,
    network,
    param_groups,
    same,
    slow_prox_,
    table_of,
    train,
)

EMULATED = fusee.engine() == "emulated"


@pytest.mark.parametrize("way", ["debiased", "columns", "table", "weights", "together"])
@pytest.mark.parametrize("kind", [ProxSGD, ProxAdamW])
def test_fixed_support(kind: type[ProxHost], way: str) -> None:
    model = network()
    options: Any = {"momentum": 0.9} if kind is ProxSGD else {}
    optimizer = kind(param_groups(model, way), lr=0.05, **options)
    optimizer.param_groups[0]["lam"] = 1e-3
    train(model, optimizer, range(3))
    wanted = network()
    wanted.load_state_dict(model.state_dict())
    weights = WAYS[way].get("weights")
    tensors = [wanted[0].weight, wanted[2].weight]
    dim = WAYS[way].get("dim", 0)
    if way in ("table", "weights"):
        scopes: Any = [(tensors, list(table_of(wanted).ids))]
    elif way == "together":
        scopes = [(tensors, joined_ids(tensors, dim))]
    else:
        scopes = [([t], joined_ids([t], dim)) for t in tensors]
    for of_scope, ids in scopes:
        slow_prox_(of_scope, ids, WAYS[way]["k"], 1e6, weights=weights, debiased=True)
    optimizer.fix_support()
    assert error(model, wanted) == 0 if way != "weights" else True
    dead = [w == 0 for w in (model[0].weight, model[2].weight)]
    assert all(d.any() for d in dead)
    before = copy.deepcopy(model)
    assert [row.factor for row in optimizer.report()] == [0.0] * len(scopes)
    train(model, optimizer, range(3, 8))
    for weight, zero in zip((model[0].weight, model[2].weight), dead, strict=True):
        assert torch.equal(weight == 0, zero)
        for name, value in optimizer.state[weight].items():
            if name != "step":
                assert not value[zero].any() and value[~zero].all()
    assert not same(model, before)
    assert all(row.kept == row.requested for row in optimizer.report() if way != "weights")
    optimizer.param_groups[0]["support"] = None
    optimizer.param_groups[0]["lam"] = 0.0
    train(model, optimizer, range(8, 9))
    for weight in (model[0].weight, model[2].weight):
        assert weight[weight.grad != 0].all()


def test_fixing_the_support_leaves_frozen_scopes_alone() -> None:
    model = network()
    weights = [model[0].weight, model[2].weight]
    optimizer = ProxSGD(weights, lr=0.1, k=2, lam=0.1)
    train(model, optimizer, range(2))
    model[2].weight.requires_grad_(False)
    before = model[2].weight.clone()
    optimizer.fix_support()
    assert [row.kept for row in optimizer.report()] == [2, 4]
    train(model, optimizer, range(2, 4))
    assert torch.equal(model[2].weight, before)


def test_masks_of_the_support_may_change() -> None:
    model = network()
    weight = model[0].weight
    optimizer = ProxSGD([weight], lr=0.1, k=4, lam=0.1)
    optimizer.fix_support()
    mask = torch.tensor([True, False, False, False, False, False])
    optimizer.param_groups[0]["support"][0] = mask
    train(model, optimizer, range(1))
    assert not weight[1:].any() and weight[0].all()
    mask[:] = torch.tensor([False, True, False, False, False, False])
    train(model, optimizer, range(1, 2))
    assert not weight[0].any()


def test_a_support_that_does_not_fit() -> None:
    model = network()
    optimizer = ProxSGD([model[0].weight, model[2].weight], lr=0.1, k=2, lam=0.1)
    other = network()
    narrow = ProxSGD([other[0].weight[:4].detach(), other[2].weight], lr=0.1, k=2, lam=0.1)
    narrow.fix_support()
    optimizer.load_state_dict(narrow.state_dict())
    backward(model, 0)
    with pytest.raises(ValueError, match=r"support\[0\] must be .* shape \(6,\), got .* \(4,\)"):
        optimizer.step()
    optimizer.param_groups[0]["support"] = [torch.ones(6, dtype=torch.bool)]
    with pytest.raises(
        ValueError, match="support must have a mask for each of the 2 scopes, got 1"
    ):
        optimizer.step()
    optimizer.param_groups[0]["support"] = [torch.ones(6), torch.ones(4)]
    with pytest.raises(ValueError, match=r"support\[0\] must be of dtype torch.bool"):
        optimizer.step()
