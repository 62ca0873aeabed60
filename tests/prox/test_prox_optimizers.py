"""ProxSGD and ProxAdamW as optimisers of torch: options, hooks, closures, schedules, bad input."""

from __future__ import annotations

import copy
import doctest
import math
from typing import Any

import fusee
import pytest
import torch
from fusee.optim import ProxAdamW, ProxSGD
from fusee.prox.prox_host import ProxHost
from fusee.prox.prox_optimizers import without_hooks
from fusee.prox.scope_plan import ScopePlan
from torch import Tensor, nn

from tests.prox.hosts import (
    DOUBLE,
    backward,
    error,
    joined_ids,
    network,
    param_groups,
    same,
    slow_prox_,
    table_of,
    toy,
    zero_rows,
)

EMULATED = fusee.engine() == "emulated"


def test_one_call_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    of_plan = ScopePlan.prox_

    def counting(self: ScopePlan, *args: Any, **kwargs: Any) -> Tensor:
        calls.append((len(self.tensors), kwargs["debiased"]))
        return of_plan(self, *args, **kwargs)

    monkeypatch.setattr(ScopePlan, "prox_", counting)
    model = network()
    weights, biases = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    options: Any = {"lr": 0.1, "lam": 0.1}
    optimizer = ProxSGD(
        [{"params": weights, "k": 2}, {"params": biases, "density": 0.5}], **options
    )
    backward(model, 0)
    optimizer.step()
    assert calls == [(4, False)]
    optimizer.param_groups[1]["debiased"] = True
    optimizer.step()
    assert sorted(calls[1:]) == [(2, False), (2, True)]


def test_options_of_a_group_go_before_the_defaults() -> None:
    model = network()
    groups: list[dict[str, Any]] = [
        {"params": [model[0].weight]},
        {"params": [model[2].weight], "k": 3, "lam": 0.1, "scope": "group"},
        {"params": [model[0].bias], "k": None},
        {"params": [model[2].bias], "factor": 0.5, "dim": ()},
    ]
    optimizer = ProxSGD(groups, lr=0.5, density=0.5, lam=0.2)
    rows = optimizer.report()
    assert [(r.param_group, r.groups, r.requested, r.factor) for r in rows] == [
        (0, 6, 3.0, 0.1),
        (1, 4, 3.0, 0.05),
        (3, 1, 1.0, 0.5),
    ]


def test_names_in_the_report() -> None:
    model = network()
    named = [(n, p) for n, p in model.named_parameters() if p.dim() > 1]
    rows = ProxSGD(named, lr=0.1, k=2, lam=1.0).report()
    assert [r.params for r in rows] == [("0.weight",), ("2.weight",)]
    rows = ProxSGD(named, lr=0.1, k=2, lam=1.0, scope="group").report()
    assert [r.params for r in rows] == [("0.weight", "2.weight")]


@pytest.mark.parametrize("tensors", [False, True])
def test_numbers_may_change(tensors: bool) -> None:
    """k, density, lam and lr are read at every step."""
    model, twin = network(), network()
    number: Any = (lambda x: torch.tensor(x, dtype=DOUBLE)) if tensors else (lambda x: x)
    optimizer = ProxSGD([model[0].weight], lr=number(0.1), k=number(2.0), lam=number(0.5))
    plain = torch.optim.SGD([twin[0].weight], lr=0.1)
    course = [(0.1, 2.0, 0.5), (0.3, 2.0, 0.5), (0.3, 4.5, 0.5), (0.3, 4.5, 2.0)]
    for step, (lr, k, lam) in enumerate(course):
        for name, value in (("lr", lr), ("k", k), ("lam", lam)):
            if tensors:
                optimizer.param_groups[0][name].fill_(value)
            else:
                optimizer.param_groups[0][name] = value
        plain.param_groups[0]["lr"] = lr
        backward(model, step)
        backward(twin, step)
        optimizer.step()
        plain.step()
        slow_prox_([twin[0].weight], joined_ids([twin[0].weight], 0), k, lr * lam)
        assert error(model, twin) < 1e-9
    optimizer.param_groups[0].update(k=None, density=1 / 6)
    backward(model, 9)
    optimizer.step()
    assert optimizer.report()[0].requested == 1


