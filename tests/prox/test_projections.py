"""Projections onto sparse sets: against every support, their optimality, ties, ends and programs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import combinations

import fusee
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.harness.measure import same_bits, ulps
from tests.harness.spec import ALL_DTYPES

ROWS = {
    "nonnegative": fusee.project_top_k_nonnegative,
    "simplex": fusee.project_top_k_simplex,
    "ball": fusee.project_top_k_ball,
}


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


def simplex(v: Tensor, total: float) -> Tensor:
    """The projection of one vector onto a simplex, by the largest of the thresholds of its prefixes."""
    sums = v.sort(descending=True).values.cumsum(0) - total
    tau = (sums / torch.arange(1, v.numel() + 1)).max()
    return (v - tau).clamp(min=0)


def ball(v: Tensor, radius: float) -> Tensor:
    norm = v.norm()
    return v * (radius / norm) if norm > radius else v.clone()


CONVEX: dict[str, Callable[[Tensor, float], Tensor]] = {
    "nonnegative": lambda v, _: v.clamp(min=0),
    "simplex": simplex,
    "ball": ball,
}


def supports(n: int, k: int) -> Iterator[list[int]]:
    """Every choice of at most k of n places."""
    for size in range(min(k, n) + 1):
        yield from (list(choice) for choice in combinations(range(n), size))


def least_distance(kind: str, v: Tensor, k: int, size: float) -> float:
    """The distance of v to the set: the least over every support."""
    best = math.inf
    for chosen in supports(v.numel(), k):
        if not chosen and kind == "simplex":
            continue
        x = torch.zeros_like(v)
        if chosen:
            x[chosen] = CONVEX[kind](v[chosen], size)
        best = min(best, float((x - v).norm()))
    return best


def call(kind: str, v: Tensor, k: float, size: float = 1.0, dim: int = -1) -> Tensor:
    options = {"simplex": {"total": size}, "ball": {"radius": size}}.get(kind, {})
    return ROWS[kind](v, k, dim=dim, **options)


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("draw", ["normal", "integers", "small", "negative"])
def test_nearest_of_every_support(kind: str, draw: str) -> None:
    """No sparse point of the set is nearer, over all supports of up to five entries."""
    for n in (1, 2, 3, 5):
        v = torch.randn(n, dtype=torch.float64)
        v = {"normal": v, "integers": (2 * v).round(), "small": v / 50, "negative": -v.abs()}[draw]
        for k in range(1, n + 2):
            for size in (0.3, 2.0):
                x = call(kind, v, k, size)
                assert (x != 0).sum() <= k
                if kind == "simplex":
                    assert bool((x >= 0).all()) and abs(x.sum() - size) < 1e-14 * max(size, 1)
                elif kind == "ball":
                    assert x.norm() <= size * (1 + 1e-14)
                else:
                    assert bool((x >= 0).all())
                distance = float((x - v).norm())
                assert distance <= least_distance(kind, v, k, size) + 1e-13


def test_groups_nearest_of_every_support() -> None:
    """The groups that are kept lose the least in the norm of the weights."""
    for draw in range(20):
        x = torch.randn(6, 3, dtype=torch.float64)
        weights = torch.rand(6, dtype=torch.float64) + 0.1
        for k in range(8):
            y = fusee.project_top_k_groups(x, k, weights=weights)
            losses = weights * x.square().sum(1)
            best = min(losses.sum() - losses[chosen].sum() for chosen in supports(6, k))
            lost = (weights * (x - y).square().sum(1)).sum()
            assert lost <= best + 1e-13, draw
            assert (y != 0).any(1).sum() == min(k, 6)


def test_groups_of_every_kind() -> None:
    """Filters, channels, shapes of filters, single weights and the whole, by hand."""
    w = torch.zeros(2, 3, 2)
    w[0, 1] = 3.0
    w[1, 2, 0] = 4.0
    kept = {0: (0, slice(None)), 1: (slice(None), 1), (0, 1): (0, 1)}
    for dim, place in kept.items():
        expected = torch.zeros_like(w)
        expected[place] = w[place]
        assert torch.equal(fusee.project_top_k_groups(w, 1, dim=dim), expected)
    one = fusee.project_top_k_groups(w, 1, dim=(0, 1, 2))
    assert one.nonzero().tolist() == [[1, 2, 0]]
    assert torch.equal(fusee.project_top_k_groups(w, 1, dim=()), w)
    assert not fusee.project_top_k_groups(w, 0, dim=()).any()


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_equals_keep_the_first(dtype: torch.dtype) -> None:
    v = torch.tensor([1.0, 2.0, -2.0, 2.0, 1.0, 2.0], dtype=dtype)
    places = {
        kind: call(kind, v, 2, 100.0).nonzero().flatten().tolist()
        for kind in ("nonnegative", "ball")
    }
    assert places == {"nonnegative": [1, 3], "ball": [1, 2]}
    half = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0, 0.0], dtype=dtype)
    assert torch.equal(fusee.project_top_k_simplex(v, 2), half)
    groups = fusee.project_top_k_groups(v, 3)
    assert groups.nonzero().flatten().tolist() == [1, 2, 3]
    # Zeros are equal too, and stay zero.
    assert not fusee.project_top_k_nonnegative(torch.zeros(4, dtype=dtype), 2).any()


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounded_once(kind: str, dtype: torch.dtype) -> None:
    """Half types are what float32 gives, rounded; float32 is near float64."""
    v = torch.randn(50, 33).to(dtype)
    x = call(kind, v, 7, 2.0)
    exact = call(kind, v.double(), 7, 2.0)
    assert x.dtype == dtype
    if dtype == torch.float32:
        assert ulps(x, exact) * torch.finfo(torch.float64).eps <= 1e-6
    else:
        assert same_bits(x, call(kind, v.float(), 7, 2.0).to(dtype))


@pytest.mark.parametrize("kind", ROWS)
def test_a_real_k_is_rounded_down(kind: str) -> None:
    v = torch.randn(5, 8)
    assert torch.equal(call(kind, v, 3.99), call(kind, v, 3))
    assert torch.equal(call(kind, v, 1e300), call(kind, v, 8))
    groups = fusee.project_top_k_groups(v, torch.tensor(2.5))
    assert torch.equal(groups, fusee.project_top_k_groups(v, 2))


def test_ends_of_k() -> None:
    v = torch.randn(5, 8)
    assert torch.equal(fusee.project_top_k_nonnegative(v, 8), v.relu())
    assert torch.equal(fusee.project_top_k_groups(v, 5), v)
    for k in (0, -3, -math.inf):
        for function in (
            fusee.project_top_k_nonnegative,
            fusee.project_top_k_ball,
            fusee.project_top_k_groups,
        ):
            assert not function(v, k).any()
    convex = torch.stack([simplex(row, 1.0) for row in v.double()])
    torch.testing.assert_close(fusee.project_top_k_simplex(v.double(), 8), convex)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_simplex_over_binades(scale: float) -> None:
    """The entries sum to the total and share one tau, however far apart the numbers are."""
    for spread in (1, 20):
        v = torch.randn(40, dtype=torch.float64) * torch.logspace(-spread, 0, 40).double() * scale
        for total in (scale, scale * 1e-10, scale * 1e10):
            x = fusee.project_top_k_simplex(v, 17, total=total)
            assert abs(x.sum() / total - 1) < 1e-12
            tau = (v - x)[x > 0]
            assert (tau.max() - tau.min()) <= 1e-14 * max(scale, total)
            others = v.sort(descending=True).values[:17]
            assert bool((others[int((x > 0).sum()) :] <= tau.max() + 1e-14 * scale).all())


def test_ball_of_huge_and_tiny_numbers() -> None:
    """Neither squares that overflow nor ones that vanish."""
    for size in (1e-38, 1e-30, 1e25, 3e38):
        v = torch.tensor([3.0, -4.0, 1.0]) / 4 * size
        x = fusee.project_top_k_ball(v, 2, radius=size / 2)
        expected = torch.tensor([0.3, -0.4, 0.0]) * size
        torch.testing.assert_close(x / size, expected / size, rtol=1e-5, atol=0)
        if size < 1e38:
            assert torch.equal(fusee.project_top_k_ball(v, 3, radius=3.4e38), v)


@pytest.mark.parametrize("kind", ROWS)
def test_nothing_left_to_project(kind: str) -> None:
    """A second projection changes nothing, or as little as rounding."""
    v = torch.randn(20, 9, dtype=torch.float64)
    once = call(kind, v, 4, 1.5)
    torch.testing.assert_close(call(kind, once, 4, 1.5), once, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("kind", ROWS)
def test_infinity(kind: str) -> None:
    """As documented: zero or kept where that has a meaning, otherwise NaN in its row alone."""
    v = torch.tensor([[math.inf, 0.0, 1.0], [-math.inf, 1.0, 0.5], [0.5, 0.25, 0.0]])
    v.requires_grad_()
    x = call(kind, v, 2, 0.5)
    expected = {
        "nonnegative": [[math.inf, 0.0, 1.0], [0.0, 1.0, 0.5]],
        "simplex": [[math.nan] * 3, [0.0, 0.5, 0.0]],
        "ball": [[math.nan] * 3] * 2,
    }[kind]
    torch.testing.assert_close(x[:2], torch.tensor(expected), equal_nan=True)
    assert x[2].isfinite().all()
    (grad,) = torch.autograd.grad(x.sum(), v)
    assert torch.equal(grad.isnan(), x.isnan())


def test_gradients_by_hand() -> None:
    """The mask; the mask less its mean; the tangent of the sphere."""
    v = torch.tensor([0.75, 1.0, 0.5, -2.0], dtype=torch.float64, requires_grad=True)
    g = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    kept = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)

    def grad(output: Tensor) -> Tensor:
        return torch.autograd.grad(output, v, g)[0]

    assert torch.equal(grad(fusee.project_top_k_nonnegative(v, 2)), g * kept)
    expected = torch.tensor([-0.5, 0.5, 0.0, 0.0], dtype=torch.float64)
    assert torch.equal(grad(fusee.project_top_k_simplex(v, 2)), expected)
    largest = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    unit = (v * largest).detach() / math.sqrt(5)
    expected = largest * (g - unit * (unit @ g)) / math.sqrt(5)
    torch.testing.assert_close(grad(fusee.project_top_k_ball(v, 2)), expected)
    assert torch.equal(grad(fusee.project_top_k_ball(v, 2, radius=9.0)), g * largest)
    assert torch.equal(grad(fusee.project_top_k_groups(v, 2)), g * largest)


def test_k_has_no_gradient() -> None:
    v, k = torch.randn(4, 3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    output = fusee.project_top_k_groups(v, k)
    assert torch.autograd.grad(output.sum(), k, allow_unused=True) == (None,)


def test_patterns_of_blocks() -> None:
    """N:M by vmap: two of every four entries are left."""
    w = torch.randn(8, 12)
    blocks = torch.vmap(lambda block: fusee.project_top_k_groups(block, 2))(w.reshape(-1, 4))
    kept = blocks.reshape(8, 3, 4)
    assert bool(((kept != 0).sum(-1) == 2).all())
    assert torch.equal(kept.sum(-1), (w.reshape(8, 3, 4) * (kept != 0)).sum(-1))


@pytest.mark.threads
@pytest.mark.parametrize("kind", ROWS)
def test_one_long_row_on_several_threads(kind: str) -> None:
    """The same places on any number of threads, and the same numbers up to the order of sums."""
    v = torch.randn(300_000)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(call(kind, v, 1000))
    assert torch.equal(results[0] != 0, results[1] != 0)
    assert ulps(*results) <= 4


@pytest.mark.tracing
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", ROWS)
def test_export(kind: str, strict: bool) -> None:
    """They export to a program of torch's operators."""

    class Module(torch.nn.Module):
        def forward(self, v: Tensor) -> Tensor:
            return call(kind, v, 3, 1.5)

    v = torch.randn(4, 7)
    program = torch.export.export(Module(), (v,), strict=strict)
    assert ulps(program.module()(v), Module()(v)) <= 2


def test_groups_without_weight_do_not_count() -> None:
    """They are kept, and k others are."""
    v = torch.tensor([[5.0, 1.0], [4.0, 0.0], [3.0, 1.0], [2.0, 0.0]])
    weights = torch.tensor([0.0, 1.0, 1.0, 1.0])
    x = fusee.project_top_k_groups(v, 1, weights=weights)
    assert x.any(1).tolist() == [True, True, False, False]
    assert same_bits(x[:2], v[:2])


@pytest.mark.parametrize("kind", ROWS)
def test_numbers_of_other_libraries(kind: str) -> None:
    v = torch.randn(3, 5)
    expected = ROWS[kind](v, 2, dim=0)
    assert torch.equal(ROWS[kind](v, np.int64(2), dim=np.int32(0)), expected)
    assert torch.equal(ROWS[kind](v, np.float32(2), dim=0), expected)
    assert torch.equal(ROWS[kind](v, 10**400), ROWS[kind](v, 5))
    kept = fusee.project_top_k_groups(v, np.int64(1), dim=np.int64(1))
    assert torch.equal(kept, fusee.project_top_k_groups(v, 1, dim=1))
    assert torch.equal(fusee.project_top_k_groups(v, 10**400), v)
