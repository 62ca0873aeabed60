"""Compander: what a layer computes at first, what it learns, what is assigned to it."""

from __future__ import annotations

import math
import warnings
from typing import Any

import fusee
import pytest
import torch
from fusee.nn import Compander
from fusee.reparam.compand import KINDS
from fusee.reparam.compand_inverse import LIMITS
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tests.harness.spec import ALL_DTYPES

BOUNDED = tuple(LIMITS)
SLOPED = tuple(kind for kind in KINDS if kind != "powerprop")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def layer(weight: Tensor, **options: Any) -> tuple[nn.Module, Compander]:
    """A module that holds a companded copy of the weight."""
    module = nn.Module()
    module.weight = nn.Parameter(weight.clone())
    compander = Compander(module.weight, **options)
    parametrize.register_parametrization(module, "weight", compander)
    return module, compander


def stored(module: nn.Module) -> nn.Parameter:
    """The free weights."""
    return module.parametrizations.weight.original


def linear(seed: int = 0, **options: Any) -> nn.Linear:
    """A companded linear layer, 5 into 4."""
    torch.manual_seed(seed)
    module = nn.Linear(5, 4)
    parametrize.register_parametrization(module, "weight", Compander(module.weight, **options))
    return module


# --- at first -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("channel_dim", [None, 0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_computes_what_it_did_before(
    kind: str, channel_dim: int | None, dtype: torch.dtype
) -> None:
    """Every element, with tails and channels of very different sizes; nothing is clamped."""
    weight = randn(6, 5, 3, seed=1) ** 3 * 10.0 ** torch.arange(-2, 4).reshape(6, 1, 1) * 1e-2
    weight = weight.to(dtype)
    options = {} if channel_dim is None else {"per_channel": True, "channel_dim": channel_dim}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module, compander = layer(weight, kind=kind, **options)
    assert compander.clamped == 0
    error = (module.weight.double() / weight.double() - 1).abs().max().item()
    bound = {torch.float32: 1e-6, torch.float64: 3e-15}.get(dtype, 2 * torch.finfo(dtype).eps)
    if dtype == torch.float16:  # whose small numbers are multiples of 6e-8
        difference = (module.weight.double() - weight.double()).abs()
        error = (difference / (weight.double().abs() + 6e-5)).max().item()
    assert error <= bound
    assert module.weight.dtype == dtype and stored(module).dtype == dtype
    assert module.weight.stride() == weight.stride() == stored(module).stride()


@pytest.mark.parametrize("kind", BOUNDED)
def test_headroom(kind: str) -> None:
    """The largest weight of each channel lies at 1 / headroom of the range."""
    weight = randn(4, 7, dtype=torch.float64)
    for per_channel in (False, True):
        a = Compander(weight, kind, headroom=2.5, per_channel=per_channel).a
        largest = weight.abs().amax(1) if per_channel else weight.abs().max().reshape(1)
        torch.testing.assert_close(a * LIMITS[kind], 2.5 * largest, rtol=1e-14, atol=0)


@pytest.mark.parametrize("slope", [1.1, 1.25, 3.0])
@pytest.mark.parametrize("kind", SLOPED)
def test_slope(kind: str, slope: float) -> None:
    """The slope at zero is what was asked for, whatever the curve."""
    compander = Compander(randn(9, dtype=torch.float64), kind, slope=slope)
    v = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (derivative,) = torch.autograd.grad(compander(v), v)
    assert derivative.item() == pytest.approx(slope, rel=1e-12)


@pytest.mark.parametrize("kind", ["arctan", "asinh", "mu_law"])
def test_small_weights_are_pushed_away_from_zero(kind: str) -> None:
    compander = Compander(torch.tensor([1.0]), kind)
    v = torch.tensor([0.01, 0.1, -0.1])
    assert bool((compander(v).abs() > 1.05 * v.abs()).all())


