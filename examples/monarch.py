"""An MLP-mixer on digits with dense and with Monarch layers: parameters, time, accuracy.

The digits are scikit-learn's: 1797 real images of 8 x 8 pixels, which come with the package. An image is
16 patches of 2 x 2 pixels; two mixer blocks of 256 channels read it, whose channel layers are

    dense         torch.nn.Linear
    Monarch       fusee.nn.MonarchLinear from the start
    projected     dense for half of the epochs, then the nearest Monarch layers, trained on
    densified     Monarch for half of the epochs, then dense layers of the same function, trained on
    narrow        dense, with so few hidden channels that there are as many parameters as Monarch's

For each seed all get the same images, order of batches and settings. Times are of one thread.

    python examples/monarch.py                    ten minutes on a free core, docs/monarch.md shows it
    python examples/monarch.py --seeds 1 --epochs 6
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median, stdev

import matplotlib

matplotlib.use("Agg")
import fusee
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

PATCHES, PIXELS = 16, 4
WIDTH, BLOCKS, NBLOCKS = 256, 2, 16
COLORS = {
    "dense": "0.3",
    "Monarch": "#4c72b0",
    "projected": "#55a868",
    "densified": "#dd8452",
    "narrow": "#c44e52",
}


@dataclass(frozen=True)
class Size:
    """Of a network: channels, and blocks of a Monarch factor."""

    width: int = WIDTH
    nblocks: int = NBLOCKS

    @property
    def narrow(self) -> int:
        """Hidden channels of a dense layer with as many weights as Monarch's with twice the width."""
        up, down = (
            fusee.nn.MonarchLinear(*features, nblocks=self.nblocks, device="meta")
            for features in ((self.width, 2 * self.width), (2 * self.width, self.width))
        )
        weights = sum(p.numel() for layer in (up, down) for p in (layer.w1, layer.w2))
        return max(1, weights // (2 * self.width))


class Mixer(nn.Module):
    """A block of an MLP-mixer: a layer over patches, then one over channels."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.patches = nn.Sequential(
            nn.Linear(PATCHES, 2 * PATCHES), nn.GELU(), nn.Linear(2 * PATCHES, PATCHES)
        )
        self.channels = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.patches(self.norms[0](x).mT).mT
        return x + self.channels(self.norms[1](x))


class Mean(nn.Module):
    """Over the patches."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def network(size: Size, hidden: int) -> nn.Sequential:
    """Patches to logits."""
    blocks = [Mixer(size.width, hidden) for _ in range(BLOCKS)]
    last = nn.LayerNorm(size.width), Mean(), nn.Linear(size.width, 10)
    return nn.Sequential(nn.Linear(PIXELS, size.width), *blocks, *last)


def patches(images: Tensor) -> Tensor:
    """Rows of 64 pixels as (images, patches, pixels)."""
    tiles = images.view(-1, 4, 2, 4, 2).transpose(2, 3)
    return tiles.reshape(-1, PATCHES, PIXELS)


def is_channel_layer(name: str, layer: nn.Linear) -> bool:
    """Whether a layer is one of those that become Monarch's."""
    return "channels" in name


@dataclass
class Run:
    """One training."""

    model: nn.Module
    accuracy: list[float] = field(default_factory=list)
    """On the test images, in percent, after every epoch."""
    steps: list[float] = field(default_factory=list)
    """Milliseconds of the processor for each step."""
    errors: list[float] = field(default_factory=list)
    """Of the projection, relative, of each layer."""

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def train(
    kind: str,
    x: Tensor,
    y: Tensor,
    x_test: Tensor,
    y_test: Tensor,
    seed: int,
    epochs: int,
    advance: Callable[[], object],
    size: Size = Size(),
) -> Run:
    """Trains one network with layers of a kind, on rows of 64 pixels in [0, 1]."""
    torch.manual_seed(seed)
    x, x_test = patches(x), patches(x_test)
    run = Run(network(size, size.narrow if kind == "narrow" else 2 * size.width))
    if kind in ("Monarch", "densified"):
        fusee.nn.monarchize(run.model, size.nblocks, filter=is_channel_layer, project=False)
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=2e-3)
    batches = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        if epoch == epochs // 2 and kind in ("projected", "densified"):
            if kind == "projected":
                report = fusee.nn.monarchize(run.model, size.nblocks, filter=is_channel_layer)
                run.errors = [row.error for row in report.rows if row.error is not None]
            else:
                fusee.nn.densify(run.model)
            optimizer = torch.optim.AdamW(run.model.parameters(), lr=2e-3)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - epoch / epochs)
        for batch in torch.randperm(len(x), generator=batches).split(128):
            start = time.process_time()
            optimizer.zero_grad()
            F.cross_entropy(run.model(x[batch]), y[batch]).backward()
            optimizer.step()
            run.steps.append(1e3 * (time.process_time() - start))
        with torch.no_grad():
            right = run.model(x_test).argmax(1) == y_test
        run.accuracy.append(100 * right.float().mean().item())
        advance()
    return run


