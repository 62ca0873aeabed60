"""Sound bounds contain the exact ones, in rational arithmetic; the usual ones do not, and are near."""

from __future__ import annotations

from fractions import Fraction

import fusee
import pytest
import torch
from torch import Tensor, nn

from tests.bounds import exact
from tests.bounds.networks import fully_connected

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def hard_layers(dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Boxes, weights and biases whose sums lose what they can."""
    torch.manual_seed(5)
    limits = torch.finfo(dtype)
    big = min(float(limits.max) ** 0.25, 1e6)

    def of(values: object) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float64).to(dtype)

    signs = torch.randint(0, 2, (6, 40)) * 2.0 - 1
    tiny = limits.tiny
    smallest = limits.smallest_normal * limits.eps
    return {
        "cancelling": (
            of([[1.0] * 8] * 3),
            of([[0.0] * 8] * 3),
            of([[big, 1.0, -big, limits.eps, big, -big, 1.0, -limits.eps]]),
            of([limits.eps]),
        ),
        "eps of zero": (
            of(torch.randn(4, 40)),
            of(torch.zeros(4, 40)),
            of(torch.randn(6, 40)),
            of(torch.randn(6)),
        ),
        "one sign": (
            of(torch.rand(4, 40)),
            of(torch.rand(4, 40)),
            of(torch.rand(6, 40)),
            of(torch.rand(6)),
        ),
        "wide range": (
            of(signs[:4] * 10 ** (4 * torch.rand(4, 40) - 2)),
            of(10 ** (4 * torch.rand(4, 40) - 3)),
            of(signs * 10 ** (4 * torch.rand(6, 40) - 3)),
            of(torch.randn(6)),
        ),
        "subnormal": (
            of(torch.randn(2, 5) * tiny),
            of(torch.rand(2, 5) * tiny),
            of(torch.randn(3, 5)),
            of([0.0] * 3),
        ),
        "products that vanish": (
            of([[smallest, -smallest, 3 * smallest]]),
            of([[smallest, 0.0, smallest]]),
            of([[0.5, 0.3, 0.1], [0.3, -0.3, 0.7]]),
            of([0.0, smallest]),
        ),
        "ties": (
            of([[1.0, limits.eps / 2, 1.0, limits.eps * 1.5]]),
            of([[limits.eps / 2, limits.eps, 0.0, limits.eps / 2]]),
            of([[1.0, 1.0, 1.0, 1.0], [-1.0, 1.0, -1.0, 1.0]]),
            of([limits.eps / 2, 1.0]),
        ),
    }


@pytest.mark.parametrize("name", hard_layers(torch.float32))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("relu", [False, True])
def test_a_layer_contains_the_exact_image(name: str, dtype: torch.dtype, relu: bool) -> None:
    center, radius, weight, bias = hard_layers(dtype)[name]
    made = fusee.interval_linear(center, radius, weight, bias, relu=relu, sound=True)
    for c, r, out_c, out_r in zip(center, radius, *made, strict=True):
        expected = exact.linear(exact.intervals(c, r), weight, bias)
        expected = exact.relu(expected) if relu else expected
        assert exact.contains(exact.intervals(out_c, out_r), expected)
        lower, upper = fusee.lower_upper(out_c, out_r, sound=True)
        ends = list(zip(exact.fractions(lower), exact.fractions(upper), strict=True))
        assert exact.contains(ends, expected)


@pytest.mark.parametrize("name", hard_layers(torch.float32))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_margins_are_above_the_exact_ones(name: str, dtype: torch.dtype) -> None:
    center, radius, weight, bias = hard_layers(dtype)[name]
    weight, bias = torch.cat([weight, weight.flip(1)]), torch.cat([bias, bias / 3])
    target = torch.arange(len(center)) % len(weight)
    made = fusee.interval_margins(center, radius, weight, bias, target, sound=True)
    for c, r, y, row in zip(center, radius, target.tolist(), made, strict=True):
        expected = exact.margins(exact.intervals(c, r), weight, bias, y)
        assert all(a >= b for a, b in zip(exact.fractions(row), expected, strict=True))
        assert row[y] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-3, 0.1])
def test_networks_contain_the_exact_bounds(dtype: torch.dtype, eps: float) -> None:
    """The usual bounds cut off a part of the exact ones in more than a fifth of the ends; sound ones
    never do, and are no wider than what rounding explains."""
    torch.manual_seed(11)
    cut = outputs = 0
    for _ in range(4):
        model = fully_connected(24, 48, 48, 8).to(dtype)
        x = torch.randn(3, 24, dtype=dtype)
        lower, upper = x - eps, x + eps
        usual = fusee.interval_bounds(model, lower, upper)
        sound = fusee.interval_bounds(model, lower, upper, sound=True)
        for i in range(len(x)):
            box = list(zip(exact.fractions(lower[i]), exact.fractions(upper[i]), strict=True))
            expected = exact.network(model, box)
            pairs = [
                (exact.fractions(ends[0][i]), exact.fractions(ends[1][i]))
                for ends in (usual, sound)
            ]
            assert exact.contains(list(zip(*pairs[1], strict=True)), expected)
            for low, high, (a, b) in zip(*pairs[0], expected, strict=True):
                cut += (low > a) + (high < b)
                outputs += 2
        width = (sound[1] - sound[0]) - (usual[1] - usual[0])
        size = usual[0].abs().max() + usual[1].abs().max()
        assert float((width / size).max()) < 2000 * torch.finfo(dtype).eps
    assert cut > outputs // 5


def test_margins_of_a_network() -> None:
    torch.manual_seed(2)
    model = fully_connected(12, 24, 24, 5)
    x, target = torch.randn(3, 12), torch.tensor([0, 3, 4])
    net = fusee.nn.IntervalModel(model)
    made = net.margins(x - 0.01, x + 0.01, target, sound=True)
    for i, row in enumerate(made):
        low, high = exact.fractions((x - 0.01)[i]), exact.fractions((x + 0.01)[i])
        box = exact.network(model[:-1], list(zip(low, high, strict=True)))
        expected = exact.margins(box, model[-1].weight, model[-1].bias, int(target[i]))
        assert all(a >= b for a, b in zip(exact.fractions(row), expected, strict=True))


def test_convolutions_contain_the_exact_image() -> None:
    """As the linear layer that a convolution is, and with groups, strides and padding."""
    torch.manual_seed(4)
    for options in ({"padding": 1}, {"stride": 2, "groups": 2}, {"dilation": 2, "padding": "same"}):
        convolution = nn.Conv2d(2, 4, 3, **options)
        x, radius = torch.randn(1, 2, 5, 6), 0.1 * torch.rand(1, 2, 5, 6)
        center, grown = fusee.interval_conv2d(
            *(x, radius, convolution.weight, convolution.bias, convolution.stride),
            *(convolution.padding, convolution.dilation, convolution.groups),
            sound=True,
        )
        with torch.no_grad():
            shift = convolution(torch.zeros_like(x)).flatten()
            units = torch.eye(x.numel()).view(-1, *x.shape[1:])
            plain = nn.Conv2d(2, 4, 3, bias=False, **options)
            plain.weight = convolution.weight
            matrix = plain(units).flatten(1).T
        # A unit passes each weight through unchanged.
        expected = exact.linear(exact.intervals(x.flatten(), radius.flatten()), matrix, shift)
        assert exact.contains(exact.intervals(center.flatten(), grown.flatten()), expected)
        torch.testing.assert_close(center, convolution(x))


def exact_norm(
    norm: nn.BatchNorm2d, box: list[exact.Interval], channel: int
) -> list[exact.Interval]:
    """With a scale from 60 digits."""
    assert norm.running_mean is not None and norm.running_var is not None
    mean, var, weight, bias = (
        exact.fractions(values)[channel]
        for values in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    square = var + Fraction(norm.eps)
    digits = 10**60
    root = Fraction(_isqrt(int(square * digits**2)), digits)
    scale = weight / root
    ends = [(scale * (a - mean) + bias, scale * (b - mean) + bias) for a, b in box]
    return [(min(pair), max(pair)) for pair in ends]


def _isqrt(value: int) -> int:
    import math

    return math.isqrt(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_batch_norm_contains_the_exact_image(dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    norm = nn.BatchNorm2d(5).to(dtype).eval()
    for values in (norm.weight, norm.bias, norm.running_mean):
        assert values is not None
        nn.init.normal_(values)
    assert norm.running_var is not None
    nn.init.uniform_(norm.running_var, 0.01, 3.0)
    x = torch.randn(2, 5, 3, 4, dtype=dtype)
    lower, upper = fusee.interval_bounds(nn.Sequential(norm), x - 1e-3, x + 1e-3, sound=True)
    for image in range(2):
        for channel in range(5):
            low, high, out_low, out_high = (
                exact.fractions(t[image, channel].flatten())
                for t in (x - 1e-3, x + 1e-3, lower, upper)
            )
            expected = exact_norm(norm, list(zip(low, high, strict=True)), channel)
            assert exact.contains(list(zip(out_low, out_high, strict=True)), expected)
    assert float(((upper - lower) / (norm(x + 1e-3) - norm(x - 1e-3)).abs()).max()) < 1.01


@pytest.mark.parametrize("kind", [nn.Tanh, nn.Sigmoid, nn.ELU, nn.LeakyReLU, nn.Hardtanh, nn.ReLU6])
def test_activations_contain_what_they_are_in_more_digits(kind: type[nn.Module]) -> None:
    function = kind()
    x = torch.cat([torch.linspace(-8, 8, 4001), torch.randn(500) * 1e-4])
    lower, upper = fusee.interval_bounds(nn.Sequential(function), x, x, sound=True)
    precise = function(x.double())
    assert bool((lower.double() < precise).all() and (precise < upper.double()).all())
    width = (upper.double() - lower.double()) / (precise.abs() * (1 + x.abs()))
    assert float(width[precise != 0].max()) < 12 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ends_and_boxes_contain_each_other(dtype: torch.dtype) -> None:
    torch.manual_seed(8)
    x = torch.randn(500).to(dtype)
    y = torch.maximum(x, (x + torch.rand(500) * 10 ** (-6 * torch.rand(500))).to(dtype))
    center, radius = fusee.center_radius(x, y, sound=True)
    ends = list(zip(exact.fractions(x), exact.fractions(y), strict=True))
    assert exact.contains(exact.intervals(center, radius), ends)
    lower, upper = fusee.lower_upper(center, radius, sound=True)
    outer = list(zip(exact.fractions(lower), exact.fractions(upper), strict=True))
    assert exact.contains(outer, exact.intervals(center, radius))
    made = fusee.interval_relu(center, radius, sound=True)
    assert exact.contains(exact.intervals(*made), exact.relu(exact.intervals(center, radius)))


def test_sums_and_pools_contain_the_exact_ones() -> None:
    torch.manual_seed(9)
    x = torch.randn(1, 1, 6, 6)
    x_low, x_high = x - 0.125, x + 0.125
    box = list(
        zip(exact.fractions(x_low.flatten()), exact.fractions(x_high.flatten()), strict=True)
    )
    lower, upper = fusee.interval_bounds(
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), x_low, x_high, sound=True
    )
    mean = sum(a for a, _ in box) / 36, sum(b for _, b in box) / 36
    got = Fraction(lower.item()), Fraction(upper.item())
    assert got[0] <= mean[0] and mean[1] <= got[1]

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x + x * 0.1) / 3 - x

    lower, upper = fusee.interval_bounds(Twice(), x_low, x_high, sound=True)
    tenth = Fraction(0.1)
    for (a, b), low, high in zip(
        box, exact.fractions(lower.flatten()), exact.fractions(upper.flatten()), strict=True
    ):
        assert low <= (a + a * tenth) / 3 - b and (b + b * tenth) / 3 - a <= high


def test_slack_is_of_the_size_of_rounding() -> None:
    """A box of width zero becomes no wider than the sum's own rounding could make it."""
    torch.manual_seed(10)
    weight, x = torch.randn(64, 512), torch.randn(9, 512)
    _, radius = fusee.interval_linear(x, torch.zeros_like(x), weight, sound=True)
    size = x.abs() @ weight.abs().T
    assert float((radius / size).max()) <= 1.1 * 517 * 2**-24


def test_sound_layers_have_the_gradients_of_the_others() -> None:
    torch.manual_seed(12)
    given = [torch.randn(4, 6).double(), torch.rand(4, 6).double(), torch.randn(5, 6).double()]
    results = []
    for sound in (False, True):
        leaves = [t.clone().requires_grad_() for t in given]
        center, radius = fusee.interval_linear(*leaves, relu=True, sound=sound)
        results.append(torch.autograd.grad((center.square() + radius).sum(), leaves))
    torch.testing.assert_close(results[0], results[1])


def test_autocast_does_not_round_a_sound_layer() -> None:
    x, weight = torch.randn(3, 5), torch.randn(4, 5)
    expected = fusee.interval_linear(x, x.abs(), weight, sound=True)
    with torch.autocast("cpu", torch.bfloat16):
        made = fusee.interval_linear(x, x.abs(), weight, sound=True)
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match="weight must have the dtype"),
    ):
        fusee.interval_linear(x, x.abs(), weight.double(), sound=True)