def test_constants_that_are_given() -> None:
    weight = randn(3, 8)
    compander = Compander(weight, a=2.0, b=0.5)
    assert compander.a.tolist() == [2.0] and compander.b.tolist() == [0.5]
    assert Compander(weight, a=2.0, slope=4.0).b.tolist() == [0.5]
    assert Compander(weight, "mu_law", b=255).b.tolist() == [255.0]
    assert Compander(weight, "powerprop").a.tolist() == [1.0]
    assert Compander(weight, "powerprop").b.tolist() == [2.0]
    assert Compander(weight, a=torch.tensor(3.0)).a.tolist() == [3.0]
    per_channel = Compander(weight, a=torch.tensor([5.0, 6.0, 7.0]), b=1, per_channel=True)
    assert per_channel.a.tolist() == [5.0, 6.0, 7.0] and per_channel.b.tolist() == [1.0] * 3


def test_zeros_and_nothing() -> None:
    """A stand-in gives a range to weights that have none."""
    assert Compander(torch.zeros(8, 4, 2, 2), "tanh").a.tolist() == [1.5 / 4]
    weight = torch.tensor([[0.0, 0.0], [3.0, 1.0]])
    assert Compander(weight, "tanh", per_channel=True).a.tolist() == [4.5, 4.5]
    for shape in ((0,), (0, 3), (3, 0)):
        for per_channel in (False, True):
            module, compander = layer(torch.empty(shape), per_channel=per_channel)
            assert module.weight.shape == shape
            assert compander.a.shape == ((shape[0],) if per_channel else (1,))
            assert bool((compander.a > 0).all())
    module, _ = layer(torch.zeros(4, 4))
    assert not module.weight.any()
    module.weight.sum().backward()
    assert bool((stored(module).grad > 0).all())


def test_scalar_weight() -> None:
    module, compander = layer(torch.tensor(0.3))
    assert module.weight.item() == pytest.approx(0.3) and compander.a.shape == (1,)


def test_each_channel_has_its_curve() -> None:
    weight = randn(4, 6, 2)
    module, compander = layer(weight, kind="softsign", per_channel=True, channel_dim=1)
    assert compander.a.shape == compander.b.shape == (6,)
    v, a, b = stored(module), compander.a, compander.b
    for i in range(6):
        expected = fusee.compand(v[:, i], a[i : i + 1], b[i : i + 1], "softsign")
        torch.testing.assert_close(module.weight[:, i], expected, rtol=1e-6, atol=0)


# --- what it learns -------------------------------------------------------------------------------


@pytest.mark.parametrize("channel_dim", [None, 1])
def test_gradients(channel_dim: int | None) -> None:
    """Those of the curve with a = a0 exp(alpha), b = b0 exp(beta)."""
    options = {} if channel_dim is None else {"per_channel": True, "channel_dim": channel_dim}
    module, compander = layer(randn(3, 4, dtype=torch.float64), **options)
    with torch.no_grad():
        compander.log_ratio_a += 0.3
        compander.log_ratio_b -= 0.2
    grad = randn(3, 4, seed=1, dtype=torch.float64)
    module.weight.backward(grad)
    shape = (1, -1)
    a = (compander.initial_a * math.exp(0.3)).detach().requires_grad_()
    b = (compander.initial_b * math.exp(-0.2)).detach().requires_grad_()
    v = stored(module).detach().requires_grad_()
    (a.reshape(shape) * torch.atan(v / b.reshape(shape))).backward(grad)
    for found, wanted in (
        (stored(module).grad, v.grad),
        (compander.log_ratio_a.grad, a.grad * a.detach()),
        (compander.log_ratio_b.grad, b.grad * b.detach()),
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_and_b_stay_positive(sign: int) -> None:
    """After a step that would take a or b itself far below zero."""
    module = linear()
    compander = module.parametrizations.weight[0]
    optimizer = torch.optim.SGD([compander.log_ratio_a, compander.log_ratio_b], lr=3.0)
    largest = max(compander.a.item(), compander.b.item())
    (sign * module.weight.abs().sum()).backward()
    grads = [ratio.grad.item() for ratio in (compander.log_ratio_a, compander.log_ratio_b)]
    assert max(grads) * 3.0 > 3 * largest
    optimizer.step()
    assert compander.a.item() > 0 and compander.b.item() > 0


def test_learnable() -> None:
    names = {name for name, _ in linear().named_parameters()}
    ratios = {f"parametrizations.weight.0.log_ratio_{name}" for name in "ab"}
    assert names == {"bias", "parametrizations.weight.original", *ratios}
    fixed = linear(learnable=False)
    assert {name for name, _ in fixed.named_parameters()} == names - ratios
    assert set(linear().state_dict()) - set(fixed.state_dict()) == ratios
    assert fixed.parametrizations.weight[0].a.requires_grad is False
    fixed(randn(2, 5)).sum().backward()
    assert stored(fixed).grad is not None


def test_frozen_weight() -> None:
    """What is frozen stays so, until it is thawed."""
    module = nn.Linear(5, 4).requires_grad_(False)
    parametrize.register_parametrization(module, "weight", Compander(module.weight))
    assert not any(p.requires_grad for p in module.parameters())
    module.requires_grad_()
    module(randn(2, 5)).sum().backward()
    assert module.parametrizations.weight[0].log_ratio_a.grad is not None
    assert Compander(randn(3)).log_ratio_a.requires_grad


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_learns_nothing_behind_a_normalisation(per_channel: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5, eps=1e-30), nn.Tanh())
    model.double()
    fusee.nn.compand_model(model, per_channel=per_channel)
    model(randn(40, 6, dtype=torch.float64)).square()[:, :3].sum().backward()
    compander = model[0].parametrizations.weight[0]
    size = compander.log_ratio_b.grad.abs().max()
    assert size > 1e-3
    assert compander.log_ratio_a.grad.abs().max() <= 1e-12 * size