@pytest.mark.filterwarnings("error")
def test_learning_rate_schedulers() -> None:
    model = network()
    optimizer = ProxSGD([model[0].weight], lr=0.4, k=2, lam=0.5, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for step in range(2):
        backward(model, step)
        optimizer.step()
        scheduler.step()
    assert optimizer.report()[0].factor == 0.05


def test_scopes_without_gradients_are_left_alone() -> None:
    model = network()
    optimizer = ProxSGD([model[0].weight, model[2].weight], lr=0.1, k=1, lam=1.0)
    before = model[2].weight.detach().clone()
    backward(model, 0)
    model[2].weight.grad = None
    optimizer.step()
    assert torch.equal(model[2].weight, before)
    assert zero_rows(model[0].weight) > 0 or optimizer.kept[0] == 6
    model[0].weight.grad = None
    model[2].weight.requires_grad_(False)
    start = copy.deepcopy(model)
    optimizer.step()
    assert same(model, start)
    assert [int(c) for c in optimizer.kept] == [6 - zero_rows(model[0].weight), 4]


@pytest.mark.parametrize("kind", [ProxSGD, ProxAdamW])
def test_in_a_scope_with_a_gradient_all_take_part(kind: type[ProxHost]) -> None:
    model = network()
    options: Any = {"lr": 0.1, "k": 1, "lam": 50.0, "scope": "group", "debiased": True}
    optimizer = kind([model[0].weight, model[2].weight], **options)
    backward(model, 0)
    model[2].weight.grad = None
    optimizer.step()
    assert zero_rows(model[0].weight) + zero_rows(model[2].weight) == 9


def test_closure() -> None:
    model, twin = network(), network()
    optimizer = ProxSGD([model[0].weight], lr=0.1, k=2, lam=0.5)
    by_hand = ProxSGD([twin[0].weight], lr=0.1, k=2, lam=0.5)
    for step in range(2):
        loss = optimizer.step(lambda step=step: backward(model, step))
        assert loss == backward(twin, step)
        by_hand.step()
    assert same(model, twin)


def test_hooks_run_once_around_the_whole_step() -> None:
    """torch wraps the step of every class that was used: of SGD, and of ours."""
    model = network()
    torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = ProxSGD([model[0].weight], lr=0.1, k=2, lam=50.0, debiased=True)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(zero_rows(model[0].weight)))
    optimizer.register_step_post_hook(lambda *_: seen.append(zero_rows(model[0].weight)))
    backward(model, 0)
    optimizer.step()
    assert seen == [0, 4]
    assert getattr(torch.optim.SGD.step, "hooked", False)
    assert not getattr(without_hooks(torch.optim.SGD.step), "hooked", False)


