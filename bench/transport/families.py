"""The problems that solvers of transport are compared on: costs, and masses of both sides."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate


class Problem(NamedTuple):
    """Costs (n, m) and masses of sum one, in float64."""

    M: Tensor
    a: Tensor
    b: Tensor


def uniform(n: int) -> Tensor:
    return torch.full((n,), 1 / n, dtype=torch.float64)


def random_masses(n: int) -> Tensor:
    masses = torch.rand(n, dtype=torch.float64) + 0.01
    return masses / masses.sum()


def random(n: int) -> Problem:
    """Costs uniform in [0, 1]: a random assignment."""
    return Problem(torch.rand(n, n, dtype=torch.float64), uniform(n), uniform(n))


ZERO = "005d910000dfaf5003f20b8004c008800580098004b01c7002e5ac00006da000"
SEVEN = "0078dgf100774bc000008d100488ff6002bff400000g5000009f100000d50000"
"""Two of scikit-learn's digits, 8 x 8 pixels of 0 to 16."""


def digit(image: str, side: int) -> Tensor:
    """Masses of side x side pixels, none of them empty."""
    pixels = torch.tensor([int(pixel, 17) / 16 for pixel in image], dtype=torch.float64)
    masses = interpolate(pixels.view(1, 1, 8, 8), size=(side, side), mode="bilinear").flatten()
    return (masses + 0.01) / (masses + 0.01).sum()


def pixels(side: int) -> Tensor:
    """The centres of side x side pixels in the unit square."""
    at = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    return torch.cartesian_prod(at, at)


def digits(metric: str) -> Callable[[int], Problem]:
    """Two digit images of about n pixels."""

    def make(n: int) -> Problem:
        side = round(n**0.5)
        difference = pixels(side)[:, None] - pixels(side)
        costs = {
            "squared L2": difference.square().sum(-1),
            "L1": difference.abs().sum(-1),
            "L2": difference.norm(dim=-1),
        }
        return Problem(costs[metric], digit(ZERO, side), digit(SEVEN, side))

    return make


def mixtures(n: int) -> Problem:
    """Two mixtures of Gaussian densities on a line."""
    at = torch.linspace(0, 1, n, dtype=torch.float64)

    def mixture(*parts: tuple[float, float, float]) -> Tensor:
        density = torch.full_like(at, 1e-6)
        for weight, mean, width in parts:
            density += weight * (-(((at - mean) / width) ** 2) / 2).exp()
        return density / density.sum()

    a, b = mixture((1, 0.2, 0.05), (0.7, 0.6, 0.1)), mixture((0.5, 0.4, 0.08), (1, 0.8, 0.04))
    return Problem((at[:, None] - at).square(), a, b)


def clouds(dimension: int) -> Callable[[int], Problem]:
    """Two Gaussian clouds, squared distances over the largest."""

    def make(n: int) -> Problem:
        x = torch.randn(n, dimension, dtype=torch.float64)
        y = 0.7 * torch.randn(n, dimension, dtype=torch.float64) + 0.5
        costs = torch.cdist(x, y).square()
        return Problem(costs / costs.max(), uniform(n), uniform(n))

    return make


def tree(n: int) -> Problem:
    """Distances along the edges of a random tree, over the largest."""
    costs = torch.zeros(n, n, dtype=torch.float64)
    lengths = torch.rand(n, dtype=torch.float64)
    for node in range(1, n):
        parent = int(torch.randint(node, ()))
        costs[node, :node] = costs[parent, :node] + lengths[node]
        costs[:node, node] = costs[node, :node]
    return Problem(costs / costs.max(), random_masses(n), random_masses(n))


def circle(n: int) -> Problem:
    """Distances along a circle, over the largest."""
    apart = (torch.arange(n, dtype=torch.float64)[:, None] - torch.arange(n)).abs()
    costs = torch.minimum(apart, n - apart)
    return Problem(costs / costs.max(), random_masses(n), random_masses(n))


def toeplitz(n: int) -> Problem:
    """A random cost for each difference of the indices."""
    diagonals = torch.rand(2 * n - 1, dtype=torch.float64)
    index = torch.arange(n)[:, None] - torch.arange(n) + n - 1
    return Problem(diagonals[index], uniform(n), uniform(n))


FAMILIES: dict[str, Callable[[int], Problem]] = {
    "random": random,
    "digits, squared L2": digits("squared L2"),
    "digits, L1": digits("L1"),
    "digits, L2": digits("L2"),
    "1-D mixtures": mixtures,
    "clouds in 2-D": clouds(2),
    "clouds in 10-D": clouds(10),
    "tree": tree,
    "circle": circle,
    "Toeplitz": toeplitz,
}
