"""Optimal transport of real images: between handwritten digits, and of colours between photographs.

A digit is a distribution of ink over its pixels. One call gives the transports between an image of each
digit and one of each other; beside the entropic distances stand the exact ones. Then the colours of one
of scikit-learn's two sample photographs go to those of the other: the plan between some thousand pixels
of each gives a map of colours, which is applied to all pixels. Every number printed is computed in the
run; seconds are of the processor, on one thread.

The exact transport is POT's `ot.emd` where POT is installed, otherwise SciPy's.

    python examples/transport.py                    a minute on a free core
    python examples/transport.py --pixels 1000      some seconds
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import fusee
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment, linprog
from scipy.sparse import eye_array, kron, vstack
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor

SIDE = 8
STEPS = 7
"""Of the way from one digit to another."""
REGS = (1e-1, 1e-2, 1e-3, 1e-4)
"""Of the colours, whose components go from 0 to 1."""
POT = importlib.util.find_spec("ot") is not None
EXACT = "ot.emd" if POT else "SciPy"


# --- digits -------------------------------------------------------------------------------------------


class Pairs(NamedTuple):
    """All transports between ten images."""

    masses: Tensor
    """(10, 64), of sum one."""
    result: fusee.TransportResult
    """Of 100 problems, the first digit's ten first."""
    seconds: float


def centres() -> Tensor:
    """Of the pixels, in their widths."""
    at = torch.arange(SIDE, dtype=torch.float64)
    return torch.cartesian_prod(at, at)


def first_of_each() -> Tensor:
    """The first image of each digit as masses; most pixels at the sides are empty."""
    images, digits = load_digits(return_X_y=True)
    chosen = torch.tensor(np.stack([images[digits == digit][0] for digit in range(10)]))
    return chosen / chosen.sum(1, keepdim=True)


def all_pairs(reg: float) -> Pairs:
    """One call for the hundred problems."""
    masses = first_of_each()
    costs = torch.cdist(centres(), centres()).square()
    a, b = masses.repeat_interleave(10, 0), masses.repeat(10, 1)
    start = time.process_time()
    result = fusee.sinkhorn_newton(costs.expand(100, -1, -1), a, b, reg=reg)
    return Pairs(masses, result, time.process_time() - start)


def exact_cost(costs: Tensor, a: Tensor, b: Tensor) -> float:
    """The least of <C, P> without entropy."""
    if POT:
        import ot

        return float(ot.emd2(a.numpy(), b.numpy(), costs.numpy()))
    n, m = costs.shape
    sums = vstack([kron(eye_array(n), np.ones((1, m))), kron(np.ones((1, n)), eye_array(m))])
    return float(linprog(costs.flatten(), A_eq=sums, b_eq=torch.cat([a, b])).fun)


def digits_table(pairs: Pairs) -> str:
    """Distances from the zero, entropic and exact: roots of the mean squared ways."""
    costs = torch.cdist(centres(), centres()).square()
    linear = pairs.result.value_linear
    rows = [f"{'from 0 to':>10}{'entropic':>12}{EXACT:>12}{'excess of the cost':>22}"]
    for digit in range(1, 10):
        exact = exact_cost(costs, pairs.masses[0], pairs.masses[digit])
        found = float(linear[digit])
        ways = f"{found**0.5:12.6f}{exact**0.5:12.6f}"
        rows.append(f"{digit:>10}{ways}{100 * (found / exact - 1):20.4f} %")
    return "\n".join(rows)