@pytest.mark.parametrize("kind", [ProxSGD, ProxAdamW])
@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler(kind: type[ProxHost], fused: bool) -> None:
    """A step with infinities changes nothing, also where the scaler leaves it to the fused step."""
    model, twin = network(dtype=torch.float32), network(dtype=torch.float32)
    options: Any = {"lr": 0.1, "k": 2, "lam": 0.5, "fused": fused}
    optimizer, plain = kind([model[0].weight], **options), kind([twin[0].weight], **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    start = copy.deepcopy(model)
    backward(model, 0, scale=scaler.scale(torch.ones(())).item())
    model[0].weight.grad[1, 2] = math.inf
    scaler.step(optimizer)
    scaler.update()
    assert same(model, start) and scaler.get_scale() == 4.0
    for step in range(2):
        backward(model, step, scale=scaler.scale(torch.ones(())).item())
        scaler.step(optimizer)
        scaler.update()
        backward(twin, step)
        plain.step()
    assert error(model, twin) < 1e-6


def test_reports_do_not_disturb_a_backward_pass() -> None:
    model = network()
    optimizer = ProxSGD([model[0].weight], lr=0.1, k=2, lam=50.0, debiased=True)
    loss = model(torch.ones(2, 5, dtype=DOUBLE)).square().sum()
    optimizer.report()
    loss.backward()
    optimizer.step()
    assert optimizer.report()[0].kept == 2


def test_weights_may_change() -> None:
    weight = nn.Parameter(torch.ones(3, 2))
    optimizer = ProxSGD([weight], lr=0.1, k=2, lam=1.0, weights=torch.ones(3))
    assert optimizer.report()[0].kept == 3
    optimizer.param_groups[0]["weights"][1] = 0
    assert optimizer.report()[0].kept == 2
    optimizer.param_groups[0]["weights"] = torch.tensor([0.0, 0.0, 1.0])
    assert optimizer.report()[0].kept == 1


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_parameters_that_are_there_twice() -> None:
    a, b = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3))
    options: Any = {"lr": 0.1, "k": 2, "lam": 1.0}
    with pytest.raises(
        ValueError, match=r"must be different, got params\[2\] of parameter group 0, "
    ):
        ProxSGD([a, b, a], **options)
    ProxSGD([a, b, a], lr=0.1)  # without the operator as torch
    transposed = nn.Parameter(a.detach().t())
    with pytest.raises(ValueError, match=r"params must not share memory, got 'a' .* and 't' of"):
        ProxSGD([("b", b), ("a", a), ("t", transposed)], **options)
    joint = torch.ones(8, 6)
    rows = [nn.Parameter(joint[:4]), nn.Parameter(joint[4:])]
    optimizer = ProxSGD([{"params": rows[:1]}, {"params": rows[1:]}], **options)
    with pytest.raises(ValueError, match="params must not share memory"):
        optimizer.add_param_group({"params": [nn.Parameter(joint[3:5])]})
    assert len(optimizer.param_groups) == 2
    columns = [nn.Parameter(joint[:, :3]), nn.Parameter(joint[:, 3:])]  # interleaved
    ProxSGD(columns, **options)
    a.grad = torch.ones(4, 3)
    late = ProxSGD([{"params": [a]}, {"params": [transposed], "k": None}], **options)
    late.param_groups[1]["k"] = 1
    with pytest.raises(ValueError, match="params must not share memory"):
        late.step()


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"k": 2, "density": 0.5, "lam": 1.0}, ValueError, "k and density must not be given together"),
    ({"k": 2}, ValueError, "lam must be given with k or density"),
    ({"k": 2, "lam": -0.1}, ValueError, "lam must not be negative, got -0.1"),
    ({"k": 2, "lam": torch.tensor(-0.1)}, ValueError, "lam must be not negative"),
    ({"k": torch.tensor(math.nan), "lam": 1.0}, ValueError, "k must be not NaN"),
    ({"k": torch.tensor([1.0, math.nan]), "lam": 1.0}, ValueError, "k must be not NaN"),
    ({"k": 2, "lam": torch.tensor(math.nan)}, ValueError, "lam must be not negative, got nan"),
    ({"k": 2, "lam": torch.tensor([1, math.nan])}, ValueError, "lam must be not negative"),
    ({"k": 2, "factor": -1.0}, ValueError, "factor must not be negative"),
    ({"k": 2, "lam": "1"}, TypeError, "lam must be a number or a Tensor"),
    ({"k": math.nan, "lam": 1.0}, ValueError, "k must not be NaN"),
    ({"k": True, "lam": 1.0}, TypeError, "k must be a number or a Tensor, got bool"),
    ({"k": torch.ones(3), "lam": 1.0}, ValueError, r"k must have one element, or one for each of"),
    ({"density": 0.0, "lam": 1.0}, ValueError, r"density must be in \(0, 1\], got 0.0"),
    ({"density": 1.5, "lam": 1.0}, ValueError, r"density must be in \(0, 1\], got 1.5"),
    ({"density": "half", "lam": 1.0}, TypeError, "density must be a number, got str"),
    ({"k": 2, "lam": 1.0, "scope": "layer"}, ValueError, "scope must be 'tensor' or 'group'"),
    ({"k": 2, "lam": 1.0, "dim": 2}, IndexError, "dim must be in"),
    ({"k": 2, "lam": 1.0, "weights": "sizes"}, ValueError, "weights must be 'size'"),
    (
        {"k": 2, "lam": 1.0, "weights": torch.ones(6)},
        ValueError,
        "weights must not be a tensor for",
    ),
    ({"k": 2, "lam": 1.0, "groups": [0, 1]}, TypeError, "groups must be a GroupTable, got list"),
    ({"k": 2, "lam": 1.0, "differentiable": True}, TypeError, "differentiable"),
]


@pytest.mark.parametrize(("options", "kind", "match"), BAD, ids=lambda x: str(x)[:40])
def test_bad_options(options: dict[str, Any], kind: type[Exception], match: str) -> None:
    model = network()
    with pytest.raises(kind, match=match):
        ProxSGD([model[0].weight, model[2].weight], lr=0.1, **options)


