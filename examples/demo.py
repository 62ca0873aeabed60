"""Small classifiers of digits: softmax, StableMax, the weight compander, few filters, structured layers,
certified networks, transport.

What `make demo` runs. The digits are scikit-learn's: 1797 real images of 8 x 8 pixels, which come with
the package. For each seed, all methods get the same split, the same initial weights and the same order
of batches. Then a convolutional network is trained with all its filters, with exactly half and exactly
a quarter of them, chosen by the group envelope, and the others are cut out; an MLP-mixer with dense and
with Monarch layers; a network whose readings are certified within a radius. Last, images are read by
their nearest neighbour, in the distance of pixels and in that of optimal transport. Every number
printed is computed in the run.

    python examples/demo.py                     two minutes on a free core
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import certified_digits
import filters
import fusee
import matplotlib.pyplot as plt
import monarch
import neighbours
import torch
import torch.nn.functional as F
from certified_digits import Split
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tables import aligned, spread
from torch import Tensor, nn
from tqdm import tqdm


@dataclass(frozen=True)
class Method:
    """What is different in one way of training."""

    loss: Callable[..., Tensor]
    normalize: Callable[[Tensor], Tensor]
    color: str
    change: Callable[[nn.Module], object] = lambda model: None
    """Done to the initialised model."""


METHODS = {
    "softmax": Method(F.cross_entropy, lambda x: x.softmax(1), "#c44e52"),
    "StableMax": Method(fusee.stablemax_cross_entropy, fusee.stablemax, "#4c72b0"),
    "StableMax, compander": Method(
        fusee.stablemax_cross_entropy, fusee.stablemax, "#55a868", fusee.nn.compand_model
    ),
}


@dataclass
class Run:
    """One training: what was measured after every epoch, and what the test images got at the end."""

    accuracy: list[float] = field(default_factory=list)
    finished: list[float] = field(default_factory=list)
    """The share of training images whose loss is exactly zero: they teach nothing any more."""
    probabilities: Tensor = field(default_factory=lambda: torch.empty(0))
    weights: Tensor = field(default_factory=lambda: torch.empty(0))
    """Those of all layers, biases aside."""
    near_zero: float = 0.0
    """The share of weights that are at most a tenth of the root mean square of their layer."""
    seconds: float = 0.0


def split_digits(seed: int) -> Split:
    """A quarter of the images, stratified, for the test."""
    images, digits = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(
        images / 16, digits, test_size=0.25, stratify=digits, random_state=seed
    )
    as_float = [torch.tensor(a, dtype=torch.float32) for a in (x, x_test)]
    as_index = [torch.tensor(a, dtype=torch.int64) for a in (y, y_test)]
    return Split(as_float[0], as_index[0], as_float[1], as_index[1])


def train(name: str, data: Split, epochs: int, seed: int, advance: Callable[[], object]) -> Run:
    """Trains one network with one method."""
    method = METHODS[name]
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    method.change(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    run = Run()
    start = time.perf_counter()
    for _ in range(epochs):
        for batch in torch.randperm(len(data.x)).split(128):
            optimizer.zero_grad()
            method.loss(model(data.x[batch]), data.y[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            logits = model(data.x_test)
            run.accuracy.append((logits.argmax(1) == data.y_test).float().mean().item())
            losses = method.loss(model(data.x), data.y, reduction="none")
            run.finished.append((losses == 0).float().mean().item())
        advance()
    run.seconds = time.perf_counter() - start
    run.probabilities = method.normalize(logits)
    report = fusee.nn.weight_report(model)
    run.near_zero = report.near_zero
    run.weights = torch.cat([row.sample for row in report.rows])
    return run


COLUMNS = (
    *("", "test accuracy %", "chance given to truth", "loss exactly 0, %"),
    *("weights near 0, %", "largest weight", "seconds a run"),
)


def table(runs: dict[str, list[Run]], splits: list[Split]) -> str:
    """One row for each method; means and standard deviations over the seeds."""
    rows = [COLUMNS]
    for name, of_name in runs.items():
        truth = [
            r.probabilities.gather(1, s.y_test[:, None]).mean().item()
            for r, s in zip(of_name, splits, strict=True)
        ]
        rows.append(
            (
                name,
                spread([r.accuracy[-1] for r in of_name], 2, 100),
                spread(truth, 3),
                spread([r.finished[-1] for r in of_name], 1, 100),
                spread([r.near_zero for r in of_name], 1, 100),
                spread([r.weights.abs().max().item() for r in of_name], 2),
                spread([r.seconds for r in of_name], 2),
            )
        )
    return aligned(rows)


def band(axis: plt.Axes, curves: list[list[float]], label: str, color: str) -> None:
    """The mean over the seeds, and their range as a band."""
    values = 100 * torch.tensor(curves)
    epochs = torch.arange(1, values.shape[1] + 1)
    axis.plot(epochs, values.mean(0), color=color, label=label, linewidth=2)
    axis.fill_between(epochs, values.amin(0), values.amax(0), color=color, alpha=0.2, linewidth=0)


def histograms(axis: plt.Axes, weights: dict[str, Tensor]) -> None:
    """How the weights lie about zero: the density of each method's."""
    reach = max(w.abs().quantile(0.999).item() for w in weights.values())
    edges = torch.linspace(-reach, reach, 82)
    for name, of_name in weights.items():
        density, _ = torch.histogram(of_name, edges, density=True)
        axis.stairs(density, edges, color=METHODS[name].color, linewidth=1.5)


