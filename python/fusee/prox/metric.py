"""The proximal operator of the group envelope in a metric of elements, in plain torch operators.

With c = H v, h = H (H - lam d in the debiased form) and b = lam d, element i of group j becomes
c_i u_j / (h_i u_j + b_j). The shares u_j solve, for one number eta of the whole problem,

    f_j(u_j) = eta,  f_j(u) = 1 / (sqrt(d_j) |c / (h u + b_j)|),  u_j clipped to [0, 1],  sum_j u_j = k.

Each f_j rises and is concave, so that its tangents lie above it. With a tangent in the place of each
f_j the shares are clip(alpha_j eta - beta_j, 0, 1), the problem of groups without a metric. Its eta is
never below the right one; at its shares there are new tangents, and eta falls, from every start, at
the end with the square of its error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusee._op import is_readable
from fusee.prox.group_sums import segments_of, spread_to_elements, sum_of_groups
from fusee.prox.group_table import GroupTable
from fusee.prox.groups import marked
from fusee.prox.root import keep_largest, solve_root

_STEPS = 24
"""The most steps of the search: what a device that is not waited for always takes."""


class _Slices:
    """Elements as (batch, outer, groups, inner), what there is of each group as (batch, groups)."""

    def count(self, elements: Tensor) -> tuple[int, int]:
        """How many problems and groups there are."""
        return elements.shape[0], elements.shape[2]

    def total(self, elements: Tensor) -> Tensor:
        return elements.sum((1, 3))

    def largest(self, elements: Tensor) -> Tensor:
        """The largest magnitude, which has no derivative."""
        return torch.linalg.vector_norm(elements.detach(), math.inf, (1, 3))

    def each(self, of_groups: Tensor) -> Tensor:
        """For every element what its group has."""
        return of_groups[:, None, :, None]


class _Sorted(_Slices):
    """Elements of a table's groups as (1, elements), one group after another."""

    def __init__(self, table: GroupTable, group: Tensor) -> None:
        self.table, self.group = table, group

    def count(self, elements: Tensor) -> tuple[int, int]:
        return 1, self.table.groups

    def total(self, elements: Tensor) -> Tensor:
        return sum_of_groups(self.table, _SORTED, self.group, elements[0])[None]

    def largest(self, elements: Tensor) -> Tensor:
        sizes = elements[0].detach().abs()
        zeros = sizes.new_zeros(self.table.groups)
        return zeros.scatter_reduce(0, self.group, sizes, "amax")[None]

    def each(self, of_groups: Tensor) -> Tensor:
        if not of_groups.is_floating_point():
            return of_groups.index_select(1, self.group)
        return spread_to_elements(self.table, _SORTED, self.group, of_groups[0])[None]


_SORTED = "sorted"
_ALL = "all"
_SLICES = _Slices()


