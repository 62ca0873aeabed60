"""Digits read by their nearest neighbour: in the distance of pixels, and in that of transport."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import fusee
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transport import centres

KNOWN, ASKED = 10, 100
"""Images of each digit whose digit is known, and images to be read."""


@dataclass(frozen=True)
class Known:
    """The first images of each digit, as rows of 64 pixels in float64."""

    x: Tensor
    y: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Known:
        chosen = torch.cat([(y == digit).nonzero()[:KNOWN, 0] for digit in range(10)])
        return cls(x[chosen].double(), y[chosen])


def moved(images: Tensor) -> Tensor:
    """One pixel to the right; the last column is lost, and mostly empty."""
    return F.pad(images.view(-1, 8, 8)[:, :, :-1], (1, 0)).flatten(1)


def transport_costs(x: Tensor, others: Tensor) -> Tensor:
    """The least cost of turning an image into each other, their centres of mass at one place."""
    a, b = x / x.sum(), others / others.sum(1, keepdim=True)
    costs = torch.cdist(centres(), centres()).square().expand(len(b), -1, -1)
    result = fusee.sinkhorn_newton(costs, a.expand_as(b), b, reg=1.0)
    # With squared distances, a shift of the whole adds its square.
    return result.value_linear - ((a - b) @ centres()).square().sum(1)


def table(known: Known, x_test: Tensor, y_test: Tensor) -> list[tuple[str, ...]]:
    """How many images are read rightly, as they are and moved."""
    truth, images = y_test[:ASKED], x_test[:ASKED].double()
    rows = [("nearest neighbour by", "accuracy %", "images moved by a pixel", "us a pair")]
    distances: dict[str, Callable[[Tensor], Tensor]] = {
        "pixels": lambda image: (known.x - image).square().sum(1),
        "transport": lambda image: transport_costs(image, known.x),
    }
    for name, distance in distances.items():
        start, right = time.process_time(), []
        for asked in (images, moved(images)):
            found = [known.y[distance(image).argmin()] for image in tqdm(asked, name, leave=False)]
            right.append(100 * (torch.stack(found) == truth).float().mean().item())
        each = (time.process_time() - start) / (2 * ASKED * len(known.x))
        rows.append((name, *(f"{share:.1f}" for share in right), f"{1e6 * each:.1f}"))
    return rows
