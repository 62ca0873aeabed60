"""The projections onto sparse sets by sorting, in plain torch operators and the dtype of the input."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rank(keys: Tensor, dim: int) -> Tensor:
    """The places of the keys along ``dim`` in falling order, the first of equals first."""
    return keys.argsort(dim=dim, descending=True, stable=True).argsort(dim=dim)


def largest(keys: Tensor, k: float, dim: int) -> Tensor:
    """Which keys are the floor(k) largest along ``dim``, the first of equals."""
    return rank(keys, dim) < min(max(k, 0), keys.shape[dim]) // 1


def groups_oracle(
    input: Tensor,
    k: float | Tensor,
    dim: int | tuple[int, ...] = 0,
    weights: str | Tensor | None = None,
) -> Tensor:
    if input.dim() == 0:
        return input * (1.0 if k >= 1 else 0.0)
    dims = sorted(d % input.dim() for d in ((dim,) if isinstance(dim, int) else dim))
    others = [d for d in range(input.dim()) if d not in dims]
    squares = input.detach().square()
    squares = squares.sum(others, keepdim=True) if others else squares
    keys = squares.reshape(-1)
    weight = torch.ones_like(keys)
    if isinstance(weights, Tensor):
        weight, keys = weights, keys * weights
    keep = largest(keys, float(k), 0) | (weight == 0)
    return input * keep.reshape(squares.shape).to(input.dtype)


def nonnegative_oracle(input: Tensor, k: float, dim: int = -1) -> Tensor:
    v = input.reshape(1) if input.dim() == 0 else input
    keep = largest(v.detach(), k, dim) & (v > 0)
    return torch.where(keep, v, 0.0).reshape(input.shape)


def simplex_oracle(input: Tensor, k: float, total: float = 1.0, dim: int = -1) -> Tensor:
    """By the rule of Duchi et al.: the last of the sorted entries that is above its threshold."""
    v = input.reshape(1) if input.dim() == 0 else input
    kept = torch.where(largest(v.detach(), k, dim), v.detach(), -math.inf)
    ordered = kept.movedim(dim, -1).sort(descending=True).values
    count = torch.arange(1, ordered.shape[-1] + 1, dtype=v.dtype, device=v.device)
    above = ordered > (ordered.cumsum(-1) - total) / count
    number = above.sum(-1, keepdim=True).movedim(-1, dim)
    support = rank(v.detach(), dim) < number
    tau = (torch.where(support, v, 0.0).sum(dim, keepdim=True) - total) / number
    return torch.where(support, v - tau, 0.0).reshape(input.shape)


def ball_oracle(input: Tensor, k: float, radius: float = 1.0, dim: int = -1) -> Tensor:
    v = input.reshape(1) if input.dim() == 0 else input
    kept = torch.where(largest(v.detach().abs(), k, dim), v, 0.0)
    squares = kept.square().sum(dim, keepdim=True)
    outside = squares > radius**2
    norms = torch.where(outside, squares, 1.0).sqrt()
    return torch.where(outside, kept * (radius / norms), kept).reshape(input.shape)
