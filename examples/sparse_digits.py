"""Convolutional networks with exactly k filters a layer: the group envelope against other ways.

A network of 32 and 64 filters with batch normalisation learns to read scikit-learn's 1797 digits, which
come with the package. Of both layers 1/2, 1/4 or 1/8 of the filters are kept: exactly so many, and the
others are exactly zero, with bias, scale and shift. These are then cut out. Compared are

    dense         all filters
    debiased      the debiased group envelope, whose k falls from all filters to the number wanted
    latent        the same on latent weights, which go on being trained
    envelope      the group envelope itself
    group lasso   its proximal operator
    magnitude     nothing
    same time     the same, with the filters chosen when `debiased` fixes them
    small         a network that has only k filters from the start

The middle six go on with the k filters of largest norm after a share of the training, and no penalty.
For each seed all methods get the same images, initial weights, order of batches, learning rates and
number of epochs; only `small` has other weights and a learning rate of its own. Settings were chosen
(`--tune`) on other seeds, from six for each method, with images that are in no test; one setting of a
method serves all three numbers of filters.

    python examples/sparse_digits.py                    three minutes on a free core
    python examples/sparse_digits.py --seeds 10         what docs/group_envelope.md shows
    python examples/sparse_digits.py --tune             chooses the settings again, in ten minutes
"""

from __future__ import annotations

import argparse
import platform
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import fusee
import matplotlib.pyplot as plt
import torch
from filters import (
    FILTERS,
    Run,
    Setting,
    accuracy,
    cut,
    draw_filters,
    draw_norms,
    milliseconds,
    train,
    wanted,
)
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from tqdm import tqdm

EPOCHS = 20
TRAINING, TEST = 898, 600
TUNING_SEEDS = range(100, 103)
DENSITIES = (1 / 2, 1 / 4, 1 / 8)
METHODS = (
    *("dense", "debiased", "latent", "envelope"),
    *("group lasso", "magnitude", "same time", "small"),
)
COLORS = dict(
    zip(
        METHODS,
        ("0.3", "#c44e52", "#dd8452", "#937860", "#55a868", "#4c72b0", "#64b5cd", "#8172b3"),
        strict=True,
    )
)

# Six settings for each method.
RATES = tuple(product((0.03, 0.1), (5e-4, 5e-3, 2e-2)))
"""Learning rate and weight decay of `dense`, and anew of `small`; the others have the first."""
UNTIL = {"magnitude": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)}
LAM = {
    "debiased": (1.0, 3.0, 10.0),
    "latent": (0.1, 0.3, 1.0),
    "envelope": (0.1, 0.3, 1.0),
    "group lasso": (0.1, 0.3, 1.0),
}

# Printed by `--tune`.
CHOSEN = {
    "dense": Setting(0.03, 0.02),
    "debiased": Setting(0.03, 0.02, 0.5, 10),
    "latent": Setting(0.03, 0.02, 0.3, 1),
    "envelope": Setting(0.03, 0.02, 0.3, 1),
    "group lasso": Setting(0.03, 0.02, 0.3, 0.3),
    "magnitude": Setting(0.03, 0.02, 0.1),
    "small": Setting(0.1, 0.02),
}


def setting_of(method: str) -> Setting:
    """The setting that was chosen for a method, or the one that it borrows."""
    return CHOSEN["debiased"]._replace(lam=0.0) if method == "same time" else CHOSEN[method]


class Split(NamedTuple):
    """Images of 1 x 8 x 8 numbers in [0, 1], and their digits."""

    x: Tensor
    y: Tensor
    x_other: Tensor
    """What accuracy is measured on."""
    y_other: Tensor


def split(seed: int, *, tuning: bool) -> Split:
    """Images to train with, drawn by the seed from those in no test, and others: to tune with the rest
    of these, otherwise the test, which is the same for every seed."""
    images, digits = load_digits(return_X_y=True)
    ours, test, y_ours, y_test = train_test_split(
        images / 16, digits, test_size=TEST, stratify=digits, random_state=0
    )
    x, rest, y, y_rest = train_test_split(
        ours, y_ours, train_size=TRAINING, stratify=y_ours, random_state=seed
    )
    other, y_other = (rest, y_rest) if tuning else (test, y_test)
    x, other = (torch.tensor(a, dtype=torch.float32).view(-1, 1, 8, 8) for a in (x, other))
    return Split(x, torch.tensor(y), other, torch.tensor(y_other))


def densities(method: str) -> tuple[float, ...]:
    """The shares of filters that a method keeps."""
    return (1.0,) if method == "dense" else DENSITIES


# --- choosing -------------------------------------------------------------------------------------


def candidates(method: str, chosen: dict[str, Setting]) -> list[Setting]:
    """The settings that a method may have."""
    if method in ("dense", "small"):
        return [Setting(*rates) for rates in RATES]
    pairs = product(UNTIL.get(method, (0.3, 0.5)), LAM.get(method, (0.0,)))
    return [chosen["dense"]._replace(until=until, lam=lam) for until, lam in pairs]


