"""The attack: it finds what there is to find, stays in its box, and leaves the model alone."""

from __future__ import annotations

import copy
from typing import Any

import fusee
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.bounds.networks import convolutional, fully_connected, settled


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none").detach()


@pytest.mark.parametrize("step_size", [None, 0.03])
def test_the_worst_corner_of_a_linear_model(step_size: float | None) -> None:
    """Of two classes the loss is largest where each input lies against its weight."""
    torch.manual_seed(0)
    model = nn.Linear(12, 2).double()
    x, y = torch.rand(9, 12).double(), torch.randint(2, (9,))
    lower, upper = x - 0.1 * torch.rand(9, 12), x + 0.1 * torch.rand(9, 12)
    found = fusee.nn.pgd_attack(model, x, y, lower, upper, step_size=step_size)
    slope = model.weight[1 - y] - model.weight[y]
    assert torch.equal(found, torch.where(slope > 0, upper, lower))


def test_inside_and_never_better_than_the_input() -> None:
    torch.manual_seed(1)
    model = fully_connected(10, 32, 32, 5)
    x, y = torch.rand(40, 10), torch.randint(5, (40,))
    lower, upper = (x - 0.2).clamp(min=0), (x + 0.2).clamp(max=1)
    generator = torch.Generator().manual_seed(2)
    found = fusee.nn.pgd_attack(model, x, y, lower, upper, generator=generator)
    assert bool((lower <= found).all()) and bool((found <= upper).all())
    assert not found.requires_grad
    random = torch.stack(
        [losses(model, lower + torch.rand_like(x) * (upper - lower), y) for _ in range(500)]
    )
    at_found = losses(model, found, y)
    assert bool((at_found >= losses(model, x, y)).all())
    assert bool((at_found >= random.amax(0)).float().mean() > 0.95)
    more = fusee.nn.pgd_attack(
        model, x, y, lower, upper, restarts=4, generator=generator.manual_seed(2)
    )
    at_more = losses(model, more, y)
    assert bool((at_more >= at_found - 1e-6).all()) and bool((at_more > at_found + 1e-6).any())
    state = torch.get_rng_state()
    again = fusee.nn.pgd_attack(model, x, y, lower, upper, generator=generator.manual_seed(2))
    assert torch.equal(again, found) and torch.equal(torch.get_rng_state(), state)


def test_an_input_at_the_worst_point_is_returned() -> None:
    """Whatever the steps, the largest loss that was met counts; what is outside is moved in."""
    model = nn.Linear(1, 2)
    nn.init.zeros_(model.bias)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0], [0.0]]))
    x, y = torch.tensor([[-1.0]]), torch.tensor([0])
    found = fusee.nn.pgd_attack(model, x, y, torch.tensor([[0.25]]), torch.tensor([[1.0]]), steps=1)
    assert found.item() == 0.25


def test_the_model_is_left_alone() -> None:
    torch.manual_seed(3)
    model = settled(convolutional(), 2, 8, 8).train()
    model.leaky.eval()  # type: ignore[union-attr]
    x, y = torch.rand(6, 2, 8, 8), torch.randint(5, (6,))
    model(x).sum().backward()
    before, grads = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    modes = [module.training for module in model.modules()]
    with torch.no_grad():
        found = fusee.nn.pgd_attack(model, x, y, x - 0.1, x + 0.1, steps=3)
    assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert torch.equal(p.grad, grad)  # type: ignore[arg-type]
    model.eval()
    assert bool((losses(model, found, y) > losses(model, x, y)).all())


def test_the_mode_comes_back_after_an_error() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no")

    model = nn.Sequential(nn.Dropout(), Fails()).train()
    x = torch.rand(1, 2)
    with pytest.raises(RuntimeError, match="no"):
        fusee.nn.pgd_attack(model, x, torch.tensor([0]), x, x)
    assert model.training and model[0].training


def test_frozen_parameters_and_interval_models() -> None:
    torch.manual_seed(4)
    model = fully_connected(4, 8, 3).requires_grad_(False)
    x, y = torch.rand(5, 4), torch.randint(3, (5,))
    runs = [
        fusee.nn.pgd_attack(m, x, y, x - 0.1, x + 0.1, generator=torch.Generator().manual_seed(0))
        for m in (model, fusee.nn.IntervalModel(model))
    ]
    assert torch.equal(*runs)
    empty = fusee.nn.pgd_attack(model, x[:0], y[:0], x[:0], x[:0])
    assert empty.shape == (0, 4)


MODEL, X, Y = nn.Linear(3, 2), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("error", "match", "arguments", "options"),
    [
        (TypeError, "model must be", (abs, X, Y, X, X), {}),
        (TypeError, "input must be a Tensor", (MODEL, [0.0], Y, X, X), {}),
        (ValueError, "lower must have the shape of input", (MODEL, X, Y, X[0], X), {}),
        (TypeError, "upper must have the dtype of lower", (MODEL, X, Y, X, X.double()), {}),
        (ValueError, "lower must not be above upper", (MODEL, X, Y, X + 1, X), {}),
        (TypeError, "target must have dtype int64", (MODEL, X, Y.float(), X, X), {}),
        (ValueError, "target must have shape", (MODEL, X, Y[:1], X, X), {}),
        (IndexError, "target must be in", (MODEL, X, Y + 2, X, X), {}),
        (ValueError, r"model must return \(2, classes\)", (nn.Flatten(0), X, Y, X, X), {}),
        (ValueError, "steps must be positive", (MODEL, X, Y, X, X), {"steps": 0}),
        (TypeError, "restarts must be an int", (MODEL, X, Y, X, X), {"restarts": 1.0}),
        (ValueError, "step_size must be positive", (MODEL, X, Y, X, X), {"step_size": 0}),
        (ValueError, "step_size must be in", (MODEL, X, Y, X, X), {"step_size": -1.0}),
    ],
)
def test_errors(
    error: type[Exception], match: str, arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    with pytest.raises(error, match=match):
        fusee.nn.pgd_attack(*arguments, **options)


def test_a_point_that_is_read_wrong_comes_before_one_of_larger_loss() -> None:
    """Two outputs just below the target's cost more than one just above it."""

    class Table(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            near = torch.tensor([0.0, -0.01, -0.01]), torch.tensor([0.0, 0.1, -3.0])
            return torch.where(x > 0.5, *near) + 0 * x

    x, target = torch.full((8, 1), 0.4), torch.zeros(8, dtype=torch.int64)
    found = fusee.nn.pgd_attack(Table(), x, target, x - 0.4, x + 0.6, restarts=4)
    assert bool((found <= 0.5).all())


def test_a_network_that_writes_to_its_input() -> None:
    """What the loader gave stays as it is."""
    model = torch.nn.Sequential(torch.nn.ReLU(inplace=True), torch.nn.Linear(3, 2))
    x, target = torch.randn(6, 3), torch.randint(2, (6,))
    before = x.clone()
    fusee.nn.pgd_attack(model, x, target, x - 0.1, x + 0.1)
    assert torch.equal(x, before)
    given = (x + 3) / 6
    before = given.clone()
    fusee.nn.certify(model, [(given, target)], 0.1, minimum=-9, maximum=9, progress=False)
    assert torch.equal(given, before)
