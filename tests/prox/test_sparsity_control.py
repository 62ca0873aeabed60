"""SparsityController: its curves, its corrections, its end, and the toy problem of the spec."""

from __future__ import annotations

import copy
import doctest
import io
import pickle
from collections.abc import Callable
from typing import Any

import fusee
import pytest
import torch
from fusee.optim import LatentProx, ProxAdamW, ProxSGD, SparsityController
from fusee.prox.prox_host import ProxHost
from torch import nn

from tests.prox.hosts import DOUBLE, backward, network, same, toy

EMULATED = fusee.engine() == "emulated"

HOSTS: dict[str, Callable[[Any], ProxHost]] = {
    "ProxSGD": lambda p: ProxSGD(p, lr=0.1, momentum=0.9),
    "ProxAdamW": lambda p: ProxAdamW(p, lr=0.02),
    "LatentProx": lambda p: LatentProx(torch.optim.AdamW(p, lr=0.02)),
}


def groups_of(model: nn.Sequential) -> list[dict[str, Any]]:
    """Two scopes, of 6 and 4 groups."""
    weights = [model[0].weight, model[2].weight]
    return [
        {"params": [model[0].bias, model[2].bias]},
        {"params": weights, "density": 0.5, "lam": 2.0, "debiased": True},
    ]


def led(
    name: str = "ProxSGD", **options: Any
) -> tuple[nn.Sequential, ProxHost, SparsityController]:
    model = network()
    optimizer = HOSTS[name](groups_of(model))
    return model, optimizer, SparsityController(optimizer, **options)


def train(model: nn.Module, optimizer: ProxHost, control: Any, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()
        control.step()


def course(control: SparsityController, steps: int) -> list[tuple[list[float], list[float]]]:
    """k and lam for each step."""
    group = control.optimizer.param_groups[1]
    values = []
    for _ in range(steps):
        values.append((group["k"].tolist(), group["lam"].tolist()))
        control.step()
    return values


@pytest.mark.parametrize("k_curve", ["cubic", "linear", "constant"])
def test_k_falls(k_curve: str) -> None:
    control = led(warmup=2, ramp=4, k_curve=k_curve)[2]
    curve = {"cubic": lambda s: (1 - s) ** 3, "linear": lambda s: 1 - s, "constant": lambda s: 0}
    left = [1.0, 1.0, *(curve[k_curve](s) for s in (0.0, 0.25, 0.5, 0.75, 1.0, 1.0))]
    values = course(control, 8)
    for (k, lam), share, step in zip(values, left, range(8), strict=True):
        assert k == pytest.approx([3 + 3 * share, 2 + 2 * share])
        assert lam == [0.0 if step < 2 else 2.0] * 2


@pytest.mark.parametrize("lam_curve", ["linear", "geometric"])
def test_lam_rises(lam_curve: str) -> None:
    control = led(warmup=1, ramp=2, lam_curve=lam_curve, lam_start=0.25)[2]
    middle = {"linear": 0.625, "geometric": 0.5}[lam_curve]
    assert [lam for _, lam in course(control, 5)] == [
        [2 * x] * 2 for x in (0.0, 0.25, middle, 1.0, 1.0)
    ]


def test_factors_are_led_in_place_of_lam() -> None:
    model = network()
    optimizer = ProxSGD([model[0].weight], lr=0.1, k=2, factor=1.0, debiased=True)
    control = SparsityController(optimizer, ramp=4, lam_curve="linear", lam_start=0.0)
    factors = []
    for _ in range(5):
        factors.append(optimizer.report()[0].factor)
        control.step()
    assert factors == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert optimizer.param_groups[0]["lam"] is None


def test_tensors_are_written_in_place() -> None:
    _, optimizer, control = led(ramp=4, hold=2)
    group = optimizer.param_groups[1]
    k, lam = group["k"], group["lam"]
    for _ in range(6):
        control.step()
    assert group["k"] is k and group["lam"] is lam
    assert control.finished and k.tolist() == [3.0, 2.0]


@pytest.mark.parametrize("name", HOSTS)
def test_the_end_is_exact(name: str) -> None:
    model, optimizer, control = led(name, warmup=2, ramp=3, hold=1)
    weights = [model[0].weight, model[2].weight]
    train(model, optimizer, control, range(2))
    assert all((w != 0).all() for w in weights)
    train(model, optimizer, control, range(2, 5))
    assert not control.finished
    train(model, optimizer, control, range(5, 6))
    assert control.finished
    assert [(row.requested, row.kept) for row in control.report()] == [(3.0, 3), (2.0, 2)]
    alive = [w != 0 for w in weights]
    before = copy.deepcopy(model)
    train(model, optimizer, control, range(6, 12))
    assert not same(model, before)
    for w, mask in zip(weights, alive, strict=True):
        assert torch.equal(w != 0, mask)
        for key, value in optimizer.state[w].items():
            assert key == "step" or not value[~mask].any()
    assert [(row.requested, row.kept) for row in control.report()] == [(3.0, 3), (2.0, 2)]


def test_without_hold_the_end_is_called_for() -> None:
    model, optimizer, control = led(ramp=2)
    train(model, optimizer, control, range(5))
    assert not control.finished
    control.finish()
    assert control.finished
    assert [(row.requested, row.kept) for row in control.report()] == [(3.0, 3), (2.0, 2)]


def test_corrections_go_up_and_down_between_bounds() -> None:
    """Of each scope by itself: one has too many groups, one as many as it should."""
    model, optimizer, control = led(interval=2, gain=2.0, bounds=(0.3, 3.0))
    group = optimizer.param_groups[1]
    with torch.no_grad():
        model[2].weight[2:] = 0
    corrected = []
    for _ in range(7):
        control.step()
        corrected.append([x / 2.0 for x in group["lam"].tolist()])
    assert corrected[0] == [1.0, 1.0]
    assert corrected[1] == corrected[2] == [2.0, 0.5]
    assert corrected[3] == corrected[4] == corrected[5] == [3.0, 0.3]
    assert group["k"].tolist() == [3.0, 2.0]


@pytest.mark.parametrize("k", [3, torch.tensor(3), None])
def test_corrections_to_another_k(k: Any) -> None:
    """What was put there since the last step is what the number of groups is compared with."""
    model, optimizer, control = led(interval=1, gain=2.0)
    with torch.no_grad():
        model[0].weight[4:] = 0
        model[2].weight[2:] = 0
    optimizer.param_groups[1].update({"k": k} if k is not None else {"k": None, "density": 0.5})
    control.step()
    assert optimizer.param_groups[1]["lam"].tolist() == [4.0, 1.0]
    assert optimizer.param_groups[1]["k"].tolist() == [3.0, 2.0]


def test_the_end_leaves_frozen_scopes_alone() -> None:
    model, optimizer, control = led(ramp=2)
    train(model, optimizer, control, range(2))
    model[2].weight.requires_grad_(False)
    before = model[2].weight.clone()
    control.finish()
    assert control.finished and torch.equal(model[2].weight, before)
    assert control.report()[0].kept == 3


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("at", [2, 5, 9])
def test_resumes_exactly(name: str, at: int) -> None:
    options: dict[str, Any] = {
        "warmup": 1,
        "ramp": 4,
        "hold": 2,
        "interval": 2,
        "lam_start": 0.1,
    }
    model, optimizer, control = led(name, **options)
    train(model, optimizer, control, range(at))
    buffer = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict(), control.state_dict()), buffer)
    train(model, optimizer, control, range(at, at + 4))
    buffer.seek(0)
    states = torch.load(buffer, weights_only=True)
    other, resumed, again = led(name, **options)
    for part, state in zip((other, resumed, again), states, strict=True):
        part.load_state_dict(state)
    train(other, resumed, again, range(at, at + 4))
    assert same(model, other)
    assert str(control.state_dict()) == str(again.state_dict())
    assert control.report() == again.report() and again.finished == control.finished


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copies(how: str) -> None:
    run = led(ramp=4, hold=2, interval=2)
    train(*run, range(3))
    twin = copy.deepcopy(run) if how == "deepcopy" else pickle.loads(pickle.dumps(run))
    train(*run, range(3, 8))
    train(*twin, range(3, 8))
    assert same(run[0], twin[0]) and twin[2].finished


