"""The group envelope and its operator in the plainest form: every breakpoint is tried."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tests.harness.spec import Arguments, ErrorInput, Maker


def groups_of(input: Tensor, dim: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The elements as (groups, elements), and how to put them back."""
    if input.dim() == 0:
        return input.reshape(1, 1), lambda x: x.reshape(())
    dims = sorted(d % input.dim() for d in ([dim] if isinstance(dim, int) else dim))
    others = [d for d in range(input.dim()) if d not in dims]
    moved = input.permute(dims + others)
    groups = math.prod(input.shape[d] for d in dims)
    size = math.prod(input.shape[d] for d in others)
    back = [(dims + others).index(d) for d in range(input.dim())]
    return moved.reshape(groups, size), lambda x: x.reshape(moved.shape).permute(back)


def weights_of(weights: Any, v: Tensor) -> Tensor:
    """The weights of the groups of (groups, elements)."""
    if isinstance(weights, Tensor):
        return weights
    size = max(v.shape[1], 1)
    number = {None: 1.0, "size": size, "inverse_size": 1 / size}[weights]
    return v.new_full((v.shape[0],), number)


def norms_of(v: Tensor) -> Tensor:
    """Norms whose derivatives at zero are zero."""
    squares = v.square().sum(1)
    return torch.where(squares > 0, torch.where(squares > 0, squares, 1.0).sqrt(), 0.0)


def root(a: Tensor, b: Tensor, k: Tensor) -> Tensor:
    """The theta with sum clip(a / theta - b, 0, 1) = k; zero where at most k of the a are positive."""
    if a.numel() == 0:
        return 0 * k
    positive = a.detach() > 0
    safe = torch.where(positive, a.detach(), 1.0)
    points = torch.cat([b.detach() / safe, (1 + b.detach()) / safe, k.new_zeros(1)])
    points = torch.where(torch.cat([positive, positive, positive[:1] | True]), points, 0.0)
    shares = torch.where(positive, points[:, None] * a.detach() - b.detach(), 0.0).clamp(0, 1)
    eta = torch.where(shares.sum(1) <= k.detach(), points, 0.0).amax()
    saturated = positive & ((1 + b.detach()) / safe <= eta)
    middle = positive & ~saturated & (b.detach() / safe <= eta)
    some = middle.any()
    rest = k - saturated.sum() + torch.where(middle, b, 0.0).sum()
    theta = torch.where(middle, a, 0.0).sum() / torch.where(some, rest, 1.0)
    last = torch.where(saturated, a / (1 + b), math.inf).amin().detach()
    return torch.where(positive.sum() <= k, 0.0, torch.where(some, theta, last))


def scalar(value: Any, like: Tensor) -> Tensor:
    return torch.as_tensor(value, device=like.device, dtype=like.dtype).reshape(())


def envelope_oracle(
    input: Tensor, k: Any, *, dim: Any = 0, weights: Any = None, debiased: bool = False
) -> Tensor:
    v, _ = groups_of(input, dim)
    k, z = scalar(k, input), weights_of(weights, v).sqrt() * norms_of(v)
    theta = root(z, torch.zeros_like(z), k)
    above = z >= theta
    others = torch.where(above, 0.0, z).sum()
    rest = torch.where(others > 0, k - above.sum(), 1.0)
    squares = z.square()
    of_above = squares.sum() * 0 if debiased else torch.where(above, squares, 0.0).sum()
    less = torch.where(above, 0.0, squares).sum() if debiased else 0.0
    return (of_above + others.square() / rest - less) / 2


