"""Bounds of whole networks: they contain what the network does, and equal what is computed by hand."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import fusee
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.bounds.networks import Residual, fully_connected, three_networks

NETWORKS = three_networks()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    ("sound", "total"),
    [(False, 2_000), (True, 2_000), pytest.param(True, 1_000_000, marks=pytest.mark.tracing)],
)
def test_sampled_points_lie_within(name: str, sound: bool, total: int) -> None:
    """Points in each network's box, corners among them."""
    model, shape = NETWORKS[name]
    batch = min(total, 20_000)
    generator = torch.Generator().manual_seed(7)
    center = torch.rand(1, *shape, generator=generator)
    radius = 0.2 * torch.rand(1, *shape, generator=generator)
    with torch.no_grad():
        lower, upper = fusee.interval_bounds(model, center - radius, center + radius, sound=sound)
    slack = 0.0 if sound else 1e-5 * float(upper.abs().max() + lower.abs().max())
    with torch.no_grad():
        for i in range(total // batch):
            within = 2 * torch.rand(batch, *shape, generator=generator) - 1
            points = center + radius * (within.sign() if i % 4 == 0 else within)
            output = model(points.clamp(center - radius, center + radius))
            assert bool((output >= lower - slack).all() and (output <= upper + slack).all())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_point_is_its_own_bounds(name: str) -> None:
    model, shape = NETWORKS[name]
    x = torch.randn(3, *shape)
    lower, upper = fusee.interval_bounds(model, x, x)
    torch.testing.assert_close(lower, model(x))
    torch.testing.assert_close(upper, model(x))


@pytest.mark.parametrize("name", NETWORKS)
def test_larger_boxes_have_wider_bounds(name: str) -> None:
    model, shape = NETWORKS[name]
    x = torch.randn(2, *shape)
    net = fusee.nn.IntervalModel(model)
    before = net(x, x)
    for eps in (0.01, 0.1, 1.0):
        after = net(x - eps, x + eps)
        assert bool((after[0] < before[0]).all() and (after[1] > before[1]).all())
        before = after


def by_ends(model: nn.Sequential, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """The other form of the rules: positive and negative weights apart."""
    for layer in model:
        if isinstance(layer, nn.Linear):
            above, below = layer.weight.clamp(min=0), layer.weight.clamp(max=0)
            lower, upper = (
                F.linear(lower, above, layer.bias) + F.linear(upper, below),
                F.linear(upper, above, layer.bias) + F.linear(lower, below),
            )
        else:
            lower, upper = layer(lower), layer(upper)
    return lower, upper


def test_both_forms_agree() -> None:
    model = fully_connected(7, 16, 16, 3).double()
    x = torch.randn(5, 7).double()
    expected = by_ends(model, x - 0.3, x + 0.3)
    torch.testing.assert_close(fusee.interval_bounds(model, x - 0.3, x + 0.3), expected)


def test_gradients_are_those_of_the_plain_rules() -> None:
    model = fully_connected(5, 8, 8, 3).double()
    x, eps = torch.randn(4, 5).double(), torch.tensor(0.2).double().requires_grad_()
    weights = [eps, *model.parameters()]
    ours = sum(end.square().sum() for end in fusee.nn.IntervalModel(model)(x - eps, x + eps))
    plain = sum(end.square().sum() for end in by_ends(model, x - eps, x + eps))
    for one, other in zip(
        torch.autograd.grad(ours, weights), torch.autograd.grad(plain, weights), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_margins_are_tighter_than_differences_of_bounds() -> None:
    model, shape = NETWORKS["residual"]
    net = fusee.nn.IntervalModel(model)
    x, target = torch.randn(6, *shape), torch.randint(5, (6,))
    given = (x - 0.05, x + 0.05)
    lower, upper = net(*given)
    margins = net.margins(*given, target)
    index = target.unsqueeze(-1)
    loose = (upper - lower.gather(-1, index)).scatter(-1, index, 0.0)
    assert bool((margins <= loose + 1e-5).all()) and float((loose - margins).max()) > 0.01
    points = model(x)
    assert bool((points - points.gather(-1, index) <= margins + 1e-5).all())
    assert bool((margins.gather(-1, index) == 0).all())


def test_margins_of_a_network_that_ends_otherwise() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    x, target = torch.randn(6, 4), torch.randint(3, (6,))
    net = fusee.nn.IntervalModel(model)
    lower, upper = net(x - 0.1, x + 0.1)
    index = target.unsqueeze(-1)
    expected = (upper - lower.gather(-1, index)).scatter(-1, index, 0.0)
    torch.testing.assert_close(net.margins(x - 0.1, x + 0.1, target), expected)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    kind.__name__: kind
    for kind in (
        *(nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.Softplus, nn.Sigmoid, nn.Tanh),
        *(nn.Hardtanh, nn.ReLU6, nn.Hardsigmoid, nn.LogSigmoid, nn.Softsign),
        *(nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish),
    )
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    """The ends are the least and the greatest value of a fine grid, to its spacing."""
    function = ACTIVATIONS[name]()
    ends = torch.tensor(
        [[-4.0, -3.0], [-3.0, 0.5], [-1.0, 1.0], [0.5, 4.0], [-1.25, -1.2], [-9.0, 9.0]]
    )
    lower, upper = fusee.interval_bounds(nn.Sequential(function), ends[:, 0], ends[:, 1])
    steps = torch.linspace(0, 1, 4001)
    values = function(ends[:, :1] + (ends[:, 1:] - ends[:, :1]) * steps)
    least, most = values.amin(1), values.amax(1)
    assert bool((lower <= least + 1e-5).all() and (upper >= most - 1e-5).all())
    torch.testing.assert_close(lower, least, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(upper, most, atol=1e-3, rtol=1e-3)


class Shapes(nn.Module):
    """Everything that only moves elements, or is linear in them."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x[:, :2], x[:, 2:4]
        x = torch.cat([a.unsqueeze(1), b.unsqueeze(1)], dim=1).permute(0, 2, 1)
        x = x.reshape(x.shape[0], -1).contiguous().clone()
        x = torch.flatten(x.transpose(0, 1), 0).unflatten(0, (4, -1)).squeeze().T
        x = -x * 2.0 + 1.0 - x / 4.0
        first, second = torch.chunk(x, 2, 1)
        x = torch.stack([first, second], 1).flatten(1) + torch.cat([x.split(2, 1)[1], first], 1)
        x = F.pad(x, (1, 0), value=2.0)[:, 1:]
        x = 3.0 - x
        return x.sum(-1, keepdim=True) + x.mean(1, keepdim=True) + x


@pytest.mark.parametrize("sound", [False, True])
def test_shapes_and_arithmetic(sound: bool) -> None:
    model = Shapes()
    x = torch.randn(3, 4)
    try:
        lower, upper = fusee.interval_bounds(model, x - 0.1, x + 0.1, sound=sound)
    except NotImplementedError as error:
        pytest.fail(str(error))
    for _ in range(50):
        y = model(x + 0.1 * (2 * torch.rand(3, 4) - 1))
        assert bool((lower <= y + 1e-5).all() and (y - 1e-5 <= upper).all())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(2, 3, 3, padding=1), (2, 9)),
        (nn.Conv3d(2, 3, 2), (2, 3, 4, 5)),
        (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 5, 6)),
        (nn.Conv2d(2, 4, 3, padding="same", groups=2), (2, 5, 6)),
        (nn.ConvTranspose2d(2, 3, 3, stride=2, output_padding=1), (2, 4, 4)),
        (nn.ConvTranspose1d(2, 3, 3), (2, 6)),
        (nn.MaxPool2d(2), (2, 6, 6)),
        (nn.AdaptiveAvgPool2d(2), (2, 6, 6)),
        (nn.AvgPool1d(3, 2, 1), (2, 9)),
        (nn.BatchNorm1d(2), (2, 5)),
        (nn.Sequential(nn.Identity(), nn.Dropout(0.5), nn.Unflatten(1, (1, 2))), (2, 3)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_layers(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """Points and corners lie within; of a single layer each end is reached, to rounding."""
    model = nn.Sequential(layer).double().eval()
    x = torch.randn(2, *shape).double()
    lower, upper = fusee.interval_bounds(model, x - 0.1, x + 0.1)
    samples = [model(x + 0.1 * (torch.rand_like(x) * 2 - 1).sign()) for _ in range(200)]
    everything = torch.stack(samples)
    assert bool((lower <= everything.amin(0) + 1e-12).all())
    assert bool((everything.amax(0) - 1e-12 <= upper).all())
    # The corner that each output is greatest at.
    leaf = x.clone().requires_grad_()
    output = model(leaf)
    (slope,) = torch.autograd.grad(output.flatten()[0], leaf)
    if not isinstance(layer, nn.MaxPool2d):
        top = model(x + 0.1 * slope.sign()).flatten()[0]
        torch.testing.assert_close(top, upper.flatten()[0])


def test_batch_norm_in_training_uses_the_clean_batch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()
    reference = copy.deepcopy(model)
    x = torch.randn(8, 4).double()
    net = fusee.nn.IntervalModel(model)
    made = net.propagate(x - 0.1, x + 0.1, input=x)
    torch.testing.assert_close(made.output, reference(x))
    for one, other in zip(model.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(one, other)
    hidden = reference[0](x)
    var, mean = torch.var_mean(hidden, 0, correction=0)
    frozen = copy.deepcopy(reference)
    frozen[1].running_mean, frozen[1].running_var = mean.detach(), var.detach()
    lower, upper = fusee.interval_bounds(frozen.eval(), x - 0.1, x + 0.1)
    torch.testing.assert_close((made.lower, made.upper), (lower, upper))
    # The statistics have gradients: moving the first bias moves nothing behind the norm.
    assert made.upper is not None
    (slope,) = torch.autograd.grad(made.upper.sum(), model[0].bias)
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-10, rtol=0)


def test_batch_norm_in_training_without_a_clean_batch() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)).double()
    x = torch.randn(8, 4).double()
    before = copy.deepcopy(model.state_dict())
    lower, upper = fusee.nn.IntervalModel(model)(x - 0.1, x + 0.1)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name])
    torch.testing.assert_close((lower + upper) / 2, model(x))


def test_boxes_before_relu() -> None:
    model = fully_connected(5, 8, 7, 3)
    x = torch.randn(4, 5)
    made = fusee.nn.IntervalModel(model).propagate(x - 0.1, x + 0.1, before_relu=True)
    assert [tuple(center.shape) for center, _ in made.before_relu] == [(4, 8), (4, 7)]
    first = fusee.interval_linear(x, torch.full_like(x, 0.1), model[0].weight, model[0].bias)
    torch.testing.assert_close(made.before_relu[0], first, atol=1e-6, rtol=1e-5)
    plain = fusee.nn.IntervalModel(model)(x - 0.1, x + 0.1)
    torch.testing.assert_close((made.lower, made.upper), plain)


def test_shares_parameters_and_pickles() -> None:
    model = Residual()
    net = fusee.nn.IntervalModel(model)
    assert [id(p) for p in net.parameters()] == [id(p) for p in model.parameters()]
    assert list(net.state_dict()) == [f"model.{name}" for name in model.state_dict()]
    x = torch.randn(2, 2, 8, 8)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    copies = (copy.deepcopy(net), pickle.loads(pickle.dumps(net)))
    copies = (*copies, torch.load(file, weights_only=False))
    expected = net.eval()(x - 0.1, x + 0.1)
    for other in copies:
        torch.testing.assert_close(other.eval()(x - 0.1, x + 0.1), expected)
        assert next(other.parameters()) is not next(net.parameters())


@pytest.mark.tracing
@pytest.mark.parametrize("name", ["fully connected", "residual"])
def test_compiles_whole(name: str) -> None:
    model, shape = NETWORKS[name]
    net = fusee.nn.IntervalModel(model)
    x, target = torch.randn(4, *shape), torch.randint(4, (4,))

    def loss(lower: Tensor, upper: Tensor) -> Tensor:
        return net.margins(lower, upper, target).logsumexp(-1).mean()

    compiled = torch.compile(loss, fullgraph=True)
    results = []
    for function in (loss, compiled):
        value = function(x - 0.1, x + 0.1)
        results.append((value, *torch.autograd.grad(value, list(model.parameters()))))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)


def test_a_module_of_the_users_own() -> None:
    class Halve(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.div(2) if x.sum() > 0 else x * 0.5  # cannot be traced

        def interval_forward(
            self, center: Tensor, radius: Tensor, *, sound: bool
        ) -> tuple[Tensor, Tensor]:
            return center / 2, radius / 2

    x = torch.randn(3, 4)
    lower, upper = fusee.interval_bounds(nn.Sequential(Halve(), nn.ReLU()), x - 1, x + 1)
    torch.testing.assert_close(lower, ((x - 1) / 2).relu())
    torch.testing.assert_close(upper, ((x + 1) / 2).relu())


def test_a_parametrised_layer() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    x = torch.randn(2, 4)
    made = fusee.interval_bounds(nn.Sequential(layer), x - 0.1, x + 0.1)
    plain = nn.Linear(4, 3)
    plain.load_state_dict({"weight": layer.weight.detach(), "bias": layer.bias.detach()})
    torch.testing.assert_close(made, fusee.interval_bounds(nn.Sequential(plain), x - 0.1, x + 0.1))


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Squares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


@pytest.mark.parametrize(
    ("model", "error", "match"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), NotImplementedError, "LayerNorm"),
        (Squares(), NotImplementedError, "product of two boxes"),
        (Branch(), ValueError, "could not be traced"),
        (TwoInputs(), ValueError, "one input, got 2"),
        (nn.Softmax(1), NotImplementedError, "softmax"),
        (3, TypeError, "model must be a torch.nn.Module"),
    ],
)
def test_what_cannot_be_bounded_is_named(
    model: nn.Module, error: type[Exception], match: str
) -> None:
    x = torch.rand(2, 2)
    with pytest.raises(error, match=match):
        fusee.interval_bounds(model, x, x)


def test_bad_boxes() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    net = fusee.nn.IntervalModel(model)
    x = torch.rand(2, 3)
    nan = x.clone()
    nan[0, 1] = torch.nan
    lower, upper = net(nan, nan)
    assert bool(lower[0].isnan().all() and upper[0].isnan().all() and lower[1].isfinite().all())
    with pytest.raises(ValueError, match="lower must not be above upper, but is at 6 elements"):
        net(x + 1, x)
    for ends in ((x, x + torch.inf), (x - torch.inf, x)):
        with pytest.raises(ValueError, match="must be finite"):
            net(*ends)
    with pytest.raises(ValueError, match="upper must have the shape"):
        net(x, x[:1])
    with pytest.raises(ValueError, match="input must have the shape"):
        net(x, x, input=x[:1])
    with pytest.raises(TypeError, match="upper must have the dtype"):
        net(x, x.double())
    with pytest.raises(TypeError, match="sound bounds must be"):
        net(x.bfloat16(), x.bfloat16(), sound=True)
    with pytest.raises(IndexError, match="target must be in"):
        net.margins(x, x, torch.tensor([0, 2]))
    with pytest.raises(NotImplementedError, match="no sound interval rule for gelu"):
        fusee.interval_bounds(nn.Sequential(nn.GELU()), x, x, sound=True)


def test_batch_norm_without_statistics() -> None:
    norm = nn.BatchNorm1d(3).eval()
    norm.running_mean = norm.running_var = None
    x = torch.rand(4, 3)
    with pytest.raises(ValueError, match="no running statistics"):
        fusee.interval_bounds(nn.Sequential(norm), x, x)
    with pytest.raises(ValueError, match="more than one value"):
        fusee.interval_bounds(nn.Sequential(nn.BatchNorm1d(3)), x[:1], x[:1])
    with pytest.raises(NotImplementedError, match="dropout"):
        fusee.interval_bounds(nn.Sequential(nn.Dropout(0.5)), x, x)
