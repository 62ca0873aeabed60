"""The weight compander under ``torch.func``, in compiled code, and over sharded weights."""

from __future__ import annotations

from typing import Any

import fusee
import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacrev, jvp, vmap

from tests.harness.measure import same_bits
from tests.harness.processes import run_in_two_processes
from tests.reparam.curves import KINDS, oracle

EMULATED = fusee.engine() == "emulated"


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


def loop(function: Any, *batches: Tensor) -> Tensor:
    return torch.stack([function(*items) for items in zip(*batches, strict=True)])


@pytest.mark.parametrize("shape", [(3, 5), (3,), (), (0, 5), (3, 0), (1, 4)])
@pytest.mark.parametrize("a_channels", [False, True])
@pytest.mark.parametrize("b_channels", [False, True])
def test_vmap_of_every_combination(
    shape: tuple[int, ...], a_channels: bool, b_channels: bool
) -> None:
    """Whichever of the three is batched, along whichever dimension, with whichever parameters."""
    channels = shape[0] if shape else 1
    sizes = [(channels,) if each else (1,) for each in (a_channels, b_channels)]
    v = torch.randn(4, *shape, dtype=torch.float64)
    a, b = (torch.rand(4, *size, dtype=torch.float64) + 0.5 for size in sizes)

    def scalar(v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return fusee.compand(v, a, b, "asinh").square().sum()

    for places in ((0, 0, 0), (0, None, None), (None, 0, None), (None, None, 0), (None, 0, 0)):
        given = [t if place == 0 else t[0] for t, place in zip((v, a, b), places, strict=True)]
        every = [
            t if place == 0 else t[0].expand(t.shape)
            for t, place in zip((v, a, b), places, strict=True)
        ]
        actual = vmap(lambda *t: fusee.compand(*t, "asinh"), places)(*given)
        torch.testing.assert_close(actual, loop(lambda *t: fusee.compand(*t, "asinh"), *every))
        last = tuple(None if place is None else -1 for place in places)
        moved = [
            t if place is None else t.movedim(0, -1) for t, place in zip(given, places, strict=True)
        ]
        torch.testing.assert_close(
            vmap(lambda *t: fusee.compand(*t, "asinh"), last)(*moved), actual
        )
        for argument in range(3):
            per_sample = vmap(grad(scalar, argument), places)(*given)
            expected = loop(grad(scalar, argument), *every)
            torch.testing.assert_close(per_sample, expected)


def test_vmap_of_parameters_without_dimensions() -> None:
    v, a = torch.randn(6, 7), torch.rand(6) + 0.5
    torch.testing.assert_close(
        vmap(lambda v, a: fusee.compand(v, a, a.square()))(v, a),
        loop(lambda v, a: fusee.compand(v, a, a * a), v, a),
    )


def test_vmap_over_channels_is_one_call_of_channels() -> None:
    v, a = torch.randn(6, 7), torch.rand(6) + 0.5
    assert same_bits(vmap(lambda v, a: fusee.compand(v, a, 0.5))(v, a), fusee.compand(v, a, 0.5))


def test_nested_vmap_with_jacobians() -> None:
    v = torch.rand(2, 3, 4, dtype=torch.float64) + 0.5
    a = torch.rand(2, 1, dtype=torch.float64) + 0.5

    def function(v: Tensor, a: Tensor) -> Tensor:
        return fusee.compand(v, a, 0.5, "symlog")

    def expected(v: Tensor, a: Tensor) -> Tensor:
        return oracle(v, a, 0.5, "symlog")

    for argument in (0, 1):
        actual = vmap(vmap(jacrev(function, argument), (0, None)))(v, a)
        torch.testing.assert_close(actual, vmap(vmap(jacrev(expected, argument), (0, None)))(v, a))

    def total(f: Any) -> Any:
        return lambda v, a: f(v, a).square().sum()

    torch.testing.assert_close(
        vmap(hessian(total(function), (0, 1)))(v, a), vmap(hessian(total(expected), (0, 1)))(v, a)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_jvp_of_gradients(kind: str) -> None:
    """Forward mode over reverse mode, in all three arguments, of channels."""
    v = torch.rand(3, 4, dtype=torch.float64) + 0.25
    a, b = (torch.rand(3, dtype=torch.float64) + 0.5 for _ in range(2))
    tangents = tuple(torch.randn_like(t) for t in (v, a, b))

    def first(f: Any) -> Any:
        return grad(lambda *t: f(*t, kind).square().sum(), (0, 1, 2))

    actual = jvp(first(fusee.compand), (v, a, b), tangents)
    torch.testing.assert_close(
        actual, jvp(first(oracle), (v, a, b), tangents), rtol=1e-9, atol=1e-12
    )


@pytest.mark.tracing
def test_numbers_that_change_between_compiled_calls() -> None:
    """Schedules of a and b as Python numbers: one graph each, and the right results."""
    compiled = torch.compile(fusee.compand, fullgraph=True, backend="aot_eager")
    v = torch.randn(5, 3)
    for a, b in ((1.0, 0.5), (1.5, 0.5), (2.0, 0.25), (3, 1)):
        assert same_bits(compiled(v, a, b), fusee.compand(v, a, b))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(v, -1.0, 0.5)


@pytest.mark.tracing
def test_compiled_module_with_learned_parameters() -> None:
    """A training step of a layer whose weight is companded, compiled whole, against eager."""

    def step(v: Tensor, log_a: Tensor, log_b: Tensor, x: Tensor) -> Tensor:
        weight = fusee.compand(v, log_a.exp(), log_b.exp(), "arctan")
        return torch.nn.functional.linear(x, weight).square().mean()

    leaves = [torch.randn(6, 4), torch.zeros(6), torch.zeros(1)]
    leaves = [t.requires_grad_() for t in leaves]
    x = torch.randn(8, 4)
    compiled = torch.compile(step, fullgraph=True)
    actual = torch.autograd.grad(compiled(*leaves, x), leaves)
    expected = torch.autograd.grad(step(*leaves, x), leaves)
    torch.testing.assert_close(actual, expected)


SHARDED = """
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
import fusee
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
v, g = torch.randn(6, 4), torch.randn(6, 4)
for channels in (False, True):
    a, b = (torch.rand(6 if channels else 1) + 0.5 for _ in range(2))
    plain = [t.clone().requires_grad_() for t in (v, a, b)]
    w = fusee.compand(*plain)
    w.backward(g)
    for of_v in (Replicate(), Shard(0), Shard(1)):
        of_a = Shard(0) if channels and of_v == Shard(0) else Replicate()
        placed = [
            torch.nn.Parameter(distribute_tensor(t, mesh, [where]))
            for t, where in ((v, of_v), (a, of_a), (b, of_a))
        ]
        sharded = fusee.compand(*placed)
        assert isinstance(sharded, DTensor) and sharded.placements == (of_v,), sharded.placements
        torch.testing.assert_close(sharded.full_tensor(), w.detach())
        sharded.backward(distribute_tensor(g, mesh, [of_v]))
        for one, other in zip(placed, plain):
            torch.testing.assert_close(one.grad.full_tensor(), other.grad)
        # Numbers, and a list of one.
        again = fusee.compand(placed[0], 1.5, 0.5)
        torch.testing.assert_close(again.full_tensor(), fusee.compand(v, 1.5, 0.5))
        (again,) = fusee.compand_foreach([placed[0]], placed[1], placed[2])
        assert again.placements == (of_v,)
        torch.testing.assert_close(again.full_tensor(), w.detach())
        back = fusee.compand_inverse(again, placed[1], placed[2])
        torch.testing.assert_close(back.full_tensor(), v, rtol=1e-4, atol=1e-6)
try:
    fusee.compand(placed[0], torch.ones(3), 0.5)
except ValueError as error:
    assert "a must have one element" in str(error)
else:
    raise AssertionError("no error")
"""


@pytest.mark.skipif(EMULATED, reason="the sharding of an operator does not depend on its engine")
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="no gloo in this torch")
def test_sharded_weights(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """DTensors in two processes: results and gradients are those of whole tensors."""
    run_in_two_processes(SHARDED, tmp_path)
