"""Families of transport problems, and the regimes in which they are solved."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.harness.spec import Maker


@dataclass(frozen=True)
class Problem:
    """Costs, and masses or None for uniform ones."""

    M: Tensor
    a: Tensor | None = None
    b: Tensor | None = None

    @property
    def range(self) -> float:
        finite = self.M[self.M.isfinite()]
        return float(finite.max() - finite.min()) or 1.0


def _maker(name: str) -> Maker:
    return Maker(torch.float64, seed=sum(map(ord, name)))


def _distances(x: Tensor, y: Tensor, p: float) -> Tensor:
    return torch.cdist(x, y, p=p, compute_mode="donot_use_mm_for_euclid_dist")


def random_costs(n: int, m: int) -> Problem:
    return Problem(_maker("random").uniform(n, m))


def _digit(make: Maker, side: int) -> Tensor:
    """Strokes on a grid, with a little of everything: as an image of a digit."""
    pixels = _grid(side)
    image = torch.full((side * side,), 0.01, dtype=torch.float64)
    for _ in range(3):
        ends = make.uniform(2, 2)
        along = torch.linspace(0, 1, 20, dtype=torch.float64)[:, None]
        stroke = ends[0] + along * (ends[1] - ends[0])
        image += (-_distances(pixels, stroke, 2).amin(1).square() / 0.01).exp()
    return image / image.sum()


def _grid(side: int) -> Tensor:
    line = torch.linspace(0, 1, side, dtype=torch.float64)
    return torch.cartesian_prod(line, line)


def digits(power: float, squared: bool = False) -> Callable[[int, int], Problem]:
    def make(n: int, m: int) -> Problem:
        side = max(2, math.isqrt(n))
        maker, pixels = _maker("digits"), _grid(side)
        M = _distances(pixels, pixels, power)
        return Problem(M.square() if squared else M, _digit(maker, side), _digit(maker, side))

    return make


def mixtures(n: int, m: int) -> Problem:
    """Densities on a line."""
    x, y = (torch.linspace(0, 1, count, dtype=torch.float64)[:, None] for count in (n, m))

    def density(t: Tensor, *peaks: tuple[float, float]) -> Tensor:
        total = sum(math.sqrt(1 / w) * (-((t[:, 0] - at) ** 2) / w).exp() for at, w in peaks)
        return (total + 1e-6) / (total + 1e-6).sum()

    a, b = density(x, (0.2, 0.005), (0.6, 0.01)), density(y, (0.4, 0.01), (0.9, 0.002))
    return Problem(_distances(x, y, 2).square(), a, b)


def clouds(d: int) -> Callable[[int, int], Problem]:
    def make(n: int, m: int) -> Problem:
        maker = _maker("clouds")
        return Problem(_distances(maker.normal(n, d), maker.normal(m, d) + 1, 2).square())

    return make


def trees(n: int, m: int) -> Problem:
    """Distances between the nodes of a random tree."""
    make, count = _maker("trees"), n + m
    parents = (make.uniform(count) * torch.arange(count)).long()
    above = torch.eye(count, dtype=torch.float64)
    for node in range(1, count):
        above[node] += above[parents[node]]
    lengths = make.uniform(count, low=0.1)
    shared = (above * lengths) @ above.T
    depths = shared.diagonal()
    M = depths[:, None] + depths - 2 * shared
    return Problem(M[:n, n:])


def circles(n: int, m: int) -> Problem:
    """Arc lengths between evenly spaced points: many ties."""
    x, y = torch.arange(n) / n, torch.arange(m) / m
    gap = (x.double()[:, None] - y.double()).abs()
    return Problem(torch.minimum(gap, 1 - gap))


def toeplitz(n: int, m: int) -> Problem:
    values = _maker("toeplitz").uniform(n + m)
    return Problem(values[torch.arange(n)[:, None] - torch.arange(m) + m])


FAMILIES: dict[str, Callable[[int, int], Problem]] = {
    "random": random_costs,
    "digits, squared L2": digits(2.0, squared=True),
    "digits, L1": digits(1.0),
    "digits, L2": digits(2.0),
    "mixtures": mixtures,
    "clouds, 2 dimensions": clouds(2),
    "clouds, 10 dimensions": clouds(10),
    "trees": trees,
    "circles": circles,
    "Toeplitz": toeplitz,
}


# --- regimes ------------------------------------------------------------------------------------------


def _zero_masses(p: Problem) -> Problem:
    make, (n, m) = _maker("zeros"), p.M.shape
    a, b = make.uniform(n), make.uniform(m)
    a[::3], b[1::4] = 0, 0
    return Problem(p.M, a / a.sum(), b / b.sum())


def _six_decades(p: Problem) -> Problem:
    make, (n, m) = _maker("decades"), p.M.shape
    a, b = 10 ** make.uniform(n, low=-6), 10 ** make.uniform(m, low=-6)
    return Problem(p.M, a / a.sum(), b / b.sum())


def _ties(p: Problem) -> Problem:
    return Problem((p.M / p.range * 4).round(), p.a, p.b)


def _forbidden(p: Problem) -> Problem:
    """Half of all pairs, but what a feasible plan needs: the product of the masses on a band."""
    n, m = p.M.shape
    rows, columns = torch.arange(n)[:, None] / n, torch.arange(m) / m
    return Problem(torch.where((rows - columns).abs() > 0.3, math.inf, p.M))


def _constant(p: Problem) -> Problem:
    return Problem(torch.full_like(p.M, 3.0), p.a, p.b)


def _negative(p: Problem) -> Problem:
    return Problem(p.M - p.range, p.a, p.b)


REGIMES: dict[str, Callable[[Problem], Problem]] = {
    "zero masses": _zero_masses,
    "masses over six decades": _six_decades,
    "ties": _ties,
    "forbidden pairs": _forbidden,
    "constant costs": _constant,
    "negative costs": _negative,
}
