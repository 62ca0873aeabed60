"""LatentProx: against the definition in float64, and around optimisers of torch."""

from __future__ import annotations

import copy
import doctest
import math
from collections.abc import Callable
from typing import Any

import fusee
import pytest
import torch
from fusee.optim import LatentProx
from torch import Tensor, nn

from tests.prox.hosts import (
    backward,
    error,
    joined_ids,
    network,
    same,
    slow_prox_,
    train,
    zero_rows,
)

EMULATED = fusee.engine() == "emulated"

BASES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p, **kw: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, **kw),
    "AdamW": lambda p, **kw: torch.optim.AdamW(p, lr=0.02, **kw),
    "RMSprop": lambda p, **kw: torch.optim.RMSprop(p, lr=0.01, **kw),
}
WAYS: dict[str, dict[str, Any]] = {
    "k": {"k": 2, "lam": 0.8},
    "debiased": {"k": 2, "lam": 4.0, "debiased": True},
    "together": {"density": 0.3, "lam": 0.5, "scope": "group", "weights": "inverse_size"},
    "factor": {"k": 2, "factor": 0.2, "dim": 1},
    "table": {"k": 3, "lam": 1.0, "debiased": True},
}


def options_of(model: nn.Sequential, way: str) -> dict[str, Any]:
    options = dict(WAYS[way])
    if way == "table":
        options["groups"] = fusee.GroupTable.hidden_units(model[0].weight, model[2].weight)
    return options


def groups_of(model: nn.Sequential, way: str) -> list[dict[str, Any]]:
    weights, biases = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    return [{"params": weights, **options_of(model, way)}, {"params": biases}]


class ByHand:
    """The same with plain copies, and the operator by bisection."""

    def __init__(self, model: nn.Sequential, way: str, base: str) -> None:
        weights, biases = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
        self.weights, self.way, self.gamma = weights, way, 0.0
        self.base = BASES[base]([{"params": weights}, {"params": biases}])
        self.latents = [w.detach().clone() for w in weights]
        self.table = options_of(model, "table")["groups"]

    def step(self) -> None:
        for w, z in zip(self.weights, self.latents, strict=True):
            w.data.copy_(z)
        self.base.step()
        self.gamma += self.base.param_groups[0]["lr"]
        for w, z in zip(self.weights, self.latents, strict=True):
            z.copy_(w.detach())
        options = WAYS[self.way]
        scopes = [[w] for w in self.weights]
        if self.way in ("together", "table"):
            scopes = [self.weights]
        for tensors in scopes:
            ids = joined_ids(tensors, options.get("dim", 0))
            if self.way == "table":
                ids = list(self.table.ids)
            k = options.get("k", 3)  # of ten groups
            factor = options.get("factor", self.gamma * options.get("lam", 0.0))
            given = {n: options[n] for n in ("weights", "debiased") if n in options}
            slow_prox_(tensors, ids, k, factor, **given)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("way", WAYS)
def test_steps_as_by_hand(base: str, way: str) -> None:
    model, twin = network(), network()
    optimizer = LatentProx(BASES[base](groups_of(model, way)))
    by_hand = ByHand(twin, way, base)
    for step in range(4):
        backward(model, step)
        backward(twin, step)
        optimizer.step()
        by_hand.step()
        assert error(model, twin) < 1e-11
        for z, w in zip(by_hand.latents, (model[0].weight, model[2].weight), strict=True):
            assert torch.allclose(optimizer.latents[w], z, rtol=0, atol=1e-11)
    lr = optimizer.param_groups[0]["lr"]
    assert optimizer.param_groups[0]["gamma"] == pytest.approx(4 * lr)
    for row in optimizer.report():
        lam = WAYS[way].get("lam", 0.0)
        assert row.factor == pytest.approx(WAYS[way].get("factor", 4 * lr * lam))