class _Groups(NamedTuple):
    """A problem for each row: c and h of elements, the others of (batch, groups)."""

    c: Tensor
    h: Tensor
    b: Tensor
    d: Tensor
    counted: Tensor
    """Which groups have a weight and are not zero."""
    layout: _Slices = _SLICES

    def curve(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """f and its derivative; of groups that are not counted, numbers without meaning."""
        # Positive also for groups that are not counted, whose b is one.
        layout = self.layout
        below = self.h * layout.each(u) + layout.each(self.b)
        y = self.c / below
        # Relative to the largest of the group, whose square may not be a number.
        size = layout.largest(y)
        size = torch.where(self.counted & (size > 0), size, 1.0)
        squares = (y / layout.each(size)).square()
        total = torch.where(self.counted, layout.total(squares), 1.0)
        falls = layout.total(self.h / below * squares)
        f = 1 / (self.d.sqrt() * total.sqrt() * size)
        return f, f * torch.where(self.counted, falls / total, 1.0)


def _settled(done: Tensor) -> bool:
    """Whether a search may stop; read on the CPU alone."""
    return (
        done.is_cpu and not torch.compiler.is_compiling() and is_readable(done) and bool(done.all())
    )


def _shares(alpha: Tensor, beta: Tensor, k: Tensor) -> Tensor:
    """What shares of groups whose curves are straight lines sum up to k."""
    theta = solve_root(alpha, beta, k)[:, None]
    return torch.where(alpha > 0, alpha / theta - beta, 0.0).clamp(0, 1)


def _search(groups: _Groups, k: Tensor) -> Tensor:
    """The shares, to about half their digits at the least."""
    counted = groups.counted
    (first, most), (last, least) = (
        groups.curve(torch.full_like(groups.d, end)) for end in (0.0, 1.0)
    )

    def lines(f: Tensor, slope: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        alpha = torch.where(counted, 1 / slope, 0.0)
        return alpha, torch.where(counted, f * alpha - u, 0.0).clamp(min=0)

    # The chords, whose slopes lie between those of the ends also where rounding says otherwise.
    chords = torch.minimum(torch.maximum(last - first, least), most)
    u = _shares(*lines(first, chords, torch.zeros_like(first)), k)
    close = torch.finfo(u.dtype).eps ** 0.5 / 2
    for _ in range(_STEPS):
        alpha, beta = lines(*groups.curve(u), u)
        following = _shares(alpha, beta, k)
        # As u f'' / f' lies in [-3, 0], a relative step of e leaves an error of about e squared.
        bound = close * torch.maximum(u, following) + torch.finfo(u.dtype).eps * beta
        done = (following - u).abs() <= bound
        u = following
        if _settled(done):
            break
    return u


def _refine(groups: _Groups, k: Tensor, u: Tensor, saturated: Tensor, middle: Tensor) -> Tensor:
    """One step of Newton for all shares at once, with the derivatives that it has."""
    f, slope = groups.curve(u)
    gain = torch.where(middle, 1 / slope, 0.0)
    rest = k - saturated.sum(1) - torch.where(middle, u, 0.0).sum(1)
    total = torch.where(middle.any(1), gain.sum(1), 1.0)
    eta = (rest + (gain * f).sum(1)) / total
    moved = u + gain * (eta[:, None] - f)
    return torch.where(middle, moved, saturated.to(u.dtype))


def prox_in_metric(
    input: Tensor,
    metric: Tensor,
    weights: Tensor | None,
    k: Tensor,
    lam: Tensor,
    form: int,
    layout: _Slices = _SLICES,
) -> Tensor:
    """The operator for a metric of the input's shape, that of the layout: (batch, outer, groups, inner);
    k and lam have one element for each problem. ``form`` is 0 for the envelope, 1 for the debiased one,
    2 for the projection."""
    v, H = input.to(k.dtype), metric.to(k.dtype)
    shape = layout.count(v)
    rest = tuple(range(1, v.dim()))
    alone = (-1, *(1,) * len(rest))  # one number for each problem
    d = torch.ones(shape, dtype=k.dtype, device=v.device)
    if weights is not None:
        d = weights.to(k.dtype).expand(shape)
    if input.numel() == 0:
        return input.clone()
    broken = (v.sum(rest) * 0 + k + lam + (H.sum(rest) + d.sum(1)) * 0).isnan()
    bound = lam[:, None] * d
    b = torch.where(lam[:, None].isinf() | (d == 0), 0.0, bound)
    h = H - layout.each(b) if form == 1 else H
    projects = torch.full_like(broken, form == 2)
    if form == 1:
        projects = (h <= 0).any(rest) | (lam.isinf() & (d > 0).any(1))
    h = torch.where(projects.reshape(alone), H, h)
    c = H * v
    largest = c.detach().abs().amax(rest)
    scale = torch.where((largest > 0) & largest.isfinite(), largest, 1.0).reshape(alone)
    nonzero = layout.largest(c) != 0
    solved = (lam > 0) & lam.isfinite() & (k > 0) & ~broken & ~projects
    counted = nonzero & (d > 0) & solved[:, None]
    of_d = torch.where(counted, d, 1.0)
    groups = _Groups(c / scale, h, torch.where(counted, b, 1.0), of_d, counted, layout)
    with torch.no_grad():
        c_, h_, b_, d_ = (t.detach() for t in (groups.c, groups.h, groups.b, groups.d))
        u = _search(_Groups(c_, h_, b_, d_, counted, layout), k.detach())
        saturated, middle = counted & (u >= 1), counted & (u > 0) & (u < 1)
    for _ in range(2):  # each step doubles the order of the derivatives that are right
        u = _refine(groups, k, u, saturated, middle)
    u = torch.where((counted.sum(1) <= k)[:, None], counted.to(u.dtype), u.clamp(0, 1))
    u = torch.where(counted, u, 0.0)
    share = layout.each(u)
    below = h * share + layout.each(b)
    x = torch.where(share > 0, c * share / torch.where(share > 0, below, 1.0), 0.0)
    keep = keep_largest((layout.total(c * v) * d).detach(), k.detach())[0]
    kept = torch.where(projects[:, None], keep, (lam == 0)[:, None]) | (d == 0)
    if form == 1:
        kept = kept | (u == 1)
    x = torch.where(layout.each(kept), v, x)
    x = torch.where(broken.reshape(alone), math.nan, x)
    return x.to(input.dtype)


def check_metric_of_table(metric: Any, table: GroupTable) -> list[Tensor]:
    """A metric of the shapes of the table's tensors, as ``prox_group_envelope`` takes it."""
    checked = []
    for number, tensor in enumerate(table.check("metric", metric)):
        h = tensor.detach()
        valid = (h > 0) & h.isfinite()
        checked.append(marked(f"metric[{number}]", h, valid, "positive and finite"))
    return checked


def prox_in_metric_of_table(
    tensors: Sequence[Tensor],
    metric: Sequence[Tensor],
    table: GroupTable,
    weights: Tensor | None,
    k: Tensor,
    lam: Tensor,
    form: int,
) -> tuple[Tensor, ...]:
    """The operator for tensors whose groups a table gives, and a metric of their shapes.

    The elements lie one group after another, so that groups may have any sizes.
    """
    ids = torch.cat([t.reshape(-1) for t in table.ids])
    order = segments_of(table, _ALL, ids).order
    v = torch.cat([t.reshape(-1).to(k.dtype) for t in tensors])
    H = torch.cat([t.reshape(-1).to(k.dtype) for t in metric])
    ids, in_order, H = (t if order is None else t[order] for t in (ids, v, H))
    layout = _Sorted(table, ids)
    moved = prox_in_metric(in_order[None], H[None], weights, k, lam, form, layout)[0]
    v = moved if order is None else v.index_put((order,), moved)
    parts = v.split([t.numel() for t in tensors])
    return tuple(part.reshape(t.shape).to(t.dtype) for part, t in zip(parts, tensors, strict=True))