class Constants(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)  # type: ignore[operator,no-any-return]


@pytest.mark.parametrize(
    ("function", "value"),
    [
        (lambda x: x + 0.1, -0.1),
        (lambda x: 0.1 - x, 0.1),
        (lambda x: x * 0.1, 3.0),
        (lambda x: x / 0.3, 7.0),
        (lambda x: x * 1e-46, 1e38),
        (lambda x: x / 1e40, 1e38),
    ],
)
def test_constants_are_as_exact_as_python_has_them(function: object, value: float) -> None:
    x = torch.tensor([value])
    lower, upper = fusee.interval_bounds(Constants(function), x, x, sound=True)
    expected = _exactly(function, Fraction(x.item()))
    assert Fraction(lower.item()) <= expected <= Fraction(upper.item())


def _exactly(function: object, start: Fraction) -> Fraction:
    class Number:
        """A rational number, with what numbers of Python's are."""

        def __init__(self, value: Fraction) -> None:
            self.value = value

        def __add__(self, other: float) -> Fraction:
            return self.value + Fraction(other)

        def __rsub__(self, other: float) -> Fraction:
            return Fraction(other) - self.value

        def __mul__(self, other: float) -> Fraction:
            return self.value * Fraction(other)

        def __truediv__(self, other: float) -> Fraction:
            return self.value / Fraction(other)

    return function(Number(start))  # type: ignore[operator,no-any-return]