def on_the_way(plan: Tensor, t: float, fineness: int = 4) -> Tensor:
    """The ink when each part has gone the share t of its way, as an image of finer pixels."""
    start, end = centres().unsqueeze(1), centres().unsqueeze(0)
    at = fineness * ((1 - t) * start + t * end) + (fineness - 1) / 2
    size = SIDE * fineness
    image = torch.zeros(size, size, dtype=torch.float64)
    low = at.floor().long()
    for corner in torch.cartesian_prod(torch.arange(2), torch.arange(2)):
        share = (1 - (at - (low + corner)).abs()).prod(-1)
        row, column = (low + corner).clamp(0, size - 1).unbind(-1)
        image.index_put_((row, column), plan * share, accumulate=True)
    blur = torch.ones(1, 1, fineness, fineness, dtype=torch.float64)
    return torch.conv2d(image[None, None], blur, padding=fineness // 2)[0, 0]


# --- colours ------------------------------------------------------------------------------------------


class Palette(NamedTuple):
    """A photograph (height, width, 3) and the colours of some of its pixels, all from 0 to 1."""

    photograph: Tensor
    colours: Tensor


def palettes(count: int, seed: int) -> list[Palette]:
    """Both photographs, each with pixels drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for image in load_sample_images().images:
        photograph = torch.tensor(image, dtype=torch.float64) / 255
        pixels = photograph.flatten(0, 1)
        drawn = torch.randperm(len(pixels), generator=generator)[:count]
        made.append(Palette(photograph, pixels[drawn]))
    return made


def exact_colours(source: Tensor, target: Tensor) -> float:
    """The exact cost; as the masses are equal, an optimal assignment is an optimal plan."""
    costs = torch.cdist(source, target).square().numpy()
    if POT:
        import ot

        return float(ot.emd2([], [], costs, numItermax=10_000_000))
    return float(costs[linear_sum_assignment(costs)].mean())


def recoloured(photograph: Tensor, target: Tensor, potential: Tensor, reg: float) -> Tensor:
    """Each pixel's colour becomes the mean of where the plan would send it.

    The plan's row of a colour x that was not among those drawn follows from the potential of the other
    side: it is proportional to exp((g - |x - y|^2) / reg).
    """
    pixels, target, g = (t.float() for t in (photograph.flatten(0, 1), target, potential))
    offset = g - target.square().sum(1)
    parts = []
    for block in pixels.split(4096):
        weights = torch.softmax((2 * block @ target.T + offset) / reg, 1)
        parts.append(weights @ target)
    return torch.cat(parts).view_as(photograph)


# --- the picture --------------------------------------------------------------------------------------


def draw(pairs: Pairs, photographs: list[Tensor], path: Path) -> None:
    """Two digits on their way, and the photographs in their own and in each other's colours."""
    figure = plt.figure(figsize=(11, 9), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(2, 5)).flat
    plans = pairs.result.plan
    axes = upper.subplots(2, STEPS)
    for row, (start, end) in zip(axes, ((0, 4), (2, 5)), strict=True):
        for axis, t in zip(row, torch.linspace(0, 1, STEPS), strict=True):
            axis.imshow(on_the_way(plans[10 * start + end], float(t)), cmap="gray_r")
    titles = ("a photograph", "another", "the first in its colours", "the other way round")
    for axis, photograph, title in zip(lower.subplots(2, 2).flat, photographs, titles, strict=True):
        axis.imshow(photograph.clamp(0, 1))
        axis.set_title(title, fontsize=10)
    for axis in figure.get_axes():
        axis.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=80)
    plt.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(buffer).convert("RGB").quantize(200).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pixels", type=int, default=3000, help="drawn from each photograph")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("build/transport/transport.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"fusee {fusee.__version__}: the {fusee.engine()} engine serves the CPU")

    reg = 0.1
    pairs = all_pairs(reg)
    result = pairs.result
    print(
        f"\n100 pairs of digits, {SIDE} x {SIDE} pixels, squared distances up to "
        f"{2 * (SIDE - 1) ** 2}, reg {reg}: {1e3 * pairs.seconds:.0f} ms in one call"
        f"\n{int(result.converged.sum())} converged, marginal error up to "
        f"{float(result.marginal_error.max()):.1e}, {int(result.n_iter.min())} to "
        f"{int(result.n_iter.max())} iterations\n"
    )
    print(digits_table(pairs), flush=True)

    china, flower = palettes(options.pixels, options.seed)
    print(f"\ncolours of {options.pixels} pixels of each photograph", flush=True)
    start = time.process_time()
    exact = exact_colours(china.colours, flower.colours)
    print(f"exact ({EXACT}): {exact:.6f} in {time.process_time() - start:.1f} s", flush=True)
    head = ("reg", "seconds", "iterations", "marginal error", "<C, P>", "above exact, %", "kept")
    print("".join(f"{name:>16}" for name in head))
    for reg in REGS:
        start = time.process_time()
        result = fusee.sinkhorn_newton_samples(china.colours, flower.colours, reg=reg)
        seconds = time.process_time() - start
        linear = float(result.value_linear)
        print(
            f"{reg:16g}{seconds:16.2f}{int(result.n_iter):16d}{float(result.marginal_error):16.1e}"
            f"{linear:16.6f}{100 * (linear / exact - 1):16.3f}{result.sparse_plan._nnz():16,d}",
            flush=True,
        )
    reg = REGS[2]
    result = fusee.sinkhorn_newton_samples(china.colours, flower.colours, reg=reg)
    f, g = result.potentials
    start = time.process_time()
    photographs = [
        china.photograph,
        flower.photograph,
        recoloured(china.photograph, flower.colours, g, reg),
        recoloured(flower.photograph, china.colours, f, reg),
    ]
    count = china.photograph[..., 0].numel()
    print(f"2 x {count:,} pixels mapped at reg {reg:g} in {time.process_time() - start:.1f} s")
    draw(pairs, photographs, options.output)
    print(f"picture: {options.output}")


if __name__ == "__main__":
    main()
