"""The scalar root behind the group envelope, in plain torch operators."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def norms_of(x: Tensor) -> Tensor:
    """The norms (batch, groups) of the groups of (batch, outer, groups, inner), with derivative zero
    where a norm is zero."""
    # Relative to the largest, whose square may not be a number.
    if x.numel() == 0:
        return x.sum((1, 3))
    size = x.detach().abs().amax((1, 3), keepdim=True)
    size = torch.where((size > 0) & size.isfinite(), size, 1.0)
    squares = (x / size).square().sum((1, 3))
    zero = squares == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, squares).sqrt() * size[:, 0, :, 0])


def solve_root(a: Tensor, b: Tensor, k: Tensor) -> Tensor:
    """The theta (batch) with sum clip(a / theta - b, 0, 1) = k over the groups of (batch, groups).

    Zero where at most k of the a are positive, infinite where k is not positive. The partition of the
    groups is found by bisection over the sorted breakpoints, without derivatives; on it theta is a
    quotient of sums, which has the right ones.
    """
    with torch.no_grad():
        saturated, middle = _partition(a, b, k)
    count = saturated.sum(1)
    positive = a > 0
    bounded = positive.sum(1) > k
    total = torch.where(middle, a, 0.0).sum(1)
    rest = k - count + torch.where(middle, b, 0.0).sum(1)
    flat = ~(middle.any(1) & (k > 0))
    theta = torch.where(flat, 1.0, total) / torch.where(flat, 1.0, rest)
    # Every number between the groups that are saturated and those that are zero will do.
    ends = torch.where(saturated, a / (1 + b), math.inf).amin(1) if a.shape[1] else theta
    theta = torch.where(flat, ends.detach(), theta)
    theta = torch.where(k > 0, theta, math.inf)
    theta = torch.where(bounded, theta, 0.0)
    return torch.where((a.sum(1) + k).isnan(), math.nan, theta)


def _partition(a: Tensor, b: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Which groups are saturated at the root, and which are between."""
    positive = a > 0
    enters = torch.where(positive, b / a, math.inf)
    fills = torch.where(positive, (1 + b) / a, math.inf)
    points = torch.cat([enters, fills], 1).sort(1).values
    low = torch.zeros_like(k, dtype=torch.int64)
    high = torch.full_like(low, max(points.shape[1] - 1, 0))
    for _ in range(max(points.shape[1], 1).bit_length()):
        middle = (low + high + 1) // 2
        at = points.gather(1, middle[:, None]) if points.shape[1] else k[:, None]
        value = torch.where(positive, a * at - b, 0.0).nan_to_num(0.0).clamp(0, 1).sum(1)
        below = value <= k
        low = torch.where(below, middle, low)
        high = torch.where(below, high, middle - 1)
    at = points.gather(1, low[:, None]) if points.shape[1] else k[:, None]
    saturated = positive & (fills <= at)
    return saturated, positive & ~saturated & (enters <= at)


def keep_largest(keys: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Which keys are the k largest of their row, the first of equals; and the roots that say so."""
    count = keys.shape[1]
    wanted = torch.where(k.isnan(), 0.0, k).floor().clamp(0, count).long()
    order = keys.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(count, device=keys.device).expand_as(order)
    )
    keep = rank < wanted[:, None]
    least = torch.where(keep, keys, math.inf).amin(1) if count else torch.zeros_like(k)
    index = torch.arange(count, device=keys.device)
    ties = keep & (keys == least[:, None])
    last = torch.where(ties, index, -1).amax(1) if count else torch.zeros_like(k)
    least = torch.where(wanted == count, -1.0, least)
    last = torch.where(wanted == count, 0, last)
    broken = keys.isnan().any(1) | k.isnan()
    least = torch.where(broken, math.nan, least)
    roots = torch.stack([least.double(), last.double(), torch.ones_like(k)], 1)
    return keep, roots
