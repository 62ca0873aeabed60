"""Networks whose readings of digits are proven for all images within a radius: training with boxes.

The digits are scikit-learn's: 1797 real images of 8 x 8 pixels in [0, 1], which come with the package;
1400 to train, 397 to test. Fully connected networks are trained in six ways:

    standard        cross entropy of the images
    PGD             cross entropy of the worst points that an attack of 10 steps finds
    IBP             half cross entropy, half its bound over the box, from torch's initial weights
    IBP, init       the same from weights that keep a box's radius (fusee.nn.interval_init_)
    IBP, warm-up    the same with the penalty on growing boxes while the radius rises
    SABR            the same with boxes of 0.4 times the radius about the points of an attack

The radius rises from 0, and the bound's share from 0 to a half, between 10 and 50 % of the epochs.
Shown are the shares of test images that are read right, still right under an attack of 40 steps, and
certified; and how tight the bounds are (fusee.propagation_tightness) before and after training.

    python examples/certified_digits.py                 half a minute: a few rows, one seed
    python examples/certified_digits.py --full          half an hour: all rows, five seeds; a picture
    python examples/certified_digits.py --full --plot   of what has been computed so far

Each run is written to a file as it ends, and a run that is there is not done again.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import StatisticsError, mean
from typing import NamedTuple

import fusee
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tables import aligned, spread
from torch import Tensor, nn
from tqdm import tqdm

METHODS = ("standard", "PGD", "IBP", "IBP, init", "IBP, warm-up", "SABR")
BATCH, EPOCHS, TEST = 100, 120, 397
RADII = [0.0, 0.0025, 0.005, 0.01, *(step / 50 for step in range(1, 14))]
"""What the share of certified images is computed for, besides."""


class Row(NamedTuple):
    """What is trained."""

    method: str
    width: int
    hidden: int
    eps: float

    def __str__(self) -> str:
        return f"{self.method}, {self.width} x {self.hidden}, {self.eps}"


@dataclass
class Result:
    """Of one training, on the test images."""

    row: Row
    seed: int
    epochs: int
    right: float
    attacked: float
    certified: float
    """In percent."""
    before: float
    after: float
    """Tightness."""
    curve: list[float]
    """Certified at RADII, in percent."""
    seconds: float


QUICK = [Row(method, 256, 2, 0.1) for method in ("standard", "IBP", "IBP, warm-up")]
FULL = [
    *(Row(method, 256, 2, eps) for eps in (0.1, 0.2) for method in METHODS),
    *(Row("IBP, warm-up", width, 2, eps) for eps in (0.1, 0.2) for width in (64, 1024)),
    *(Row(method, 256, 4, 0.1) for method in ("IBP", "IBP, warm-up")),
]


class Split(NamedTuple):
    """Images as rows of 64 numbers in [0, 1], and their digits."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def split_digits(seed: int) -> Split:
    images, digits = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(
        images / 16, digits, test_size=TEST, stratify=digits, random_state=seed
    )
    pixels = [torch.tensor(a, dtype=torch.float32) for a in (x, x_test)]
    labels = [torch.tensor(a, dtype=torch.int64) for a in (y, y_test)]
    return Split(pixels[0], labels[0], pixels[1], labels[1])


def network(width: int, hidden: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    features = 64
    for _ in range(hidden):
        layers += [nn.Linear(features, width), nn.ReLU()]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, 10))