def test_options_of_the_wrapper_are_defaults() -> None:
    model = network()
    base = torch.optim.SGD([{"params": [model[0].weight]}, {"params": [model[2].weight], "k": 1}])
    optimizer = LatentProx(base, density=0.5, lam=1.0)
    assert [row.requested for row in optimizer.report()] == [3.0, 1.0]
    optimizer.add_param_group({"params": [model[2].bias], "k": None})
    base.add_param_group({"params": [model[0].bias]})
    assert [row.requested for row in optimizer.report()] == [3.0, 1.0, 3.0]
    assert optimizer.param_groups is base.param_groups and optimizer.state is base.state


def test_reaches_the_projection_of_the_latents() -> None:
    model = network()
    base = BASES["SGD"]([model[0].weight])
    optimizer = LatentProx(base, k=2, lam=2.0, debiased=True)
    kept = []
    for step in range(8):
        backward(model, step)
        optimizer.step()
        kept.append(int(optimizer.kept[0]))
    assert kept[0] > 2 and kept[-1] == 2
    latents = optimizer.latents[model[0].weight]
    wanted = fusee.project_top_k_groups(latents, 2)
    assert torch.equal(model[0].weight.detach(), wanted)
    assert (latents != 0).all()


def test_scopes_without_gradients_are_left_alone() -> None:
    model = network()
    optimizer = LatentProx(
        BASES["SGD"]([model[0].weight, model[2].weight]), k=2, lam=1.0, debiased=True
    )
    for step in range(2):
        backward(model, step)
        optimizer.step()
    before, latent = model[2].weight.detach().clone(), optimizer.latents[model[2].weight].clone()
    first = model[0].weight.detach().clone()
    backward(model, 2)
    model[2].weight.grad = None
    optimizer.step()
    assert torch.equal(model[2].weight, before)
    assert torch.equal(optimizer.latents[model[2].weight], latent)
    assert not torch.equal(model[0].weight, first)


def test_closure_sees_the_weights() -> None:
    model, twin = network(), network()
    optimizer = LatentProx(BASES["SGD"]([model[0].weight]), k=2, lam=5.0, debiased=True)
    by_hand = LatentProx(BASES["SGD"]([twin[0].weight]), k=2, lam=5.0, debiased=True)
    for step in range(4):
        loss = optimizer.step(lambda step=step: backward(model, step))
        assert loss == backward(twin, step)
        by_hand.step()
        assert same(model, twin)


def test_every_evaluation_of_lbfgs_sees_shrunk_weights() -> None:
    """As LBFGS on latents by hand, whose gradients are those at the weights."""
    model, twin = network(), network()
    options: Any = {"lr": 0.1, "max_iter": 4}
    optimizer = LatentProx(
        torch.optim.LBFGS([model[0].weight], **options), k=2, factor=1.0, debiased=True
    )
    latent = nn.Parameter(twin[0].weight.detach().clone())
    by_hand = torch.optim.LBFGS([latent], **options)
    zeros: list[int] = []

    def closure() -> Tensor:
        zeros.append(zero_rows(model[0].weight))
        return backward(model, 0)

    begun = False

    def closure_by_hand() -> Tensor:
        nonlocal begun
        if begun:  # the first is at the weights as they begin
            project()
        begun = True
        loss = backward(twin, 0)
        latent.grad = twin[0].weight.grad.clone()
        return loss

    def project(*_: Any) -> None:
        twin[0].weight.data.copy_(fusee.project_top_k_groups(latent.detach(), 2))

    for _ in range(2):
        loss = optimizer.step(closure)
        assert by_hand.step(closure_by_hand) == loss
        project()
        assert torch.equal(optimizer.latents[model[0].weight], latent)
        assert same(model, twin)
    assert len(zeros) > 4 and zeros[0] == 0 and set(zeros[1:]) == {4}