def plot(runs: dict[str, list[Run]], splits: list[Split], path: Path) -> None:
    """Curves of all seeds; of the first, the weights, and the test images that gave most trouble."""
    figure = plt.figure(figsize=(17, 4.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(12.2, 4.8)).flat
    axes = left.subplots(1, 3)
    for name, of_name in runs.items():
        color = METHODS[name].color
        band(axes[0], [r.accuracy for r in of_name], name, color)
        band(axes[1], [r.finished for r in of_name], name, color)
    low = min(
        100 * min(r.accuracy[min(4, len(r.accuracy) - 1)] for r in rs) for rs in runs.values()
    )
    axes[0].set_ylim(low - 1, 100)
    axes[0].set_title("test accuracy, %", fontsize=11)
    axes[1].set_title("training images whose loss is exactly 0, %", fontsize=11)
    axes[0].legend(loc="lower right", title=f"mean and range of {len(splits)} seeds")
    histograms(axes[2], {name: of_name[0].weights for name, of_name in runs.items()})
    axes[2].set_title("density of the weights, first seed", fontsize=11)
    for axis, label in zip(axes, ("epoch", "epoch", "weight"), strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)

    data, first = splits[0], {name: of_name[0] for name, of_name in runs.items()}
    rows = torch.arange(len(data.y_test))
    trouble = -torch.stack([r.probabilities[rows, data.y_test] for r in first.values()]).sum(0)
    cells = right.subplots(2, 4).flat
    for cell, i in zip(cells, trouble.argsort(descending=True), strict=False):
        cell.imshow(data.x_test[i].view(8, 8), cmap="gray_r")
        cell.set_xticks([])
        cell.set_yticks([])
        cell.set_title(f"a {data.y_test[i]}", fontsize=9, pad=3)
        for line, (name, run) in enumerate(first.items()):
            chance, digit = run.probabilities[i].max(0)
            cell.text(
                0.5,
                -0.1 - 0.13 * line,
                f"{digit}: {100 * chance:.0f} %",
                ha="center",
                va="top",
                transform=cell.transAxes,
                fontsize=9,
                color=METHODS[name].color,
            )
    right.suptitle("the hardest test images, and what each network reads", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# --- fewer filters --------------------------------------------------------------------------------

SHARES = {"all": 1.0, "half": 1 / 2, "a quarter": 1 / 4}
"""Of the filters of each convolution."""
SETTING = filters.Setting(lr=0.03, decay=0.02, until=0.5, lam=10.0)
FILTER_EPOCHS = 8


@dataclass
class Sparse:
    """A network with few filters."""

    run: filters.Run
    accuracy: float
    small: nn.Module
    """Without the others; it gives the same outputs."""
    report: fusee.nn.CutReport


def train_sparse(name: str, data: Split, seed: int, advance: Callable[[], object]) -> Sparse:
    """Trains a convolutional network with a share of its filters, and cuts the others out."""
    x, x_test = data.x.view(-1, 1, 8, 8), data.x_test.view(-1, 1, 8, 8)
    method = "dense" if name == "all" else "debiased"
    run = filters.train(method, SHARES[name], SETTING, x, data.y, seed, FILTER_EPOCHS, advance)
    if run.kept != filters.wanted(SHARES[name]):
        raise AssertionError(f"{run.kept} filters were kept, not {filters.wanted(SHARES[name])}")
    small, report = filters.cut(run, x_test)
    return Sparse(run, filters.accuracy(small, x_test, data.y_test), small, report)


def sparse_table(runs: dict[str, list[Sparse]], data: Split) -> str:
    """One row for each share of the filters; the times are of the first seed's networks."""
    images = data.x_test[:256].view(-1, 1, 8, 8)
    networks = [n for of_name in runs.values() for n in (of_name[0].run.model, of_name[0].small)]
    times = filters.milliseconds(networks, images)
    rows = [
        ("filters", "kept", "test accuracy %", "parameters", "multiplications", "ms, before", "cut")
    ]
    for i, (name, of_name) in enumerate(runs.items()):
        report = of_name[0].report
        rows.append(
            (
                name,
                " + ".join(map(str, of_name[0].run.kept)),
                spread([sparse.accuracy for sparse in of_name], 2),
                f"{report.parameters[1]:,}",
                f"{report.macs[1]:,}",
                *(f"{time:.2f}" for time in times[2 * i : 2 * i + 2]),
            )
        )
    return aligned(rows)


def sparse_plot(runs: dict[str, Sparse], path: Path) -> None:
    """Which filters were kept, and how the others went to zero."""
    figure = plt.figure(figsize=(12, 3.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(6, 6)).flat
    for axis, sparse in zip(left.subplots(len(runs), 1), runs.values(), strict=True):
        filters.draw_filters(axis, sparse.run.model)
        axis.set_title(f"{sparse.run.kept[0]} filters of the first layer", fontsize=9)
    axes = right.subplots(1, 2, sharey=True)
    for axis, sparse in zip(axes, list(runs.values())[1:], strict=True):
        filters.draw_norms(axis, sparse.run, FILTER_EPOCHS)
        axis.set_title(f"their norms, {sparse.run.kept[0]} kept", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# --- structured layers ----------------------------------------------------------------------------

KINDS = ("dense", "Monarch", "projected", "narrow")
MIXER = monarch.Size(width=128, nblocks=8)
MIXER_EPOCHS = 10


def structured_table(splits: list[Split]) -> str:
    """A mixer whose channel layers are dense, or Monarch's, or dense and narrow."""
    runs: dict[str, list[monarch.Run]] = {kind: [] for kind in KINDS}
    with tqdm(total=len(KINDS) * len(splits) * MIXER_EPOCHS, unit="epoch") as bar:
        for seed, data in enumerate(splits):
            tensors = data.x, data.y, data.x_test, data.y_test
            for kind in KINDS:
                bar.set_description(f"{kind + ' layers':20} seed {seed}")
                run = monarch.train(kind, *tensors, seed, MIXER_EPOCHS, bar.update, MIXER)
                runs[kind].append(run)
                bar.set_postfix(accuracy=f"{run.accuracy[-1]:.2f} %")
    return aligned(monarch.table(runs))


# --- certified networks ---------------------------------------------------------------------------

CERTIFIED_EPOCHS = 60
CERTIFIED = [certified_digits.Row(method, 128, 2, 0.1) for method in ("standard", "IBP, warm-up")]


def certified_table(seeds: int) -> str:
    """Networks trained on images, and on all images within a radius."""
    results = []
    with tqdm(total=len(CERTIFIED) * seeds * CERTIFIED_EPOCHS, unit="epoch") as bar:
        for seed in range(seeds):
            data = certified_digits.split_digits(seed)
            for row in CERTIFIED:
                bar.set_description(f"{row.method:20} seed {seed}")
                _, result = certified_digits.train(row, data, seed, CERTIFIED_EPOCHS, bar.update)
                results.append(result)
                bar.set_postfix(certified=f"{result.certified:.1f} %")
    return certified_digits.table(results, CERTIFIED)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("build/demo/digits.png"))
    options = parser.parse_args()

    # Networks this small gain nothing from a second thread, and lose much where a core is busy.
    torch.set_num_threads(1)
    print(f"fusee {fusee.__version__}: the {fusee.engine()} engine serves the CPU")
    splits = [split_digits(seed) for seed in range(options.seeds)]
    runs: dict[str, list[Run]] = {name: [] for name in METHODS}
    with tqdm(total=len(METHODS) * options.seeds * options.epochs, unit="epoch") as bar:
        for seed, data in enumerate(splits):
            for name in METHODS:
                bar.set_description(f"{name:20} seed {seed}")
                runs[name].append(train(name, data, options.epochs, seed, bar.update))
                bar.set_postfix(accuracy=f"{100 * runs[name][-1].accuracy[-1]:.2f} %")
    plot(runs, splits, options.output)
    counts = f"{len(splits[0].x)} training and {len(splits[0].x_test)} test images"
    print(f"\n{counts}, {options.seeds} seeds, {options.epochs} epochs, float32\n")
    print(table(runs, splits))
    print(
        "\nmean ± standard deviation over the seeds; near 0: within a tenth of the"
        "\nroot mean square of the layer; all but the seconds are of the last epoch"
    )
    print(f"picture: {options.output}\n")

    sparse: dict[str, list[Sparse]] = {name: [] for name in SHARES}
    with tqdm(total=len(SHARES) * options.seeds * FILTER_EPOCHS, unit="epoch") as bar:
        for seed, data in enumerate(splits):
            for name in SHARES:
                bar.set_description(f"{name + ' filters':20} seed {seed}")
                sparse[name].append(train_sparse(name, data, seed, bar.update))
                bar.set_postfix(accuracy=f"{sparse[name][-1].accuracy:.2f} %")
    picture = options.output.with_name("filters.png")
    sparse_plot({name: of_name[0] for name, of_name in sparse.items()}, picture)
    print(
        f"\na convolutional network, {FILTER_EPOCHS} epochs; filters chosen by the group envelope\n"
    )
    print(sparse_table(sparse, splits[0]))
    print(
        "\nthe filters not kept are exactly zero; ms: to read 256 images, with them, and after they"
        "\nare cut out, which leaves the outputs as they are"
    )
    print(f"picture: {picture}\n")

    print(f"an MLP-mixer, {MIXER_EPOCHS} epochs, {MIXER.width} channels, ms of the processor\n")
    print(structured_table(splits))
    print(
        "\nprojected: dense for half of the epochs, then the nearest Monarch layers; narrow: dense with"
        "\nas many parameters as Monarch\n"
    )

    print(
        f"a network of two hidden layers, {CERTIFIED_EPOCHS} epochs; all images within eps of one\n"
    )
    print(certified_table(options.seeds))
    print(
        "\nattacked: still read right at the worst point that PGD finds; certified: proven to be read"
        "\nright at every point; tightness: 1 where the bounds lose nothing, before training and then\n"
    )

    known = neighbours.Known.of(splits[0].x, splits[0].y)
    print(aligned(neighbours.table(known, splits[0].x_test, splits[0].y_test)))
    print(
        f"\n{neighbours.ASKED} test images against {neighbours.KNOWN} known ones of each digit, seed 0; "
        "us of the processor"
    )


if __name__ == "__main__":
    main()