def prox_oracle(
    input: Tensor,
    k: Any,
    lam: Any,
    *,
    dim: Any = 0,
    weights: Any = None,
    metric: Any = None,
    debiased: bool = False,
) -> Tensor:
    v, back = groups_of(input, dim)
    k, lam = scalar(k, input), scalar(lam, input)
    d, n = weights_of(weights, v), norms_of(v)
    H = torch.ones_like(n) if metric is None else metric.reshape(-1)
    if debiased and float(lam.detach() * (d / H).max()) >= 1:
        keys = d.sqrt() * n * H.sqrt()
        kept = keys.detach().argsort(descending=True, stable=True)[: int(k)]
        mask = torch.zeros_like(n).index_fill(0, kept, 1.0)
        return back(v * (mask[:, None] + 0 * (k + lam)))
    h = H - lam * d if debiased else H
    theta = root(d.sqrt() * n * H / h, lam * d / h, k)
    theta = torch.where(theta.isinf(), 0.0, theta)  # of k <= 0, see below
    most = H / (h + lam * d)
    middle = (H - lam * theta * d.sqrt() / torch.where(n > 0, n, 1.0)) / h
    scale = torch.where(d > 0, torch.minimum(middle, most).clamp(min=0), most)
    zero = (k <= 0) & (d > 0) & (lam > 0)
    unbound = (theta == 0) | (lam == 0) | (d == 0)
    scale = torch.where(n > 0, scale, torch.where(unbound, most, 0.0))
    scale = torch.where(zero, 0.0, scale)
    return back(v * scale[:, None])


def shared_errors(given: Arguments, make: Maker) -> Iterator[ErrorInput]:
    """Bad input, dimensions, weights and k: of the value and of the operator."""
    x = given["input"]
    for name, bad in (("a list", [1.0]), ("None", None), ("a number", 1.0)):
        yield ErrorInput(name, {**given, "input": bad}, TypeError, "input must be a Tensor")
    integers = {**given, "input": make.integers(5, 4, 3)}
    yield ErrorInput("integers", integers, TypeError, "input must have dtype float32")
    for dim in (2, -3, (0, 2)):
        yield ErrorInput(f"dim {dim}", {**given, "dim": dim}, IndexError, "dim must be in")
    for dim in (1.0, "0", None, True, (0.0,)):
        yield ErrorInput(f"dim {dim!r}", {**given, "dim": dim}, TypeError, "dim must be an int")
    repeated = {**given, "dim": (0, -2)}
    yield ErrorInput("dim repeated", repeated, ValueError, "dim must not repeat")
    yield ErrorInput("k nan", {**given, "k": math.nan}, ValueError, "k must not be NaN")
    for name in ["k", "lam"] if "lam" in given else ["k"]:
        wrong = {**given, name: make.tensor(math.nan)}
        message = f"{name} must be not {'NaN' if name == 'k' else 'negative'}, got nan"
        yield ErrorInput(f"{name} a tensor of nan", wrong, ValueError, message, values=True)
    yield from number_errors("k", given, make)
    yield ErrorInput("weights", {**given, "weights": "sizes"}, ValueError, "weights must be 'size'")
    yield ErrorInput("weights 1", {**given, "weights": 1.0}, TypeError, "weights must be a Tensor")
    counts = {**given, "weights": make.integers(5, 4)}
    yield ErrorInput("weights of integers", counts, TypeError, "weights must have dtype")
    for shape in ((), (1,), (3,), (4, 1)):
        wrong = {**given, "weights": make.uniform(*shape)}
        yield ErrorInput(f"weights {shape}", wrong, ValueError, r"weights must have shape \(4,\)")
    for bad in (-1.0, math.nan, math.inf):
        wrong = {**given, "weights": make.tensor([1.0, bad, 1.0, 0.5])}
        message = "weights must be finite and not negative, got"
        yield ErrorInput(f"weights of {bad}", wrong, ValueError, message, values=True)
    assert x.shape == (4, 3)


def number_errors(name: str, given: Arguments, make: Maker) -> Iterator[ErrorInput]:
    """What is not a number, or is several."""
    for bad in ("1", None, [1.0], True):
        message = f"{name} must be a number or a Tensor, got {type(bad).__name__}"
        yield ErrorInput(f"{name} {bad}", {**given, name: bad}, TypeError, message)
    several = {**given, name: make.uniform(2)}
    yield ErrorInput(f"two {name}", several, ValueError, f"{name} must have one element")
    for dtype in (torch.bool, torch.complex64):
        wrong = {**given, name: make.tensor([1], dtype)}
        yield ErrorInput(f"{name} {dtype}", wrong, TypeError, f"{name} must be real, got dtype")