@pytest.mark.parametrize("attach", ["wrapper", "base"])
@pytest.mark.filterwarnings("error")
def test_schedulers(attach: str) -> None:
    model = network()
    base = torch.optim.SGD([model[0].weight], lr=1.0)
    optimizer = LatentProx(base, k=2, lam=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(
        optimizer if attach == "wrapper" else base, step_size=1, gamma=0.5
    )
    for step in range(3):
        backward(model, step)
        optimizer.step()
        scheduler.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert base.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 0.125
    assert optimizer.param_groups[0]["gamma"] == 1.75


def test_tensors_for_the_numbers() -> None:
    model, twin = network(), network()
    lr = torch.tensor(0.125)
    optimizer = LatentProx(
        torch.optim.SGD([model[0].weight], lr=lr), k=torch.tensor(2), lam=torch.tensor(2.0)
    )
    numbers = LatentProx(torch.optim.SGD([twin[0].weight], lr=0.125), k=2, lam=2.0)
    for step in range(3):
        for m, o in ((model, optimizer), (twin, numbers)):
            backward(m, step)
            o.step()
        if step == 0:
            gamma = optimizer.param_groups[0]["gamma"]
    assert same(model, twin)
    assert gamma is optimizer.param_groups[0]["gamma"] and gamma.dtype == torch.float64
    assert float(gamma) == 0.375 and float(lr) == 0.125


def test_fixed_support() -> None:
    model = network()
    optimizer = LatentProx(BASES["AdamW"]([model[0].weight, model[2].weight]), k=2, lam=3.0)
    train(model, optimizer, range(3))
    wanted = [fusee.project_top_k_groups(w.detach(), 2) for w in (model[0].weight, model[2].weight)]
    optimizer.fix_support()
    assert not optimizer.latents
    for weight, of_weight in zip((model[0].weight, model[2].weight), wanted, strict=True):
        assert torch.equal(weight.detach(), of_weight)
    train(model, optimizer, range(3, 6))
    for weight, of_weight in zip((model[0].weight, model[2].weight), wanted, strict=True):
        assert torch.equal(weight == 0, of_weight == 0)
        assert not torch.equal(weight, of_weight)
        assert not optimizer.state[weight]["exp_avg"][of_weight == 0].any()
    assert [row.kept for row in optimizer.report()] == [2, 2]


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_skips_infinities(fused: bool) -> None:
    model = network(dtype=torch.float32)
    optimizer = LatentProx(torch.optim.SGD([model[0].weight], lr=0.1, fused=fused), k=2, factor=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    backward(model, 0, scale=scaler.scale(torch.ones(())).item())
    model[0].weight.grad[1, 2] = math.inf
    start = copy.deepcopy(model)
    scaler.step(optimizer)
    scaler.update()
    assert same(model, start) and scaler.get_scale() == 4.0
    backward(model, 0, scale=scaler.scale(torch.ones(())).item())
    scaler.step(optimizer)
    backward(start, 0)
    bare = torch.optim.SGD([start[0].weight], lr=0.1)
    bare.step()
    assert torch.allclose(optimizer.latents[model[0].weight], start[0].weight, atol=1e-6)


def test_errors() -> None:
    model = network()
    with pytest.raises(TypeError, match="base_optimizer must be an instance"):
        LatentProx(torch.optim.SGD)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="without the operator, got a ProxSGD"):
        LatentProx(fusee.optim.ProxSGD([model[0].weight], lr=0.1), k=2, lam=1.0)
    groups = groups_of(model, "table")
    base = torch.optim.SGD(groups)
    with pytest.raises(ValueError, match="dim must not be given together with groups"):
        LatentProx(base, dim=1)
    assert len(base.param_groups) == 2 and "groups" in base.param_groups[0]
    groups[1].update(k=1, lam=-1.0)
    with pytest.raises(ValueError, match="lam must not be negative"):
        LatentProx(base)
    base.param_groups[1].update(lam=1.0)
    assert [row.groups for row in LatentProx(base).report()] == [6, 6, 4]
    base = torch.optim.SGD([model[0].weight])
    with pytest.raises(ValueError, match="lam must be given"):
        LatentProx(base, k=2)
    optimizer = LatentProx(torch.optim.SGD([model[0].weight]), k=2, lam=1.0)
    with pytest.raises(ValueError, match="scope must be"):
        optimizer.add_param_group({"params": [model[2].weight], "scope": "all"})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(AttributeError):
        _ = optimizer.nothing_of_the_kind


class Unlucky(torch.optim.SGD):
    """Raises in the middle of its third step."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.steps += 1
        if self.steps == 3:
            raise RuntimeError("out of luck")
        return loss


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("with_closure", [False, True])
def test_a_step_that_raises(tensors: bool, with_closure: bool) -> None:
    model = network()
    lr: Any = torch.tensor(0.1) if tensors else 0.1
    base = Unlucky([model[0].weight], lr=lr)
    optimizer = LatentProx(base, k=2, lam=5.0, debiased=True)

    def step(number: int) -> None:
        if with_closure:
            optimizer.step(lambda: backward(model, number))
        else:
            backward(model, number)
            optimizer.step()

    for number in range(2):
        step(number)
    before = copy.deepcopy((model, optimizer))
    assert zero_rows(model[0].weight) > 0
    with pytest.raises(RuntimeError, match="out of luck"):
        step(2)
    assert same(model, before[0])
    of_twin = before[1].latents[before[0][0].weight]
    assert torch.equal(optimizer.latents[model[0].weight], of_twin)
    assert optimizer.param_groups[0]["gamma"] == before[1].param_groups[0]["gamma"] == 0.1 + lr
    step(3)
    assert optimizer.param_groups[0]["gamma"] == before[1].param_groups[0]["gamma"] + lr


def test_a_closure_that_raises() -> None:
    model = network()
    optimizer = LatentProx(BASES["SGD"]([model[0].weight]), k=2, lam=5.0, debiased=True)
    train(model, optimizer, range(2))
    before, gamma = copy.deepcopy(model), optimizer.param_groups[0]["gamma"]

    def closure() -> Any:
        raise RuntimeError("in the closure")

    with pytest.raises(RuntimeError, match="in the closure"):
        optimizer.step(closure)
    assert same(model, before) and optimizer.param_groups[0]["gamma"] == gamma


def test_a_base_that_does_not_call_the_closure() -> None:
    class Lazy(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step() if closure is None else None

    model = network()
    optimizer = LatentProx(Lazy([model[0].weight], lr=0.1), k=2, lam=5.0, debiased=True)
    train(model, optimizer, range(2))
    before, latent = copy.deepcopy(model), optimizer.latents[model[0].weight].clone()
    assert zero_rows(model[0].weight) > 0 and latent.all()
    assert optimizer.step(lambda: backward(model, 2)) is None
    assert same(model, before)
    assert torch.equal(optimizer.latents[model[0].weight], latent)


def test_repr_names_the_base() -> None:
    text = repr(LatentProx(BASES["AdamW"](network().parameters()), density=0.5, lam=1.0))
    assert text.startswith("LatentProx(") and "AdamW" in text and "density: 0.5" in text


@pytest.mark.skipif(EMULATED, reason="the tracing of a step does not depend on its engine")
def test_compiled_step() -> None:
    """With a tensor for the learning rate; of a number, γ would be another constant in each step."""
    model, twin = network(), network()
    optimizer, eager = (
        LatentProx(torch.optim.SGD(groups_of(m, "debiased"), lr=torch.tensor(0.1), momentum=0.9))
        for m in (model, twin)
    )
    train(model, optimizer, range(1))
    train(twin, eager, range(1))
    compiled = torch.compile(optimizer.step, backend="aot_eager")
    for step in range(1, 4):
        backward(model, step)
        backward(twin, step)
        compiled()
        eager.step()
        assert error(model, twin) < 1e-12


def test_documentation() -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(LatentProx, globs={})
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0
