"""The Monarch layer: a drop-in for ``torch.nn.Linear``."""

from __future__ import annotations

import copy
import io
from typing import Any

import fusee
import pytest
import torch
import torch.nn.functional as F
from torch import nn

MonarchLinear = fusee.nn.MonarchLinear
SIZES = [(8, 8, 2), (12, 20, 4), (20, 12, 4), (7, 5, 3), (5, 7, 4), (3, 2, 8), (1, 1, 1)]
"""in_features, out_features, nblocks."""


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [None, 1])
def test_is_its_dense_layer(sizes: tuple[int, int, int], bias: bool, rank: int | None) -> None:
    layer = MonarchLinear(*sizes[:2], bias, sizes[2], rank, dtype=torch.float64)
    for shape in ((), (3,), (2, 0), (2, 3, 2)):
        x = torch.randn(*shape, sizes[0], dtype=torch.float64)
        result = layer(x)
        torch.testing.assert_close(result, F.linear(x, layer.weight, layer.bias))
        torch.testing.assert_close(layer.to_linear()(x), result)
        assert result.is_contiguous()


@pytest.mark.parametrize("sizes", SIZES)
def test_gradients_are_those_of_the_dense_layer(sizes: tuple[int, int, int]) -> None:
    layer = MonarchLinear(*sizes[:2], True, sizes[2], dtype=torch.float64)
    x = torch.randn(3, sizes[0], dtype=torch.float64, requires_grad=True)
    wanted = [x, *layer.parameters()]
    g = torch.randn(3, sizes[1], dtype=torch.float64)
    expected = torch.autograd.grad(F.linear(x, layer.weight, layer.bias), wanted, g)
    torch.testing.assert_close(torch.autograd.grad(layer(x), wanted, g), expected)


@pytest.mark.parametrize(
    "sizes", [(256, 256, 4), (256, 256, 16), (250, 130, 8), (64, 512, 8), (512, 64, 8)]
)
def test_output_begins_with_the_variance_of_a_dense_layer(sizes: tuple[int, int, int]) -> None:
    x = torch.randn(500, sizes[0])

    def variance(make: Any) -> float:
        return sum(float(make()(x).detach().var()) for _ in range(8)) / 8

    ours = variance(lambda: MonarchLinear(*sizes[:2], False, sizes[2]))
    dense = variance(lambda: nn.Linear(*sizes[:2], bias=False))
    assert ours == pytest.approx(dense, rel=0.15)
    assert dense == pytest.approx(1 / 3, rel=0.1)


@pytest.mark.parametrize(
    "sizes", [(64, 64, 16), (64, 64, 64), (64, 10, 4), (3, 64, 4), (512, 10, 16)]
)
def test_every_input_reaches_every_output(sizes: tuple[int, int, int]) -> None:
    """Of the default rank no tile of the matrix is empty, however many blocks there are."""
    assert bool((MonarchLinear(*sizes[:2], nblocks=sizes[2]).weight != 0).all())


def test_fewest_weights_near_the_root() -> None:
    counts = {k: MonarchLinear(64, 64, False, k).w1.numel() for k in (2, 4, 8, 16, 32)}
    assert min(counts, key=counts.__getitem__) == 8


def test_bias_begins_as_that_of_a_dense_layer() -> None:
    bias = MonarchLinear(16, 5000).bias
    assert bias is not None
    bias = bias.detach()
    assert float(bias.abs().max()) <= 0.25 and float(bias.var()) == pytest.approx(
        0.25**2 / 3, rel=0.1
    )


@pytest.mark.parametrize("sizes", SIZES)
def test_from_linear_is_the_nearest(sizes: tuple[int, int, int]) -> None:
    linear = nn.Linear(*sizes[:2], dtype=torch.float64)
    linear.weight.requires_grad_(False)
    layer = MonarchLinear.from_linear(linear.eval(), sizes[2])
    _, _, error = fusee.monarch_project(linear.weight, sizes[2])
    left = (layer.weight - linear.weight).norm()
    assert float(left) <= float(error) + 1e-12
    assert layer.bias is not None and torch.equal(layer.bias, linear.bias)
    assert layer.bias is not linear.bias and not layer.training
    assert not layer.w1.requires_grad and layer.bias.requires_grad


