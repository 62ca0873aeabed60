"""Digits from few examples, with and without the weight compander: test error, and what weights become.

A small network learns ten images of each digit of scikit-learn's 1797, which come with the package. Its
weights are plain, or those of `fusee.nn.compand_model` as it comes, or with a headroom and a slope that
were searched for; alone, beside weight decay, beside dropout, beside both. For each seed all of them get
the same images, initial weights, order of batches and number of epochs.

The settings were chosen on a third of the images (`--tune`), and errors are measured on the others: no
image in a test had a part in a choice. Plain and companded weights are tuned alike, over the same
learning rates, weight decays and dropouts. The searched shape is one more search, in which these stay
as the compander has them. Plain weights are also trained with the compander's choice of these.

    python examples/compander.py                    three minutes on a free core
    python examples/compander.py --seeds 20         what docs/compander.md shows
    python examples/compander.py --tune             chooses the settings again, in about an hour
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import fusee
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

PER_DIGIT = 10
EPOCHS = 150
BATCH = 25
TUNING_SEEDS = range(100, 105)

BESIDE = ("nothing", "decay", "dropout", "both")
WEIGHTS = ("plain", "plain, same", "compander", "searched")
"""The second has the settings of the third, which tells the compander's effect from theirs."""
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
DECAYS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
DROPOUTS = (0.2, 0.4, 0.6)
SHAPES = tuple(product((1.05, 1.5, 3.0), (0.7, 1.25, 2.0)))
"""The headroom and the slope at zero."""


def mlp(dropout: float) -> nn.Module:
    """Three linear layers."""
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(64, 128), nn.ReLU()),
        *(nn.Dropout(dropout), nn.Linear(128, 128), nn.ReLU()),
        *(nn.Dropout(dropout), nn.Linear(128, 10)),
    )


def cnn(dropout: float) -> nn.Module:
    """Two convolutions and two linear layers."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Dropout(dropout), nn.Linear(128, 64), nn.ReLU()),
        *(nn.Dropout(dropout), nn.Linear(64, 10)),
    )


NETWORKS = {"MLP": mlp, "CNN": cnn}


class Arm(NamedTuple):
    """One way of training."""

    network: str
    beside: str
    """The other regularisation."""
    weights: str


@dataclass(frozen=True)
class Setting:
    """What is chosen for an arm."""

    lr: float
    decay: float = 0.0
    dropout: float = 0.0
    headroom: float = 1.5
    slope: float = 1.25


# Printed by `--tune`.
CHOSEN = {
    Arm("MLP", "nothing", "plain"): Setting(0.03),
    Arm("MLP", "nothing", "compander"): Setting(0.001),
    Arm("MLP", "nothing", "searched"): Setting(0.001, 0, 0, 1.5, 0.7),
    Arm("MLP", "decay", "plain"): Setting(0.03, 0.1),
    Arm("MLP", "decay", "compander"): Setting(0.01, 3),
    Arm("MLP", "decay", "searched"): Setting(0.01, 3, 0, 1.5, 2),
    Arm("MLP", "dropout", "plain"): Setting(0.01, 0, 0.4),
    Arm("MLP", "dropout", "compander"): Setting(0.01, 0, 0.4),
    Arm("MLP", "dropout", "searched"): Setting(0.01, 0, 0.4, 3, 2),
    Arm("MLP", "both", "plain"): Setting(0.01, 0.03, 0.4),
    Arm("MLP", "both", "compander"): Setting(0.01, 0.03, 0.4),
    Arm("MLP", "both", "searched"): Setting(0.01, 0.03, 0.4, 3, 0.7),
    Arm("CNN", "nothing", "plain"): Setting(0.01),
    Arm("CNN", "nothing", "compander"): Setting(0.003),
    Arm("CNN", "nothing", "searched"): Setting(0.003, 0, 0, 1.5, 0.7),
    Arm("CNN", "decay", "plain"): Setting(0.01, 0.03),
    Arm("CNN", "decay", "compander"): Setting(0.01, 1),
    Arm("CNN", "decay", "searched"): Setting(0.01, 1, 0, 1.05, 0.7),
    Arm("CNN", "dropout", "plain"): Setting(0.01, 0, 0.4),
    Arm("CNN", "dropout", "compander"): Setting(0.01, 0, 0.4),
    Arm("CNN", "dropout", "searched"): Setting(0.01, 0, 0.4, 3, 0.7),
    Arm("CNN", "both", "plain"): Setting(0.01, 0.1, 0.4),
    Arm("CNN", "both", "compander"): Setting(0.01, 1, 0.2),
    Arm("CNN", "both", "searched"): Setting(0.01, 1, 0.2, 1.5, 0.7),
}


def setting_of(arm: Arm, chosen: dict[Arm, Setting]) -> Setting:
    """The setting that was chosen for an arm, or the one that it borrows."""
    return chosen[arm._replace(weights="compander") if arm.weights == "plain, same" else arm]


class Split(NamedTuple):
    """Images of 1 x 8 x 8 numbers in [0, 1], and their digits."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


