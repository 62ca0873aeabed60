"""Tightness: the theory of random nets, nets that lose nothing, and the Jacobian written out."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import fusee
import pytest
import torch
from torch import Tensor, nn

from tests.bounds.networks import convolutional, fully_connected, settled


def tau(d: int) -> float:
    """What a hidden layer of d units leaves, of random normal weights."""
    return math.sqrt(math.pi) * math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2)) / d


def ratio_of_means(samples: int, *widths: int) -> float:
    """The mean radius that is needed over the mean one of the bounds."""
    needed = bound = 0.0
    for _ in range(samples):
        weights = [torch.randn(n, k, dtype=torch.float64) for k, n in itertools.pairwise(widths)]
        radius = torch.ones(widths[0], dtype=torch.float64)
        outer = radius
        for weight in weights:
            outer = outer @ weight.abs().T
        needed += (fusee.linear_tightness(weights, radius) * outer).sum().item()
        bound += outer.sum().item()
    return needed / bound


# --- theory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("d", "value"), [(64, 0.15605), (512, 0.05536)])
def test_two_random_layers(d: int, value: float) -> None:
    torch.manual_seed(0)
    assert tau(d) == pytest.approx(value, rel=1e-3)
    assert ratio_of_means(40, 200, d, 200) == pytest.approx(tau(d), rel=0.02)


def test_many_random_layers() -> None:
    torch.manual_seed(1)
    expected = tau(32) * tau(64) * tau(48)
    assert ratio_of_means(60, 100, 32, 64, 48, 100) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("hidden", [1, 3])
def test_relu_leaves_more(hidden: int) -> None:
    """With half of the units of each layer active, it is as if a layer had half as many."""
    torch.manual_seed(2)
    d, relu, linear = 256, [], []
    for _ in range(6):
        model = fully_connected(*[d] * (hidden + 1), 10).double()
        for layer in model[::2]:
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        x, y = torch.randn(8, d).double(), torch.randint(10, (8,))
        relu.append(fusee.propagation_tightness(model, x - 0.01, x + 0.01, y).nanmean())
        without = nn.Sequential(*(layer for layer in model if isinstance(layer, nn.Linear)))
        linear.append(fusee.propagation_tightness(without, x - 0.01, x + 0.01, y).nanmean())
    assert (sum(linear) / 6).item() == pytest.approx(tau(d) ** hidden, rel=0.1)  # type: ignore[union-attr]
    assert (sum(relu) / sum(linear)).item() == pytest.approx(2 ** (hidden / 2), rel=0.08)  # type: ignore[union-attr]


@pytest.mark.parametrize("relu", [False, True])
def test_networks_of_coherent_signs_lose_nothing(relu: bool) -> None:
    """With a sign for each unit such that all weights have the sign of their ends' product."""
    torch.manual_seed(3)
    widths = (7, 12, 9, 4)
    signs = [torch.randint(2, (n,)) * 2.0 - 1 for n in widths]
    # All outputs but the target's have one sign: their differences are coherent too.
    signs[-1] = torch.tensor([-1.0, 1.0, 1.0, 1.0])
    model = fully_connected(*widths)
    for layer, before, after in zip(model[::2], signs, signs[1:], strict=False):
        assert isinstance(layer, nn.Linear)
        weight = torch.randint(1, 8, layer.weight.shape) * torch.outer(after, before)
        layer.weight.data.copy_(weight)  # whole numbers, so that nothing is rounded
    if not relu:
        model = nn.Sequential(*(layer for layer in model if isinstance(layer, nn.Linear)))
    x = torch.randint(-8, 9, (20, 7)) / 8
    y = torch.zeros(20, dtype=torch.int64)
    tightness = fusee.propagation_tightness(model, x - 0.25, x + 0.25, y)
    assert bool((tightness[:, 1:] == 1).all())
    weights = [layer.weight for layer in model if isinstance(layer, nn.Linear)]
    assert bool((fusee.linear_tightness(weights, torch.ones(7)) == 1).all())


def test_two_layers_lose_nothing_only_so() -> None:
    """Of all signs of two 2 x 2 matrices, 32 of 256 are exact: those of coherent signs."""
    exact = 0
    for signs in itertools.product((-1.0, 1.0), repeat=8):
        one, two = torch.tensor(signs).view(2, 2, 2)
        is_exact = bool((fusee.linear_tightness([one, two], torch.ones(2)) == 1).all())
        a = one[:, 0]
        coherent = all(
            torch.equal(matrix, torch.outer(row, column))
            for matrix, row, column in (
                (one, a, one[0] * a[0]),
                (two, two[:, 0] * a[0], a),
            )
        )
        assert is_exact == coherent
        exact += is_exact
    assert exact == 32


# --- the formula ------------------------------------------------------------------------------------