def test_batch_norm_with_a_scale_that_is_hardly_there() -> None:
    norm = nn.BatchNorm2d(1).eval()
    with torch.no_grad():
        norm.weight.fill_(1e-42)
    x = torch.full((1, 1, 1, 1), 8.7e19)
    lower, upper = fusee.interval_bounds(nn.Sequential(norm), x, x, sound=True)
    box = [(Fraction(x.item()), Fraction(x.item()))]
    ends = [(Fraction(lower.item()), Fraction(upper.item()))]
    assert exact.contains(ends, exact_norm(norm, box, 0))


def test_no_sound_bounds_of_statistics_or_other_dtypes() -> None:
    x = torch.rand(4, 3)
    for model, match in (
        (nn.Sequential(nn.BatchNorm1d(3)), "a batch's own statistics"),
        (Constants(lambda x: x.sum(1, dtype=torch.float32)), "sum in another dtype"),
        (Constants(lambda x: x.double()), "double"),
    ):
        with pytest.raises(NotImplementedError, match=f"no sound interval rule for .*{match}"):
            fusee.interval_bounds(model, x, x, sound=True)


def test_batched_weights_under_autocast() -> None:
    x, weights = torch.randn(3, 5), torch.randn(2, 4, 5)

    def layer(weight: Tensor) -> tuple[Tensor, Tensor]:
        return fusee.interval_linear(x, x.abs(), weight, sound=True)

    expected = torch.vmap(layer)(weights)
    with torch.autocast("cpu", torch.bfloat16):
        made = torch.vmap(layer)(weights)
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))


def test_sound_convolutions_refuse_what_torch_refuses() -> None:
    box, weight = (torch.randn(1, 4, 5, 5), torch.rand(1, 4, 5, 5)), torch.randn(3, 2, 3, 3)
    for options in (
        {"padding": "sam", "groups": 2},
        {"padding": -1, "groups": 2},
        {"groups": 2},
        {"padding": "same", "stride": 2, "groups": 2},
        {"stride": (1, 1, 1), "groups": 2},
    ):
        with pytest.raises((RuntimeError, ValueError)):
            fusee.interval_conv2d(*box, weight, sound=True, **options)
