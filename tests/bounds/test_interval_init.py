"""Initial weights: their variance, and that a box is as wide after many layers as before."""

from __future__ import annotations

import itertools
import math
from typing import Any

import fusee
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tests.bounds.networks import fully_connected


def radii(model: nn.Module, x: Tensor, eps: float) -> list[float]:
    """The mean radius of the input, and before each ReLU."""
    net = fusee.nn.IntervalModel(model.double())
    made = net.propagate(x - eps, x + eps, before_relu=True)
    return [eps, *(radius.mean().item() for _, radius in made.before_relu)]


def test_a_radius_stays_as_it_is() -> None:
    """It doubles in a layer and is halved in ReLU; with Kaiming's weights it grows by the square root of
    4 n / pi in a layer."""
    torch.manual_seed(0)
    n, x = 512, torch.rand(64, 512, dtype=torch.float64)
    model = fully_connected(*[n] * 5, 10)
    kaiming = fully_connected(*[n] * 5, 10)
    for layer in kaiming[::2]:
        assert isinstance(layer, nn.Linear)
        nn.init.kaiming_normal_(layer.weight)
    fusee.nn.interval_init_(model)
    for layer in (*model[::2], *kaiming[::2]):
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    tight, loose = radii(model, x, 0.01), radii(kaiming, x, 0.01)
    assert tight[1] / tight[0] == pytest.approx(2.0, rel=0.02)
    assert loose[1] / loose[0] == pytest.approx(math.sqrt(4 * n / math.pi), rel=0.02)
    for before, after in itertools.pairwise(tight[1:]):
        assert after / before == pytest.approx(1.0, rel=0.15)
    for before, after in itertools.pairwise(loose[1:]):
        assert after / before > 0.8 * math.sqrt(n / math.pi)


LAYERS = [
    (nn.Linear(300, 200), 300),
    (nn.Conv1d(16, 64, 5), 80),
    (nn.Conv2d(16, 32, (3, 5), groups=4), 60),
    (nn.Conv3d(4, 16, 3), 108),
    (nn.ConvTranspose2d(32, 16, 4, stride=2, groups=2), 16 * 16 / 4),
]


@pytest.mark.parametrize(("layer", "fan_in"), LAYERS, ids=lambda v: type(v).__name__)
def test_variance_of_each_kind(layer: nn.Module, fan_in: float) -> None:
    torch.manual_seed(1)
    bias = layer.bias.clone()  # type: ignore[operator]
    head = nn.Linear(4, 3)
    kept = head.weight.clone()
    fusee.nn.interval_init_(nn.Sequential(layer, nn.ReLU(), nn.Flatten(), head))
    weight: Any = layer.weight
    deviation = math.sqrt(2 * math.pi) / fan_in
    assert weight.std().item() == pytest.approx(deviation, rel=5 / math.sqrt(weight.numel()))
    assert abs(weight.mean().item()) < 5 * deviation / math.sqrt(weight.numel())
    assert torch.equal(layer.bias, bias)  # type: ignore[arg-type]
    assert torch.equal(head.weight, kept)


def test_the_fan_in_of_a_transposed_convolution() -> None:
    """As many weights lead to an output, away from the borders, as are counted."""
    layer = nn.ConvTranspose1d(6, 4, 4, stride=2, groups=2, bias=False)
    nn.init.ones_(layer.weight)
    inner = layer(torch.ones(1, 6, 20))[..., 8:-8]
    assert bool((inner == 3 * 4 / 2).all())


class Branches(nn.Module):
    """Two residual sums: one through ReLU and a view, one in between that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three, self.four, self.last = (
            nn.Linear(200, 200) for _ in range(5)
        )
        self.norm = nn.BatchNorm1d(200)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.one(x) + 1.0)
        x = torch.relu(x + self.two(x)).view(-1, 200)
        x = self.three(x)
        x = self.norm(x.add(1.0))
        x = self.four(x + x)
        return self.last(x)


def test_half_of_the_weights_after_a_sum() -> None:
    torch.manual_seed(2)
    model = fusee.nn.interval_init_(Branches())
    deviations = {
        name: getattr(model, name).weight.std().item() * 200 / math.sqrt(2 * math.pi)
        for name in ("one", "two", "three", "four")
    }
    expected = {"one": 1.0, "two": 1.0, "three": 0.5, "four": 1.0}
    assert deviations == pytest.approx(expected, rel=0.02)
    assert torch.equal(model.norm.weight, torch.ones(200))


def test_seed_and_shared_layers() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(8, 2))
    torch.manual_seed(3)
    assert fusee.nn.interval_init_(model) is model
    first = shared.weight.clone()
    torch.manual_seed(3)
    fusee.nn.interval_init_(model)
    assert torch.equal(shared.weight, first)
    last = nn.Linear(8, 8)
    kept = last.weight.clone()
    fusee.nn.interval_init_(nn.Sequential(last, nn.ReLU(), last))
    assert torch.equal(last.weight, kept)
    fusee.nn.interval_init_(nn.Sequential(nn.ReLU()))


def parametrised() -> nn.Module:
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    return layer


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (parametrised, "1 has a weight that is no parameter"),
        (lambda: nn.LazyLinear(4), "1 is not initialised"),
        (Branching, "could not be traced"),
    ],
)
def test_models_that_cannot_be_drawn(make: Any, match: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), make(), nn.Linear(4, 2))
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match=match):
        fusee.nn.interval_init_(model)
    assert torch.equal(model[0].weight, before)


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        fusee.nn.interval_init_([])  # type: ignore[type-var]
