"""The state of LatentProx: saved, loaded, copied, in distributed checkpoints."""

from __future__ import annotations

import copy
import io
import pickle

import fusee
import pytest
import torch
from fusee.optim import LatentProx

from tests.prox.hosts import backward, network, same, train
from tests.prox.test_latent_prox import BASES, groups_of

EMULATED = fusee.engine() == "emulated"


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("way", ["debiased", "table"])
@pytest.mark.parametrize("fixed", [False, True])
def test_resumes_exactly(base: str, way: str, fixed: bool) -> None:
    model = network()
    optimizer = LatentProx(BASES[base](groups_of(model, way)))
    train(model, optimizer, range(3))
    if fixed:
        optimizer.fix_support()
    buffer = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), buffer)
    train(model, optimizer, range(3, 6))
    buffer.seek(0)
    weights, state = torch.load(buffer, weights_only=True)
    other = network(1)
    resumed = LatentProx(BASES[base](groups_of(other, way)))
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    train(other, resumed, range(3, 6))
    assert same(model, other)
    assert optimizer.report() == resumed.report()
    assert str(optimizer.state_dict()) == str(resumed.state_dict())


def test_state_of_a_bare_base() -> None:
    model, twin = network(), network()
    bare = BASES["SGD"]([model[0].weight])
    backward(model, 0)
    bare.step()
    optimizer = LatentProx(BASES["SGD"]([twin[0].weight]), k=2, lam=0.5, dim=1)
    train(twin, optimizer, range(1))
    optimizer.load_state_dict(copy.deepcopy(bare.state_dict()))
    twin.load_state_dict(model.state_dict())
    group = optimizer.param_groups[0]
    assert (group["k"], group["dim"], group["gamma"]) == (2, 1, 0.0)
    assert not optimizer.latents
    backward(model, 1)
    train(twin, optimizer, range(1, 2))
    bare.step()
    assert torch.equal(optimizer.latents[twin[0].weight], model[0].weight.detach())


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copies(how: str) -> None:
    model = network()
    optimizer = LatentProx(BASES["AdamW"](groups_of(model, "table")))
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # puts a function into the instance
    train(model, optimizer, range(2))
    pair = (model, optimizer)
    twin, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    train(model, optimizer, range(2, 4))
    train(twin, other, range(2, 4))
    assert same(model, twin)
    assert other.latents.keys() == {twin[0].weight, twin[2].weight}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("fixed", [False, True])
def test_state_for_checkpoints(base: str, fixed: bool) -> None:
    """By the names of the parameters, as torch.distributed.checkpoint wants it."""
    from torch.distributed.checkpoint import state_dict as of_checkpoint

    model = network()
    optimizer = LatentProx(BASES[base](groups_of(model, "debiased")))
    train(model, optimizer, range(3))
    if fixed:
        optimizer.fix_support()
    state = copy.deepcopy(of_checkpoint.get_optimizer_state_dict(model, optimizer))
    assert ("latent" in state["state"]["0.weight"]) != fixed
    other = network(1)
    resumed = LatentProx(BASES[base](groups_of(other, "debiased")))
    other.load_state_dict(model.state_dict())
    of_checkpoint.set_optimizer_state_dict(other, resumed, state)
    train(model, optimizer, range(3, 6))
    train(other, resumed, range(3, 6))
    assert same(model, other)
    assert optimizer.report() == resumed.report()


@pytest.mark.filterwarnings("ignore")
def test_state_for_checkpoints_of_a_base_without_any() -> None:
    from torch.distributed.checkpoint import state_dict as of_checkpoint

    model, other = network(), network(1)
    optimizer, resumed = (
        LatentProx(torch.optim.SGD(groups_of(m, "debiased"), lr=0.1)) for m in (model, other)
    )
    train(model, optimizer, range(3))
    state = copy.deepcopy(of_checkpoint.get_optimizer_state_dict(model, optimizer))
    other.load_state_dict(model.state_dict())
    of_checkpoint.set_optimizer_state_dict(other, resumed, state)
    train(model, optimizer, range(3, 6))
    train(other, resumed, range(3, 6))
    assert same(model, other)


def test_latents_stay_out_of_the_state_of_the_base() -> None:
    model = network()
    optimizer = LatentProx(BASES["AdamW"]([model[0].weight]), k=2, lam=1.0)
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    assert state["state"][0]["latent"] is optimizer.latents[model[0].weight]
    optimizer.load_state_dict(state)
    assert optimizer.state[model[0].weight].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert "latent" not in optimizer.base_optimizer.state_dict()["state"][0]
    bare = LatentProx(torch.optim.SGD([model[0].weight], lr=0.1), k=2, lam=1.0)
    train(model, bare, range(2))
    bare.load_state_dict(bare.state_dict())
    assert not bare.state and bare.latents
    torch.optim.AdamW([model[0].weight]).load_state_dict(state)


def test_parameter_groups_may_be_used_again() -> None:
    model = network()
    groups = groups_of(model, "table")
    before = [dict(group) for group in groups]
    rows = [LatentProx(BASES["AdamW"](groups)).report() for _ in range(2)]
    assert rows[0] == rows[1] and [row.groups for row in rows[0]] == [6]
    assert all(given.items() >= group.items() for given, group in zip(groups, before, strict=True))
    optimizer = LatentProx(BASES["AdamW"](groups))
    with pytest.raises(ValueError, match="groups must be given again"):
        LatentProx(BASES["AdamW"](optimizer.param_groups))