BAD: list[tuple[dict[str, Any], str]] = [
    ({"warmup": -1}, "warmup must not be less than 0"),
    ({"hold": -1}, "hold must not be less than 0"),
    ({"interval": 0}, "interval must not be less than 1"),
    ({"k_curve": "square"}, "k_curve must be"),
    ({"lam_curve": "cubic"}, "lam_curve must be"),
    ({"lam_start": 0.0}, "lam_start must be positive"),
    ({"gain": 1.0}, "gain must be more than 1"),
    ({"bounds": (2.0, 3.0)}, "bounds must be"),
]


@pytest.mark.parametrize(("options", "match"), BAD, ids=str)
def test_bad_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        led(**options)


def test_bad_optimizers_and_states() -> None:
    model, _, control = led()
    with pytest.raises(TypeError, match="optimizer must be a ProxSGD"):
        SparsityController(torch.optim.SGD(model.parameters()))  # type: ignore[arg-type]
    plain = ProxSGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizer must have a parameter group with k or density"):
        SparsityController(plain)
    other = SparsityController(ProxSGD([model[0].weight], lr=0.1, k=2, lam=1.0))
    with pytest.raises(ValueError, match="state_dict must be of the parameter groups"):
        other.load_state_dict(control.state_dict())


@pytest.mark.skipif(EMULATED, reason="about training, not about an engine")
@pytest.mark.parametrize("host", ["ProxSGD", "LatentProx"])
@pytest.mark.parametrize("debiased", [False, True])
def test_toy_problem_ends_with_the_true_groups(host: str, debiased: bool) -> None:
    """From mini-batches. The plain penalty needs the end for it, and is not corrected: to get down to k
    groups λ would have to grow until it spoils the weights."""
    w, batch = toy(0)
    weight = nn.Parameter(0.1 * torch.randn(w.shape, dtype=DOUBLE))
    groups: Any = [{"params": [weight], "k": 12, "lam": 0.3, "debiased": debiased}]
    optimizer: Any
    if host == "ProxSGD":
        optimizer = ProxSGD(groups, lr=0.02)
    else:
        optimizer = LatentProx(torch.optim.SGD(groups, lr=0.02))
    interval = 25 if debiased else None
    control = SparsityController(optimizer, warmup=100, ramp=300, hold=200, interval=interval)
    for _ in range(800):
        x, y = batch()
        optimizer.zero_grad()
        ((x @ weight.reshape(-1) - y).square().mean() / 2).backward()
        optimizer.step()
        control.step()
    (row,) = control.report()
    assert (row.groups, row.requested, row.kept) == (60, 12.0, 12)
    assert torch.equal((weight != 0).any(1), (w != 0).any(1))
    assert float((weight - w).detach().norm() / w.norm()) < 0.1


def test_documentation() -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(SparsityController, globs={})
    assert len(example.examples) > 8
    assert doctest.DocTestRunner().run(example).failed == 0