def written_out(model: nn.Module, x: Tensor, delta: Tensor, y: int, layers: list[Any]) -> Tensor:
    """For one sample: the Jacobian by torch.func, and the bound's radius layer by layer."""
    jacobian = torch.func.jacrev(lambda t: model(t[None])[0])(x)
    differences = (jacobian - jacobian[y]).flatten(1)
    needed = differences.abs() @ delta.flatten()
    radius, point = delta[None], x[None]
    for layer in layers[:-1]:
        if isinstance(layer, nn.ReLU):
            radius = radius * (point >= 0)
        elif isinstance(layer, nn.BatchNorm2d):
            scale = (layer.weight / (layer.running_var + layer.eps).sqrt()).abs()  # type: ignore[operator]
            radius = radius * scale.view(1, -1, 1, 1)
        elif isinstance(layer, (nn.Linear, nn.Conv2d)):
            magnitude = copy.deepcopy(layer)
            magnitude.weight.data.abs_()
            magnitude.bias = None
            radius = magnitude(radius)
        else:
            radius = layer(radius)
        point = layer(point)
    weight = layers[-1].weight
    bound = (weight - weight[y]).abs() @ radius.flatten()
    tightness = needed.clamp(min=1e-8) / bound.clamp(min=1e-8)
    tightness[y] = torch.nan
    return tightness


def plain_convolutional() -> nn.Sequential:
    return nn.Sequential(*(m for m in convolutional() if not isinstance(m, nn.LeakyReLU)))