def tune(methods: list[str], epochs: int) -> None:
    """The setting of the largest mean accuracy for each method, over seeds, images and the numbers of
    filters, of which only the last are those of the table."""
    splits = {seed: split(seed, tuning=True) for seed in TUNING_SEEDS}
    chosen = {"dense": CHOSEN["dense"]}
    for method in methods:
        if method == "same time":
            continue
        means: dict[Setting, float] = {}
        for setting in tqdm(candidates(method, chosen), desc=f"{method:12}", unit="setting"):
            means[setting] = mean(
                accuracy(
                    train(method, density, setting, data.x, data.y, seed, epochs).model,
                    data.x_other,
                    data.y_other,
                )
                for density in densities(method)
                for seed, data in splits.items()
            )
            tqdm.write(f"{method:12} {tuple(setting)} {means[setting]:.2f}")
        chosen[method] = max(means, key=means.__getitem__)
        values = ", ".join(f"{value:g}" for value in chosen[method])
        tqdm.write(f'    "{method}": Setting({values}),  # {means[chosen[method]]:.2f}')


# --- showing --------------------------------------------------------------------------------------


class Result(NamedTuple):
    """What is kept of a run."""

    accuracy: float
    left: list[int]
    report: Any
    """On the cut."""


def run_all(seeds: int, epochs: int) -> tuple[dict[tuple[str, float], list[Result]], list[Run]]:
    """All results, and the debiased runs of the first seed."""
    arms = [(method, density) for method in METHODS for density in densities(method)]
    results: dict[tuple[str, float], list[Result]] = {arm: [] for arm in arms}
    shown = []
    with tqdm(total=len(arms) * seeds, unit="run") as bar:
        for seed in range(seeds):
            data = split(seed, tuning=False)
            for method, density in arms:
                bar.set_description(f"{method:11} {density:<5g} seed {seed}")
                run = train(method, density, setting_of(method), data.x, data.y, seed, epochs)
                if run.kept != wanted(density):
                    raise AssertionError(f"{method} kept {run.kept}, not {wanted(density)}")
                small, report = cut(run, data.x_other)
                if [layer.after for layer in report.layers[:2]] != wanted(density):
                    raise AssertionError(f"{method} was cut to {report.layers}")
                right = accuracy(small, data.x_other, data.y_other)
                results[method, density].append(Result(right, run.left, report))
                if method == "debiased" and seed == 0:
                    shown.append(run)
                bar.update()
    return results, shown


def spread(values: list[float]) -> str:
    """Mean and standard deviation over the seeds."""
    deviation = stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):.2f} ± {deviation:.2f}".replace("-", "−")


def minus(
    results: dict[tuple[str, float], list[Result]], arm: tuple[str, float], other: Any
) -> str:
    """The difference in accuracy, seed by seed, and in how many seeds it is more."""
    if arm == other or arm[0] == "dense":
        return "-"
    pairs = zip(results[arm], results[other], strict=True)
    differences = [result.accuracy - its.accuracy for result, its in pairs]
    better = sum(difference > 0 for difference in differences)
    return f"{spread(differences)} ({better}/{len(differences)})"