def test_gradient_accumulation() -> None:
    module, twin = linear(), linear()
    x = randn(8, 5)
    module(x).square().sum().backward()
    for half in x.split(4):
        with parametrize.cached():
            twin(half).square().sum().backward()
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6)


def test_cached() -> None:
    """Computed once within the context, and with the gradient of every use."""
    module = linear()
    x = randn(3, 5)
    (module(x) + 2 * module(x)).sum().backward()
    expected = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    with parametrize.cached():
        assert module.weight is module.weight
        (module(x) + 2 * module(x)).sum().backward()
    assert module.weight is not module.weight
    for p, grad in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


# --- assignment -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_assignment(kind: str) -> None:
    module, compander = layer(randn(4, 5), kind=kind)
    a, original = compander.a.clone(), stored(module)
    other = 0.9 * randn(4, 5).flip(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.weight = other
    torch.testing.assert_close(module.weight, other, rtol=1e-6, atol=0)
    assert torch.equal(compander.a, a) and stored(module) is original


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("kind", BOUNDED)
def test_clamping(kind: str, per_channel: bool) -> None:
    """Beyond 99 % of the range, by channel; counted, and reported where the assignment stands."""
    weight = torch.tensor([[1.0, 0.5], [4.0, -2.0]])
    module, compander = layer(weight, kind=kind, per_channel=per_channel)
    end = compander.a.detach().expand(2) * LIMITS[kind]
    other = torch.stack([end[:1].new_tensor([-9.0, 0.2]), end[1] * torch.tensor([0.98, 0.995])])
    with pytest.warns(UserWarning, match=r"^2 of 4 weights \(50 %\) were clamped") as caught:
        module.weight = other
    assert caught[0].filename == __file__
    assert compander.clamped == 2
    expected = other.clone()
    expected[0, 0], expected[1, 1] = -0.99 * end[0], 0.99 * end[1]
    torch.testing.assert_close(module.weight, expected, rtol=2e-6, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.weight = weight
    assert compander.clamped == 0


def test_clamping_at_registration() -> None:
    with pytest.warns(UserWarning, match="1 of 3 weights"):
        module, compander = layer(torch.tensor([0.1, 0.5, -3.0]), kind="tanh", a=1.0)
    assert compander.clamped == 1
    assert module.weight[2].item() == pytest.approx(-0.99)


@pytest.mark.parametrize("kind", KINDS)
def test_assigned_nan_and_infinity(kind: str) -> None:
    module, compander = layer(torch.tensor([1.0, 2.0, 3.0]), kind=kind)
    with pytest.warns(UserWarning, match="1 of 3 weights"):
        module.weight = torch.tensor([math.nan, -math.inf, 1.5])
    assert stored(module)[0].isnan() and stored(module)[1].isfinite()
    assert compander.clamped == 1
    assert module.weight[0].isnan() and module.weight[2].item() == pytest.approx(1.5)


@pytest.mark.parametrize("kind", ["asinh", "symlog", "mu_law"])
def test_assigned_beyond_the_dtype(kind: str) -> None:
    """Without a limit to the weights there is one to v: the largest number of the dtype."""
    module, compander = layer(torch.tensor([1.0, -0.5]).half(), kind=kind, slope=20.0)
    with pytest.warns(UserWarning, match=r"their v outside that of torch\.float16"):
        module.weight = torch.tensor([-1000.0, 0.25]).half()
    assert compander.clamped == 1
    assert stored(module)[0].item() == -65504
    assert -1000 < module.weight[0].item() < -3
    assert module.weight[1].item() == pytest.approx(0.25, rel=2e-3)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "options", "error_type", "match"),
    [
        (torch.ones(3, dtype=torch.int64), {}, TypeError, "weight must have dtype"),
        (3.0, {}, TypeError, "weight must be a Tensor"),
        (torch.eye(3).to_sparse(), {}, TypeError, "weight must be a dense"),
        (torch.tensor([1.0, math.nan]), {}, ValueError, "weight must be finite, got nan"),
        (torch.tensor([1.0, -math.inf]), {}, ValueError, "weight must be finite, got inf"),
        (torch.ones(3), {"kind": "sigmoid"}, ValueError, "kind must be one of"),
        (torch.ones(3), {"kind": 1}, TypeError, "kind must be a str"),
        (torch.ones(3), {"headroom": 1.0}, ValueError, r"headroom must be .* 1\.0101, got 1\.0"),
        (torch.ones(3), {"headroom": "2"}, TypeError, "headroom must be a number, got str"),
        (torch.ones(3), {"kind": "asinh", "headroom": 0}, ValueError, "headroom must be"),
        (torch.ones(3), {"slope": math.inf}, ValueError, "slope must be finite"),
        (torch.ones(3), {"kind": "mu_law", "slope": 1}, ValueError, "slope must be .* than 1"),
        (torch.ones(3), {"a": -1.0}, ValueError, "a must be finite and more than 0, got -1"),
        (torch.ones(3), {"a": True}, TypeError, "a must be a number, got bool"),
        (torch.ones(3), {"b": torch.tensor(0.0)}, ValueError, "b must be positive"),
        (torch.ones(3), {"b": 1e-50}, ValueError, r"b must be positive .* torch.float32, got 0"),
        (torch.ones(3), {"a": torch.ones(3)}, ValueError, r"shape \(3,\) without per_channel"),
        (torch.ones(3), {"a": torch.ones(3).int()}, TypeError, "a must have dtype"),
        (
            torch.ones(3, 2),
            {"a": torch.ones(2), "per_channel": True},
            ValueError,
            "a must have one element, or one for each of 3 channels",
        ),
        (torch.ones(3), {"channel_dim": 1}, IndexError, r"channel_dim must be in \[-1, 0\]"),
        (torch.ones(3), {"channel_dim": 0.0}, TypeError, "channel_dim must be an int"),
        (torch.ones(3), {"dtype": torch.int32}, TypeError, "dtype must be float32"),
        (torch.zeros(3), {"kind": "powerprop"}, ValueError, "weight must not be all zero"),
    ],
)
def test_errors(
    weight: Any, options: dict[str, Any], error_type: type[Exception], match: str
) -> None:
    with pytest.raises(error_type, match=match):
        Compander(weight, **options)


def test_powerprop_of_zeros_with_a_gradient() -> None:
    assert Compander(torch.zeros(3), "powerprop", b=1.0).b.item() == 1.0


def test_assigned_integers() -> None:
    module, _ = layer(torch.ones(3))
    with pytest.raises(TypeError, match="weight must have dtype"):
        module.weight = torch.ones(3, dtype=torch.int64)


def test_repr() -> None:
    weight = randn(3, 4)
    assert repr(Compander(weight, "tanh")) == "Compander('tanh')"
    made = Compander(weight, per_channel=True, channel_dim=-1, learnable=False)
    assert repr(made) == "Compander('arctan', channels=4, channel_dim=1, learnable=False)"