def test_bad_tables_and_parameters() -> None:
    model = network()
    table, weight = table_of(model), model[0].weight
    with pytest.raises(ValueError, match=r"params must have the shapes .* of groups"):
        ProxSGD([weight], lr=0.1, k=2, lam=1.0, groups=table)
    with pytest.raises(ValueError, match="dim must not be given together with groups"):
        ProxSGD([weight, model[2].weight], lr=0.1, k=2, lam=1.0, groups=table, dim=1)
    with pytest.raises(ValueError, match=r"weights must have shape \(6,\)"):
        ProxSGD([weight], lr=0.1, k=2, lam=1.0, weights=torch.ones(5))
    number = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"params\[0\] must have dtype"):
        ProxSGD([number], lr=0.1, k=2, lam=1.0)
    ProxSGD([number], lr=0.1)


def test_what_a_schedule_spoils_raises_before_the_step() -> None:
    model = network()
    optimizer = ProxSGD([model[0].weight], lr=0.1, k=2, lam=1.0)
    backward(model, 0)
    optimizer.param_groups[0]["lam"] = -1.0
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="lam must not be negative"):
        optimizer.step()
    assert same(model, before)


@pytest.mark.skipif(EMULATED, reason="about training, not about an engine")
def test_debiased_reaches_the_true_groups_from_mini_batches() -> None:
    w, batch = toy(0)
    weight = nn.Parameter(0.1 * torch.randn(w.shape, dtype=DOUBLE))
    optimizer = ProxSGD([weight], lr=0.02, k=12, lam=3.0, debiased=True)
    for _ in range(800):
        x, y = batch()
        optimizer.zero_grad()
        ((x @ weight.reshape(-1) - y).square().mean() / 2).backward()
        optimizer.step()
    assert int(optimizer.kept[0]) == 12
    assert torch.equal((weight != 0).any(1), (w != 0).any(1))
    assert float((weight - w).detach().norm() / w.norm()) < 0.1


@pytest.mark.skipif(EMULATED, reason="the tracing of a step does not depend on its engine")
@pytest.mark.parametrize("way", ["debiased", "table"])
def test_compiled_step(way: str) -> None:
    model, twin = network(), network()
    optimizer, eager = (ProxSGD(param_groups(m, way), lr=0.1, momentum=0.9) for m in (model, twin))
    compiled = torch.compile(optimizer.step)
    for step in range(4):
        if step == 2:
            optimizer.param_groups[0]["lam"] = eager.param_groups[0]["lam"] = 5.0
        backward(model, step)
        backward(twin, step)
        compiled()
        eager.step()
        assert error(model, twin) < 1e-12
        assert [int(c) for c in optimizer.kept] == [int(c) for c in eager.kept]


@pytest.mark.cuda_only
@pytest.mark.parametrize("kind", [ProxSGD, ProxAdamW])
def test_captured_step(kind: type[ProxHost], device: str) -> None:
    """With tensors for the numbers a step is captured, and follows them. Of the bases SGD can only be
    captured where it is fused, and AdamW where it is capturable."""
    model, twin = network().to(device), network().to(device)
    numbers = {"lr": 0.125, "k": 3.0, "lam": 0.25}  # exact in float32
    given = {name: torch.tensor(value, device=device) for name, value in numbers.items()}
    options: Any = {"capturable": True} if kind is ProxAdamW else {"fused": True}
    optimizer = kind([model[0].weight, model[2].weight], **given, **options)
    eager = kind([twin[0].weight, twin[2].weight], **numbers, **options)
    grads = []
    for step in range(8):
        backward(twin.cpu(), step)
        grads.append([p.grad.to(device) for p in twin.parameters()])
    twin.to(device)
    for p, g in zip(model.parameters(), grads[0], strict=True):
        p.grad = g.clone()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    given["lam"].fill_(1.0)
    given["k"].fill_(1.0)
    graph.replay()
    for step in range(3):
        for p, g in zip(twin.parameters(), grads[0], strict=True):
            p.grad = g.clone()
        if step == 2:
            eager.param_groups[0].update(lam=1.0, k=1.0)
        eager.step()
    assert error(model, twin) < 1e-9


@pytest.mark.parametrize("documented", [ProxSGD, ProxAdamW, ProxHost.report])
def test_documentation(documented: object) -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(documented, globs={})
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0