def box(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """All images within a radius."""
    return (x - eps).clamp(min=0), (x + eps).clamp(max=1)


def tightness(model: nn.Module, data: Split, eps: float) -> float:
    ends = box(data.x_test, eps)
    return fusee.propagation_tightness(model, *ends, data.y_test, data.x_test).nanmean().item()


# --- training -------------------------------------------------------------------------------------


@dataclass
class Training:
    """The loss of a method in the course of the steps."""

    net: fusee.nn.IntervalModel
    method: str
    radius: Callable[[float], float]
    kappa: Callable[[float], float]
    """The share of the images' own cross entropy."""
    penalty: Callable[[float], float]
    """The weight of the warm-up penalty."""

    def loss(self, x: Tensor, y: Tensor, step: int) -> Tensor:
        model = self.net.model
        if self.method == "standard":
            return F.cross_entropy(model(x), y)
        lower, upper = box(x, max(self.radius(step), 1e-6))
        if self.method in ("PGD", "SABR"):
            points = fusee.nn.pgd_attack(model, x, y, lower, upper)
            if self.method == "PGD":
                return F.cross_entropy(model(points), y)
            lower, upper = fusee.small_boxes(lower, upper, points, 0.4)
        weight = self.penalty(step)
        made = self.net.propagate(lower, upper, target=y, input=x, before_relu=weight > 0)
        kappa = self.kappa(step)
        loss = kappa * F.cross_entropy(made.output, y)
        loss = loss + (1 - kappa) * fusee.robust_cross_entropy(made.margins)
        if weight > 0:
            radius = (upper - lower) / 2
            loss = loss + weight * fusee.interval_warmup_penalty(radius, made.before_relu)
        return loss


def course(row: Row, net: fusee.nn.IntervalModel, steps: int) -> Training:
    """The ramps of a run."""
    first, last = 0.1 * steps, 0.5 * steps
    falling = fusee.optim.LinearRamp(0.5, 0.0, first, last)  # 0.5 (1 - radius / eps)
    penalised = row.method in ("IBP, warm-up", "SABR")
    return Training(
        net,
        row.method,
        radius=fusee.optim.LinearRamp(0.0, row.eps, first, last),
        kappa=fusee.optim.LinearRamp(1.0, 0.5, first, last),
        penalty=lambda step: falling(step) if penalised and step >= first else 0.0,
    )


def train(
    row: Row, data: Split, seed: int, epochs: int, advance: Callable[[], object]
) -> tuple[nn.Module, Result]:
    """Trains one network, and says what became of it."""
    begun = time.perf_counter()
    torch.manual_seed(seed)
    model = network(row.width, row.hidden)
    if row.method in ("IBP, init", "IBP, warm-up", "SABR"):
        fusee.nn.interval_init_(model)
    before = tightness(model, data, row.eps)
    net = fusee.nn.IntervalModel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    per_epoch = -(-len(data.x) // BATCH)
    training = course(row, net, epochs * per_epoch)
    step = 0
    for _ in range(epochs):
        for batch in torch.randperm(len(data.x)).split(BATCH):
            optimizer.zero_grad()
            training.loss(data.x[batch], data.y[batch], step).backward()
            optimizer.step()
            step += 1
        advance()
    report = fusee.nn.certify(net, [(data.x_test, data.y_test)], row.eps, progress=False)
    shares = [100 * n / TEST for n in (report.standard, report.adversarial, report.certified)]
    after = tightness(model, data, row.eps)
    curve = [certified(net, data, eps) for eps in RADII]
    seconds = time.perf_counter() - begun
    return model, Result(row, seed, epochs, *shares, before, after, curve, seconds)


def certified(net: fusee.nn.IntervalModel, data: Split, eps: float) -> float:
    """The share of test images that are proven to be read right within a radius, in percent."""
    with torch.no_grad():
        margins = net.margins(*box(data.x_test, eps), data.y_test)
    return 100 * ((margins < 0).sum(1) == 9).float().mean().item()


# --- results --------------------------------------------------------------------------------------


def load(path: Path, epochs: int) -> list[Result]:
    """What has been computed of so many epochs."""
    if not path.exists():
        return []
    results = [Result(**entry) for entry in json.loads(path.read_text())]
    for result in results:
        result.row = Row(*result.row)
    return [result for result in results if result.epochs == epochs]


def run(rows: Iterable[Row], seeds: int, epochs: int, path: Path) -> list[Result]:
    """Trains what is not in the file yet, one seed after the other."""
    results = load(path, epochs)
    done = {(result.row, result.seed) for result in results}
    left = [(row, seed) for seed in range(seeds) for row in rows if (row, seed) not in done]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(left) * epochs, unit="epoch", smoothing=0) as bar:
        for row, seed in left:
            bar.set_description(f"{row!s:28} seed {seed}")
            _, result = train(row, split_digits(seed), seed, epochs, bar.update)
            results.append(result)
            bar.set_postfix(certified=f"{result.certified:.1f} %")
            part = path.with_suffix(".part")
            part.write_text(json.dumps([asdict(r) for r in results], indent=1))
            part.replace(path)
    return results


def of_row(results: list[Result], row: Row, name: str) -> list[float]:
    return [getattr(result, name) for result in results if result.row == row]


def table(results: list[Result], rows: Iterable[Row]) -> str:
    lines = [
        ("method", "hidden", "eps", "right %", "attacked %", "certified %", "tightness", "then")
    ]
    for row in rows:
        found = {
            name: of_row(results, row, name)
            for name in ("right", "attacked", "certified", "before", "after")
        }
        if not found["right"]:
            continue
        shares = [spread(found[name], 1) for name in ("right", "attacked", "certified")]
        # Of numbers this small the mean alone.
        change = f"{mean(found['before']):.2g}", spread(found["after"], 3)
        lines.append((row.method, f"{row.width} x {row.hidden}", f"{row.eps}", *shares, *change))
    return aligned(lines)


# --- claims ---------------------------------------------------------------------------------------


def claims(results: list[Result]) -> list[tuple[str, bool]]:
    """What the papers say, and whether the means over the seeds agree; of rows that were trained."""
    radii = sorted({result.row.eps for result in results})

    def of(name: str, method: str, eps: float = 0.1, width: int = 256, hidden: int = 2) -> float:
        return mean(of_row(results, Row(method, width, hidden, eps), name))

    checks: dict[str, Callable[[], bool]] = {
        "of standard training nothing is certified": lambda: all(
            of("certified", "standard", eps) < 1 for eps in radii
        ),
        "IBP raises tightness twentyfold": lambda: all(
            of("after", "IBP", eps) > 20 * of("before", "IBP", eps) for eps in radii
        ),
        "PGD leaves it at less than a quarter of that": lambda: all(
            of("after", "PGD", eps) < 0.25 * of("after", "IBP", eps) for eps in radii
        ),
        "its initial weights and penalty cost no certified accuracy (2 points)": lambda: all(
            of("certified", "IBP, warm-up", eps) > of("certified", "IBP", eps) - 2 for eps in radii
        ),
        "SABR is less tight than IBP, and reads more right": lambda: all(
            of("after", "SABR", eps) < of("after", "IBP, warm-up", eps)
            and of("right", "SABR", eps) > of("right", "IBP, warm-up", eps)
            for eps in radii
        ),
        "tightness grows with the radius of training": lambda: (
            of("after", "IBP, warm-up", 0.2) > of("after", "IBP, warm-up")
        ),
        "width raises certified accuracy, and lowers tightness at the start": lambda: (
            of("certified", "IBP, warm-up", width=1024) > of("certified", "IBP, warm-up", width=64)
            and of("before", "IBP, warm-up", width=1024) < of("before", "IBP, warm-up", width=64)
        ),
        "depth lowers tightness at the start, and training mends it": lambda: (
            of("before", "IBP, warm-up", hidden=4) < 0.1 * of("before", "IBP, warm-up")
            and of("after", "IBP, warm-up", hidden=4) > 0.5
        ),
    }
    found = []
    for text, check in checks.items():
        with suppress(StatisticsError):  # a row is missing
            found.append((text, check()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="all rows, five seeds")
    parser.add_argument("--seeds", type=int, help="1, or 5 with --full")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--plot", action="store_true", help="train nothing more")
    parser.add_argument("--assert", action="store_true", dest="check", help="fail if a claim does")
    parser.add_argument("--output", type=Path, default=Path("build/certified_digits"))
    parser.add_argument("--picture", type=Path, help="by default in the output's folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"fusee {fusee.__version__}, engine {fusee.engine()}; torch {torch.__version__}; "
        f"{platform.machine()}"
    )
    rows = FULL if options.full else QUICK
    path = options.output / ("full.json" if options.full else "quick.json")
    seeds = options.seeds or (5 if options.full else 1)
    results = load(path, options.epochs) if options.plot else run(rows, seeds, options.epochs, path)
    if not results:
        raise SystemExit(f"there are no results in {path}")
    most = max(len(of_row(results, row, "seed")) for row in rows)
    print(f"\n{table(results, rows)}\n")
    print(f"{most} seeds, mean ± standard deviation; {TEST} test images, {options.epochs} epochs")
    print("tightness: 1 where the bounds lose nothing, before training and then after\n")
    checked = claims(results)
    for text, holds in checked:
        print(f"{'yes' if holds else 'NO ':3}  {text}")
    if options.full:
        from certified_pictures import plot

        picture = options.picture or options.output / "certified_digits.png"
        plot(results, picture)
        print(f"\npicture: {picture}")
    if options.check and not all(holds for _, holds in checked):
        raise SystemExit("a claim does not hold")


if __name__ == "__main__":
    main()