@dataclass(frozen=True)
class Run:
    """One training."""

    error: float
    """The share of test images that are read wrongly after the last epoch, in percent."""
    before: Any
    """The report on the weights."""
    after: Any
    growth: float
    """By what factor `a` has changed, the geometric mean of the layers; 1 where there is none."""


def pools() -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Images and digits to choose settings with, and others to measure with."""
    images, digits = load_digits(return_X_y=True)
    ours, theirs, y_ours, y_theirs = train_test_split(
        images / 16, digits, train_size=1 / 3, stratify=digits, random_state=0
    )
    return (ours, y_ours), (theirs, y_theirs)


def split(pool: tuple[Any, Any], seed: int) -> Split:
    """A few images of each digit to train with; all others of the pool for the test."""
    x, x_test, y, y_test = train_test_split(
        *pool, train_size=10 * PER_DIGIT, stratify=pool[1], random_state=seed
    )
    as_float = [torch.tensor(a, dtype=torch.float32).view(-1, 1, 8, 8) for a in (x, x_test)]
    return Split(as_float[0], torch.tensor(y), as_float[1], torch.tensor(y_test))


def train(arm: Arm, setting: Setting, data: Split, seed: int, epochs: int) -> Run:
    """Trains one network with AdamW, the learning rate falling as a cosine to zero."""
    torch.manual_seed(seed)
    model = NETWORKS[arm.network](setting.dropout)
    before = fusee.nn.weight_report(model)
    if not arm.weights.startswith("plain"):
        fusee.nn.compand_model(model, headroom=setting.headroom, slope=setting.slope)
    groups = fusee.nn.compander_param_groups(model, setting.decay)
    optimizer = torch.optim.AdamW(groups, lr=setting.lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(data.x), generator=order).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(data.x[batch]), data.y[batch]).backward()
            optimizer.step()
        schedule.step()
    after = fusee.nn.weight_report(model)
    ratios = [m.log_ratio_a.item() for m in model.modules() if isinstance(m, fusee.nn.Compander)]
    growth = math.exp(mean(ratios)) if ratios else 1.0
    fusee.nn.fold_companders(model)
    model.eval()
    with torch.no_grad():
        wrong = model(data.x_test).argmax(1) != data.y_test
    return Run(100 * wrong.float().mean().item(), before, after, growth)


# --- choosing -------------------------------------------------------------------------------------


def candidates(arm: Arm, chosen: dict[Arm, Setting]) -> list[Setting]:
    """The settings that an arm may have."""
    if arm.weights == "searched":
        found = chosen[arm._replace(weights="compander")]
        return [replace(found, headroom=h, slope=s) for h, s in SHAPES]
    decays = DECAYS if arm.beside in ("decay", "both") else (0.0,)
    dropouts = DROPOUTS if arm.beside in ("dropout", "both") else (0.0,)
    return [Setting(*values) for values in product(RATES, decays, dropouts)]


def tune(networks: list[str], epochs: int) -> dict[Arm, Setting]:
    """The setting of least mean error for each arm, over seeds and images that measure nothing else."""
    splits = {seed: split(pools()[0], seed) for seed in TUNING_SEEDS}
    chosen: dict[Arm, Setting] = {}
    for arm in map(Arm._make, product(networks, BESIDE, WEIGHTS)):
        if arm.weights == "plain, same":
            continue
        errors: dict[Setting, float] = {}
        for setting in tqdm(candidates(arm, chosen), desc=f"{' '.join(arm):27}", unit="setting"):
            runs = [train(arm, setting, data, seed, epochs) for seed, data in splits.items()]
            errors[setting] = mean(run.error for run in runs)
        chosen[arm] = min(errors, key=errors.__getitem__)
        names = ", ".join(f'"{name}"' for name in arm)
        values = list(vars(chosen[arm]).values())[: None if arm.weights == "searched" else 3]
        setting = ", ".join(f"{value:g}" for value in values)
        tqdm.write(f"    Arm({names}): Setting({setting}),  # {errors[chosen[arm]]:.2f}")
    return chosen


# --- showing --------------------------------------------------------------------------------------


def spread(values: list[float]) -> str:
    """Mean and standard deviation over the seeds."""
    deviation = stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):.2f} ± {deviation:.2f}"


def minus(runs: dict[Arm, list[Run]], arm: Arm, weights: str) -> str:
    """The difference in error to other weights, seed by seed, and in how many seeds it is less."""
    if arm.weights == weights or arm.weights == "plain":
        return "-"
    pairs = zip(runs[arm], runs[arm._replace(weights=weights)], strict=True)
    differences = [run.error - other.error for run, other in pairs]
    better = sum(difference < 0 for difference in differences)
    return f"{spread(differences)} ({better}/{len(differences)})".replace("-", "−")


COLUMNS = (
    *("network", "beside", "weights", "lr", "decay", "dropout", "headroom", "slope"),
    *("test error %", "minus plain", "minus same"),
    *("near zero %", "largest |w|", "a, times"),
)


def table(runs: dict[Arm, list[Run]]) -> str:
    """A row for each arm."""
    rows = [COLUMNS]
    for arm, of_arm in runs.items():
        setting = setting_of(arm, CHOSEN)
        shape = [f"{setting.headroom:g}", f"{setting.slope:g}"]
        growth = f"{mean(run.growth for run in of_arm):.2f}"
        if arm.weights.startswith("plain"):
            shape, growth = ["-", "-"], "-"
        rows.append(
            (
                *arm,
                *(f"{value:g}" for value in (setting.lr, setting.decay, setting.dropout)),
                *shape,
                spread([run.error for run in of_arm]),
                minus(runs, arm, "plain"),
                minus(runs, arm, "plain, same"),
                f"{100 * mean(run.after.near_zero for run in of_arm):.1f}",
                f"{mean(run.after.largest for run in of_arm):.2f}",
                growth,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell:{'<' if i < 3 else '>'}{widths[i]}}" for i, cell in enumerate(row))
        for row in rows
    ]
    rule = "-" * len(lines[0])
    for start in range(1, len(rows), len(WEIGHTS)):
        lines[start] = f"{rule}\n{lines[start]}"
    return "\n".join(lines)


def plot(runs: dict[Arm, list[Run]], network: str, folder: Path) -> Path:
    """Histograms of the weights of the first seed, without other regularisation, the same settings."""
    plain = runs[Arm(network, "nothing", "plain, same")][0]
    companded = runs[Arm(network, "nothing", "compander")][0]
    reports = {
        "before training": plain.before,
        "after, plain": plain.after,
        "after, companded": companded.after,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{network.lower()}.png"
    fusee.nn.plot_weight_histograms(reports, path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--tune", action="store_true", help="choose the settings; nothing else")
    parser.add_argument("--output", type=Path, default=Path("build/compander"))
    options = parser.parse_args()

    # Networks this small gain nothing from a second thread.
    torch.set_num_threads(1)
    print(f"fusee {fusee.__version__}: the {fusee.engine()} engine serves the CPU")
    if options.tune:
        tune(options.networks, options.epochs)
        return
    splits = [split(pools()[1], seed) for seed in range(options.seeds)]
    arms = [Arm(*names) for names in product(options.networks, BESIDE, WEIGHTS)]
    runs: dict[Arm, list[Run]] = {arm: [] for arm in arms}
    with tqdm(total=len(arms) * options.seeds, unit="run") as bar:
        for seed, data in enumerate(splits):
            for arm in arms:
                bar.set_description(f"{' '.join(arm):27} seed {seed}")
                runs[arm].append(train(arm, setting_of(arm, CHOSEN), data, seed, options.epochs))
                bar.update()
    pictures = [plot(runs, network, options.output) for network in options.networks]
    counts = f"{len(splits[0].x)} training and {len(splits[0].x_test)} test images"
    print(f"\n{counts}, {options.seeds} seeds, {options.epochs} epochs, float32\n")
    print(table(runs))
    print(
        "\nmean ± standard deviation over the seeds; minus plain, minus same: of the differences to"
        "\nthose rows, seed by seed, and in how many seeds the error is less"
        "\nnear zero: |w| <= 0.1 root mean square of its tensor (8 % of a normal distribution)"
        "\na, times: by what factor `a`, the scale of the bound, has changed in training"
    )
    print("pictures:", *pictures)


if __name__ == "__main__":
    main()