def test_there_and_back() -> None:
    layer = MonarchLinear(12, 8, nblocks=4)
    again = MonarchLinear.from_linear(layer.to_linear(), 4)
    x = torch.randn(5, 12)
    torch.testing.assert_close(again(x), layer(x))


def test_state_dict_copies_and_pickles() -> None:
    layer = MonarchLinear(10, 6, nblocks=4)
    x = torch.randn(2, 10)
    assert list(layer.state_dict()) == ["w1", "w2", "bias"]
    other = MonarchLinear(10, 6, nblocks=4)
    other.load_state_dict(layer.state_dict())
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for same in (other, copy.deepcopy(layer), loaded):
        assert torch.equal(same(x), layer(x))
    with torch.device("meta"):
        assert MonarchLinear(10, 6).w1.is_meta
    assert MonarchLinear(10, 6, dtype=torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    assert repr(layer).startswith(
        "MonarchLinear(in_features=10, out_features=6, bias=True, nblocks=4"
    )


@pytest.mark.tracing
def test_compiles_without_breaks() -> None:
    layer = MonarchLinear(10, 6, nblocks=4)
    compiled = torch.compile(layer, fullgraph=True)
    for rows in (3, 5):
        x = torch.randn(rows, 10, requires_grad=True)
        torch.testing.assert_close(compiled(x), layer(x))
        actual = torch.autograd.grad(compiled(x).square().sum(), [x, *layer.parameters()])
        expected = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
        torch.testing.assert_close(actual, expected)


def test_autocast() -> None:
    layer, x = MonarchLinear(12, 8), torch.randn(3, 12)
    with torch.autocast("cpu", torch.bfloat16):
        result = layer(x)
    assert result.dtype == nn.Linear(12, 8).bfloat16()(x.bfloat16()).dtype
    torch.testing.assert_close(result.float(), layer(x), rtol=0.05, atol=0.05)


def test_learns() -> None:
    """A Monarch matrix can be found from what it does."""
    target = MonarchLinear(8, 8, nblocks=2)
    layer = MonarchLinear(8, 8, nblocks=2)
    x = torch.randn(32, 8)
    y = target(x).detach()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.03)
    first = float(F.mse_loss(layer(x).detach(), y))
    for _ in range(150):
        optimizer.zero_grad()
        loss = F.mse_loss(layer(x), y)
        loss.backward()
        optimizer.step()
    assert float(loss) < 0.05 * first


@pytest.mark.parametrize(
    ("kind", "match", "changed"),
    [
        (TypeError, "in_features must be an int", {"in_features": 4.0}),
        (ValueError, "out_features must not be negative, got -1", {"out_features": -1}),
        (TypeError, "nblocks must be an int", {"nblocks": "2"}),
        (ValueError, "nblocks must be positive, got 0", {"nblocks": 0}),
        (ValueError, "rank must be positive, got 0", {"rank": 0}),
    ],
)
def test_errors(kind: type[Exception], match: str, changed: dict[str, Any]) -> None:
    with pytest.raises(kind, match=match):
        MonarchLinear(**{"in_features": 4, "out_features": 4, **changed})


def test_errors_of_inputs() -> None:
    with pytest.raises(ValueError, match="input must have 10 features"):
        MonarchLinear(10, 6)(torch.randn(3, 12))  # as many as the padded ones
    with pytest.raises(TypeError, match=r"linear must be a torch.nn.Linear, got Conv2d"):
        MonarchLinear.from_linear(nn.Conv2d(1, 1, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize(("rank", "exact"), [(1, True), (3, False)])
def test_a_box_goes_through_both_factors(rank: int, exact: bool) -> None:
    """As tight as the dense layer where the tiles have rank one."""
    layer = fusee.nn.MonarchLinear(10, 7, nblocks=3, rank=rank, dtype=torch.float64)
    x = torch.randn(4, 10).double()
    lower, upper = fusee.interval_bounds(layer, x - 0.1, x + 0.1)
    dense = fusee.interval_bounds(layer.to_linear(), x - 0.1, x + 0.1)
    assert bool((lower <= dense[0] + 1e-12).all() and (dense[1] <= upper + 1e-12).all())
    assert torch.allclose(upper - lower, dense[1] - dense[0]) is exact
    with pytest.raises(NotImplementedError, match="no sound interval rule for MonarchLinear"):
        fusee.interval_bounds(layer, x, x, sound=True)