def table(runs: dict[str, list[Run]]) -> list[tuple[str, ...]]:
    """One row for each kind; of those that change half-way the steps before and after."""
    rows = [("channel layers", "parameters", "ms a step", "then", "test accuracy %")]
    for kind, of_kind in runs.items():
        changes = kind in ("projected", "densified")
        halves: list[list[float]] = [[], []]
        for run in of_kind:
            steps = len(run.steps) // len(run.accuracy)
            middle = len(run.accuracy) // 2 * steps
            halves[0] += run.steps[:middle]
            halves[1] += run.steps[middle:]
        last = [run.accuracy[-1] for run in of_kind]
        deviation = stdev(last) if len(last) > 1 else 0.0
        rows.append(
            (
                kind,
                f"{of_kind[0].parameters:,}",
                f"{median(halves[0] if changes else halves[0] + halves[1]):.1f}",
                f"{median(halves[1]):.1f}" if changes else "",
                f"{mean(last):.2f} ± {deviation:.2f}",
            )
        )
    return rows


def plot(runs: dict[str, list[Run]], path: Path) -> None:
    """Accuracy over epochs, and over the time that they took."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    for kind, of_kind in runs.items():
        curve = torch.tensor([run.accuracy for run in of_kind]).mean(0)
        steps = torch.tensor([run.steps for run in of_kind]).median(0).values
        seconds = steps.view(len(curve), -1).sum(1).cumsum(0) / 1e3
        for axis, along in zip(axes, (torch.arange(1, len(curve) + 1), seconds), strict=True):
            axis.plot(along, curve, label=kind, color=COLORS[kind])
    axes[0].set(xlabel="epochs", ylabel="test accuracy, %", ylim=(80, 100))
    axes[1].set(xlabel="seconds of training, one thread")
    axes[0].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("build/monarch/monarch.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"fusee {fusee.__version__}, engine {fusee.engine()}; torch {torch.__version__}; "
        f"{platform.machine()}"
    )
    images, digits = load_digits(return_X_y=True)
    runs: dict[str, list[Run]] = {kind: [] for kind in COLORS}
    with tqdm(total=len(COLORS) * options.seeds * options.epochs, unit="epoch") as bar:
        for seed in range(options.seeds):
            x, x_test, y, y_test = train_test_split(
                images / 16, digits, test_size=0.25, stratify=digits, random_state=seed
            )
            pixels = [torch.tensor(a, dtype=torch.float32) for a in (x, x_test)]
            labels = [torch.tensor(a, dtype=torch.int64) for a in (y, y_test)]
            data = pixels[0], labels[0], pixels[1], labels[1]
            for kind in COLORS:
                bar.set_description(f"{kind:10} seed {seed}")
                runs[kind].append(train(kind, *data, seed, options.epochs, bar.update))
                bar.set_postfix(accuracy=f"{runs[kind][-1].accuracy[-1]:.2f} %")
    rows = table(runs)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for row in rows:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))
    errors = [error for run in runs["projected"] for error in run.errors]
    print(f"\nthe projections leave out {mean(errors):.2f} of the weights' norm")
    print(f"{options.seeds} seeds, {options.epochs} epochs, mean ± standard deviation, float32")
    plot(runs, options.output)
    print(f"picture: {options.output}")


if __name__ == "__main__":
    main()