@pytest.mark.parametrize(
    ("make", "shape"),
    [(lambda: fully_connected(9, 16, 12, 5), (9,)), (plain_convolutional, (2, 8, 8))],
    ids=["fully connected", "convolutional"],
)
def test_against_the_formula(make: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(4)
    model = settled(make(), *shape).double()
    x, y = torch.rand(4, *shape).double(), torch.tensor([0, 3, 1, 4])
    lower, upper = (x - 0.1 * torch.rand_like(x)).clamp(min=0), (x + 0.1).clamp(max=1)
    made = fusee.propagation_tightness(model, lower, upper, y, x)
    with torch.no_grad():
        expected = torch.stack(
            [
                written_out(model, x[i], (upper - lower)[i] / 2, int(y[i]), list(model))
                for i in range(4)
            ]
        )
    torch.testing.assert_close(made, expected, equal_nan=True)
    assert bool(made.isnan().sum(1).eq(1).all()) and made.nanmean() < 0.9
    centers = fusee.propagation_tightness(model, lower, upper, y)
    same = fusee.propagation_tightness(model, lower, upper, y, (lower + upper) / 2)
    torch.testing.assert_close(centers, same, equal_nan=True)


def test_it_is_the_tightness_of_small_boxes() -> None:
    """Where no unit changes its side, the bounds' width over that of the outputs met at the corners."""
    torch.manual_seed(5)
    model = fully_connected(6, 16, 16, 3).double()
    x, y = torch.rand(3, 6).double(), torch.tensor([0, 1, 2])
    eps = 1e-6
    tightness = fusee.propagation_tightness(model, x - eps, x + eps, y)
    net = fusee.nn.IntervalModel(model)
    bound = net.margins(x - eps, x + eps, y) - net.margins(x, x, y)
    corners = torch.tensor(list(itertools.product((-eps, eps), repeat=6))).double()
    outputs = model(x + corners[:, None])
    margins = outputs - outputs.gather(2, y.expand(64, 3).unsqueeze(2))
    needed = (margins.amax(0) - margins.amin(0)) / 2
    torch.testing.assert_close(tightness.nan_to_num(1.0) * bound, needed, rtol=1e-4, atol=1e-12)


def test_a_unit_at_zero_is_kept() -> None:
    """As the authors have it; the derivative of torch's ReLU there is zero."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        model[2].weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    x = torch.ones(1, 2)
    made = fusee.propagation_tightness(model, x - 0.125, x + 0.125, torch.tensor([1]))
    assert made[0, 0] == 0.5


class Block(nn.Module):
    """A sum of two branches; its last layer is no linear one."""

    def __init__(self, head: bool) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.has_head = head

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.one(x)) + self.two(x)
        return self.head(x) if self.has_head else x


@pytest.mark.parametrize("head", [False, True])
def test_sums(head: bool) -> None:
    torch.manual_seed(6)
    model = Block(head).double()
    x, y = torch.rand(5, 4).double(), torch.tensor([0, 1, 2, 3, 0])
    made = fusee.propagation_tightness(model, x - 0.1, x + 0.1, y)
    delta = torch.full((4,), 0.1, dtype=torch.float64)
    for i in range(5):
        active = (model.one(x[i]) >= 0).double().unsqueeze(1)
        jacobian = active * model.one.weight + model.two.weight
        radius = (active * model.one.weight.abs() + model.two.weight.abs()) @ delta
        if head:
            jacobian = model.head.weight @ jacobian
            bound = (model.head.weight - model.head.weight[y[i]]).abs() @ radius
        else:
            bound = radius + radius[y[i]]
        expected = ((jacobian - jacobian[y[i]]).abs() @ delta) / bound
        expected[y[i]] = torch.nan
        torch.testing.assert_close(made[i], expected.detach(), equal_nan=True)


def test_gradient_and_what_is_left_alone() -> None:
    """A step along the gradient raises tightness as it says; nothing of the model changes before."""
    torch.manual_seed(7)
    model = settled(plain_convolutional(), 2, 8, 8).double().train()
    x, y = torch.rand(3, 2, 8, 8).double(), torch.tensor([0, 3, 1])
    before = copy.deepcopy(model.state_dict())
    plain = fusee.propagation_tightness(model.eval(), x - 0.1, x + 0.1, y)
    model.train()
    made = fusee.propagation_tightness(model, x - 0.1, x + 0.1, y, create_graph=True)
    torch.testing.assert_close(plain, made.detach(), equal_nan=True)
    assert not plain.requires_grad and model.training
    assert all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    made.nanmean().backward()
    weight = model[3].weight
    with torch.no_grad():
        weight += 1e-6 * weight.grad.sign()
    after = fusee.propagation_tightness(model, x - 0.1, x + 0.1, y)
    gained = after.nanmean() - plain.nanmean()
    torch.testing.assert_close(gained, 1e-6 * weight.grad.abs().sum(), rtol=1e-3, atol=0)


def test_values_at_the_limits() -> None:
    """Points have the ratio of two floors; a bound of zero needs nothing."""
    model = fully_connected(3, 4, 2)
    x, y = torch.rand(2, 3), torch.tensor([0, 1])
    assert fusee.propagation_tightness(model, x, x, y).nanmean() == 1
    low, x_low = copy.deepcopy(model).half(), x.half()
    assert fusee.propagation_tightness(low, x_low, x_low, y).nanmean() == 1
    weights = [torch.randn(4, 3), torch.randn(2, 4)]
    assert bool((fusee.linear_tightness(weights, torch.zeros(5, 3)) == 1).all())
    net = fusee.nn.IntervalModel(model)
    one, two = (fusee.propagation_tightness(m, x - 0.1, x + 0.1, y) for m in (model, net))
    torch.testing.assert_close(one, two, equal_nan=True, rtol=0, atol=0)


def test_gradients_of_the_linear_one() -> None:
    torch.manual_seed(8)
    leaves = [
        torch.randn(4, 3, dtype=torch.float64, requires_grad=True),
        torch.randn(2, 4, dtype=torch.float64, requires_grad=True),
        torch.rand(5, 3, dtype=torch.float64, requires_grad=True),
    ]
    assert torch.autograd.gradcheck(
        lambda one, two, radius: fusee.linear_tightness([one, two], radius), leaves
    )


# --- errors -----------------------------------------------------------------------------------------

MODEL, X, Y = fully_connected(3, 4, 2), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "model must be", ([], X, X, Y)),
        (TypeError, "lower must be a Tensor", (MODEL, 0.0, X, Y)),
        (ValueError, "upper must have the shape of lower", (MODEL, X, X[0], Y)),
        (ValueError, "lower must not be above upper", (MODEL, X + 1, X, Y)),
        (ValueError, "input must have the shape of lower", (MODEL, X, X, Y, X[0])),
        (TypeError, "target must have dtype int64", (MODEL, X, X, X[:, 0])),
        (ValueError, "target must have shape", (MODEL, X, X, Y[:1])),
        (IndexError, "target must be in", (MODEL, X, X, Y + 2)),
        (ValueError, "model must return", (nn.Sequential(nn.Flatten(0)), X, X, Y)),
        (NotImplementedError, "no local rule", (nn.Sequential(nn.Tanh()), X, X, Y)),
        (NotImplementedError, "no local rule", (nn.Sequential(nn.LeakyReLU()), X, X, Y)),
        (NotImplementedError, "no local rule", (nn.Sequential(nn.MaxPool1d(1)), X, X, Y)),
        (NotImplementedError, "no interval rule", (nn.Sequential(nn.Softmax(1)), X, X, Y)),
    ],
)
def test_errors(error: type[Exception], match: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(error, match=match):
        fusee.propagation_tightness(*arguments)


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "radius must be a Tensor", ([X], 1.0)),
        (ValueError, "weights must have a matrix", ([], X)),
        (TypeError, r"weights\[0\] must be a Tensor", ([1.0], X)),
        (ValueError, r"weights\[1\] must be \(out, 2\)", ([X, X], X)),
        (TypeError, r"weights\[0\] must have the dtype of radius", ([X.double()], X)),
        (ValueError, "radius must be finite and not negative", ([X], X - 1)),
        (ValueError, r"must be \(out, None\)", ([X], torch.tensor(1.0))),
    ],
)
def test_errors_of_the_linear_one(
    error: type[Exception], match: str, arguments: tuple[Any, ...]
) -> None:
    with pytest.raises(error, match=match):
        fusee.linear_tightness(*arguments)


def test_a_single_layer_is_tight() -> None:
    """A layer that is the model itself; what is left of each difference is what it needs."""
    x, target = torch.rand(3, 4), torch.tensor([0, 1, 2])
    made = fusee.propagation_tightness(torch.nn.Linear(4, 3), x - 0.1, x + 0.1, target)
    others = torch.arange(3) != target[:, None]
    torch.testing.assert_close(made[others], torch.ones(6))