def columns(rows: list[tuple[str, ...]], left: int = 1, rules: tuple[int, ...] = (1,)) -> str:
    """A table, the first `left` columns to the left, with a line above the rows `rules`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell:{'<' if i < left else '>'}{widths[i]}}" for i, cell in enumerate(row))
        for row in rows
    ]
    rule = "-" * len(lines[0])
    return "\n".join(f"{rule}\n{line}" if i in rules else line for i, line in enumerate(lines))


def accuracies(results: dict[tuple[str, float], list[Result]]) -> str:
    """A row for each method and number of filters."""
    rows = [
        ("filters", "method", "until", "lam", "test accuracy %", "minus dense", "minus magnitude")
    ]
    rows[0] += ("left before",)
    for density in (1.0, *DENSITIES):
        for method in METHODS:
            if density not in densities(method):
                continue
            of_arm, setting = results[method, density], setting_of(method)
            left = "-"
            if of_arm[0].left:
                left = " + ".join(
                    f"{mean(n):.1f}" for n in zip(*(r.left for r in of_arm), strict=True)
                )
            rows.append(
                (
                    " + ".join(map(str, wanted(density))),
                    method,
                    f"{setting.until:g}" if setting.until < 1 else "-",
                    f"{setting.lam:g}" if setting.lam else "-",
                    spread([result.accuracy for result in of_arm]),
                    minus(results, (method, density), ("dense", 1.0)),
                    minus(results, (method, density), ("magnitude", density)),
                    left,
                )
            )
    return columns(rows, 2, (1, 2, 9, 16))


def speeds(shown: list[Run], x: Tensor) -> str:
    """What cutting saves: a row for each number of filters, of the networks given."""
    pairs = [(run.model, *cut(run, x)) for run in shown]
    networks = [network for run, small, _ in pairs for network in (run, small)]
    times = {batch: milliseconds(networks, x[:batch]) for batch in (256, 1)}
    rows = [("filters", "parameters", "MACs", "256 images, ms", "times", "1 image, ms", "times")]
    for i, (_, _, report) in enumerate(pairs):
        cells = [" + ".join(str(layer.after) for layer in report.layers[:2])]
        for before, after in (report.parameters, report.macs):
            cells.append(f"{before:,} -> {after:,}")
        for of_batch in times.values():
            before, after = of_batch[2 * i : 2 * i + 2]
            cells += [f"{before:.3f} -> {after:.3f}", f"{before / after:.2f}"]
        rows.append(tuple(cells))
    return columns(rows)


def plot(
    results: dict[tuple[str, float], list[Result]], shown: list[Run], epochs: int, path: Path
) -> None:
    """The filters that were kept, how the others vanished, and what it cost."""
    figure = plt.figure(figsize=(14, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(4.6, 9.4)).flat
    for axis, run in zip(left.subplots(len(shown), 1), shown, strict=True):
        draw_filters(axis, run.model)
        axis.set_title(f"{run.kept[0]} of {FILTERS[0]} filters kept", fontsize=10)
    left.suptitle("first convolution, debiased, one seed", fontsize=11)

    axes = right.subplots(1, 2)
    run = shown[1]
    draw_norms(axes[0], run, epochs)
    axes[0].axvline(CHOSEN["debiased"].until * epochs, color="0.2", linestyle=":", linewidth=1)
    axes[0].set_title(f"norms of these groups, {run.kept[0]} kept; dotted: fixed", fontsize=11)
    for i, method in enumerate(METHODS):
        places = [2.0**-j for j in range(1, 4)]
        values = [[r.accuracy for r in results[method, d]] for d in densities(method)]
        means = torch.tensor([mean(v) for v in values])
        deviations = torch.tensor([stdev(v) if len(v) > 1 else 0.0 for v in values])
        if method == "dense":
            axes[1].axhspan(
                *(means + torch.tensor([-1, 1]) * deviations).tolist(), color="0.9", linewidth=0
            )
            axes[1].axhline(means.item(), color=COLORS[method], linewidth=1, label=method)
        else:
            apart = 1.03 ** (i - 4)
            axes[1].errorbar(
                [place * apart for place in places],
                means,
                deviations,
                color=COLORS[method],
                label=method,
                marker="o",
                markersize=3.5,
                linewidth=1.2,
                capsize=2,
            )
    axes[1].set_xscale("log", base=2)
    axes[1].set_xticks(DENSITIES, ["1/2", "1/4", "1/8"])
    axes[1].set_xlabel("share of the filters kept")
    count = len(results["dense", 1.0])
    axes[1].set_title(f"test accuracy %, mean ± deviation, {count} seeds", fontsize=11)
    axes[1].legend(fontsize=9, loc="lower right")
    axes[1].grid(alpha=0.25)
    axes[1].spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument(
        "--tune", nargs="*", choices=METHODS, help="choose the settings (of some); nothing else"
    )
    parser.add_argument("--output", type=Path, default=Path("build/sparse/filters.png"))
    options = parser.parse_args()

    # Networks this small gain nothing from a second thread.
    torch.set_num_threads(1)
    print(f"fusee {fusee.__version__}: the {fusee.engine()} engine serves the CPU")
    if options.tune is not None:
        tune(options.tune or list(METHODS), options.epochs)
        return
    results, shown = run_all(options.seeds, options.epochs)
    counts = f"{TRAINING} training and {TEST} test images"
    print(f"\n{counts}, {options.seeds} seeds, {options.epochs} epochs, float32\n")
    print(accuracies(results))
    print(
        "\nmean ± standard deviation over the seeds; minus: of the differences to dense and to"
        "\nmagnitude with as many filters, seed by seed, and in how many seeds the accuracy is higher"
        "\nuntil: the share of the training after which the filters to keep are fixed"
        "\nleft before: filters that were not zero when their number was made exact, mean"
        "\nin every run the number kept is the one wanted, all else of those filters is exactly zero,"
        "\nand the network without them gives the same outputs to 1e-5 of the largest\n"
    )
    print(speeds(shown, split(0, tuning=False).x_other))
    print(
        "\nbefore -> after the cut, debiased, first seed; milliseconds of processor time of one"
        "\nthread, medians of 100 calls taking turns"
    )
    print(
        f"torch {torch.__version__}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    )
    plot(results, shown, options.epochs, options.output)
    print(f"picture: {options.output}")


if __name__ == "__main__":
    main()
