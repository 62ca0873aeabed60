"""Softmax collapse on modular addition, and two ways out of it: StableMax and PerpGrad.

A two-layer network learns (a + b) mod p from some of all pairs. Trained with softmax cross entropy in
float32 it fits the training pairs, keeps scaling its logits up, and stalls on the others once the losses
of most pairs are rounded to zero. StableMax cross entropy keeps learning with the same optimizer;
PerpGrad removes the scaling direction and generalises within a hundred epochs. (Prieto et al.,
"Grokking at the Edge of Numerical Stability", arXiv:2501.04697; reduced, so that it runs in minutes on
two cores: the share of training pairs is 0.8, so the rise is gradual rather than a late jump.)

    python examples/grokking.py                 about two minutes on one free core
    python examples/grokking.py --quick         a few seconds, PerpGrad only gets through
    python examples/grokking.py --assert        fails unless the run shows the above
    python examples/grokking.py --full          adds PerpGrad on the paper's own size, p = 113
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import fusee
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Task:
    """Addition modulo a prime, and the network that learns it."""

    modulus: int = 59
    train_share: float = 0.8
    hidden: int = 128


@dataclass(frozen=True)
class Arm:
    """One way of training."""

    name: str
    loss: Loss
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    color: str
    task: Task = Task()
    epochs: int | None = None
    """At most so many, whatever the run asks for."""


@dataclass
class Curve:
    """What was measured every few epochs."""

    epoch: list[int] = field(default_factory=list)
    train: list[float] = field(default_factory=list)
    test: list[float] = field(default_factory=list)
    collapse: list[float] = field(default_factory=list)
    norm: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def test_at(self, epoch: int) -> float:
        """The test accuracy at the last measurement up to an epoch."""
        return [a for e, a in zip(self.epoch, self.test, strict=True) if e <= epoch][-1]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the paper's second figure."""
    return torch.optim.AdamW(
        model.parameters(), lr=5e-4, betas=(0.9, 0.99), eps=1e-30, weight_decay=0
    )


def perp_adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the paper's first figure, with projected gradients."""
    base = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0)
    return fusee.optim.PerpGrad(base)


ARMS = [
    Arm("softmax CE", F.cross_entropy, adamw, "#c44e52"),
    Arm("StableMax CE", fusee.stablemax_cross_entropy, adamw, "#4c72b0"),
    Arm("softmax CE + PerpGrad", F.cross_entropy, perp_adamw, "#55a868", epochs=300),
]
FULL_SIZE = Arm(
    "softmax CE + PerpGrad, p = 113",
    F.cross_entropy,
    perp_adamw,
    "#8172b2",
    task=Task(modulus=113, train_share=0.4, hidden=200),
    epochs=300,
)


def pairs(modulus: int) -> tuple[Tensor, Tensor]:
    """Every pair as two one-hot vectors side by side, and its sum."""
    a, b = torch.cartesian_prod(torch.arange(modulus), torch.arange(modulus)).T
    return torch.cat([F.one_hot(a, modulus), F.one_hot(b, modulus)], 1).float(), (a + b) % modulus


def network(task: Task) -> nn.Module:
    """Three linear layers without biases, as in the paper."""
    sizes = [2 * task.modulus, task.hidden, task.hidden, task.modulus]
    linear = [nn.Linear(m, n, bias=False) for m, n in pairwise(sizes)]
    return nn.Sequential(linear[0], nn.ReLU(), linear[1], nn.ReLU(), linear[2])


def collapsed(loss: Loss, logits: Tensor, target: Tensor) -> float:
    """The share of rows whose loss is rounded to zero: their gradient teaches nothing any more.

    For softmax these are the rows where the sum of exponentials has absorbed all but the largest.
    """
    return (loss(logits, target, reduction="none") == 0).float().mean().item()


def accuracy(logits: Tensor, target: Tensor) -> float:
    """The share of rows whose largest logit is the target's."""
    return (logits.argmax(1) == target).float().mean().item()


def train(arm: Arm, epochs: int, seed: int) -> Curve:
    """Trains one arm on full batches with live progress."""
    torch.manual_seed(seed)
    inputs, targets = pairs(arm.task.modulus)
    order = torch.randperm(len(inputs))
    count = int(arm.task.train_share * len(inputs))
    (x, y), (x_test, y_test) = ((inputs[i], targets[i]) for i in (order[:count], order[count:]))
    model = network(arm.task)
    optimizer = arm.optimizer(model)
    curve = Curve()
    epochs = min(epochs, arm.epochs or epochs)
    every = 10 if epochs <= 500 else 25
    start = time.perf_counter()
    with tqdm(total=epochs, desc=f"{arm.name:31}", unit="epoch") as bar:
        for epoch in range(epochs + 1):
            logits = model(x)
            if epoch % every == 0:
                with torch.no_grad():
                    curve.epoch.append(epoch)
                    curve.train.append(accuracy(logits, y))
                    curve.test.append(accuracy(model(x_test), y_test))
                    curve.collapse.append(collapsed(arm.loss, logits, y))
                    norm = torch.nn.utils.get_total_norm(model.parameters())
                    curve.norm.append(norm.item())
                bar.set_postfix(test=f"{curve.test[-1]:.3f}", collapse=f"{curve.collapse[-1]:.2f}")
            if epoch == epochs:
                break
            optimizer.zero_grad()
            arm.loss(logits, y).backward()
            optimizer.step()
            bar.update()
    curve.seconds = time.perf_counter() - start
    return curve


def plot(curves: dict[Arm, Curve], path: Path) -> None:
    """Accuracy, collapse and norm of the weights against the epoch."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for arm, curve in curves.items():
        epochs = [max(epoch, 1) for epoch in curve.epoch]
        style = {"color": arm.color, "linewidth": 2}
        axes[0].plot(epochs, curve.test, label=arm.name, **style)
        axes[0].plot(epochs, curve.train, color=arm.color, linewidth=1, linestyle=":")
        axes[1].plot(epochs, curve.collapse, **style)
        axes[2].plot(epochs, curve.norm, **style)
    titles = (
        "accuracy (solid: test, dotted: training)",
        "training rows whose loss is exactly 0",
        "norm of the weights",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set_xscale("log")
        axis.set_xlim(10, max(curve.epoch[-1] for curve in curves.values()))
        axis.set_xlabel("epoch")
        axis.set_title(title, fontsize=11)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:2]:
        axis.set_ylim(-0.02, 1.02)
    axes[2].set_ylim(bottom=0)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(curves)
    )
    figure.suptitle("Addition modulo a prime in float32")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def table(curves: dict[Arm, Curve]) -> str:
    """The end of each run, and when it generalised."""
    head = (
        f"{'':31} {'epochs':>7} {'train':>7} {'test':>7} {'loss = 0':>9} {'|w|':>7} {'seconds':>8}"
    )
    lines = [head + "   test >= 0.9 at", "-" * (len(head) + 18)]
    for arm, c in curves.items():
        reached = next((e for e, a in zip(c.epoch, c.test, strict=True) if a >= 0.9), None)
        lines.append(
            f"{arm.name:31} {c.epoch[-1]:7} {c.train[-1]:7.3f} {c.test[-1]:7.3f} "
            f"{c.collapse[-1]:9.2f} {c.norm[-1]:7.1f} {c.seconds:8.1f}   "
            + (f"epoch {reached}" if reached is not None else "-")
        )
    return "\n".join(lines)


def check(curves: dict[Arm, Curve]) -> None:
    """Raises AssertionError unless the run shows what it is for; later claims need longer runs."""
    by_name = {arm.name: curve for arm, curve in curves.items()}
    softmax, stablemax = by_name["softmax CE"], by_name["StableMax CE"]
    checks = [(by_name["softmax CE + PerpGrad"].test_at(100) >= 0.98, "PerpGrad by epoch 100")]
    if softmax.epoch[-1] >= 3000:
        collapse = max(c for e, c in zip(softmax.epoch, softmax.collapse, strict=True) if e <= 3000)
        checks += [
            (stablemax.test_at(3000) >= 0.70, "StableMax by epoch 3000"),
            (softmax.test_at(3000) <= 0.45, "softmax has stalled at epoch 3000"),
            (collapse >= 0.4, "softmax has collapsed by epoch 3000"),
        ]
    if softmax.epoch[-1] >= 5000:
        checks += [
            (stablemax.test_at(5000) >= 0.90, "StableMax by epoch 5000"),
            (softmax.test_at(5000) <= 0.42, "softmax has stalled at epoch 5000"),
        ]
    if FULL_SIZE.name in by_name:
        checks.append((by_name[FULL_SIZE.name].test_at(150) >= 0.99, "full size by epoch 150"))
    for holds, what in checks:
        print(f"{'ok  ' if holds else 'FAIL'}  {what}")
    if not all(holds for holds, _ in checks):
        raise AssertionError("the run does not show what it is for")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=5000, help="of the arms without PerpGrad")
    parser.add_argument("--quick", action="store_true", help="120 epochs")
    parser.add_argument("--full", action="store_true", help="adds PerpGrad at p = 113")
    parser.add_argument("--assert", dest="check", action="store_true", help="checks the outcome")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, default=1, help="more gain little at this size")
    parser.add_argument("--output", type=Path, default=Path("build/grokking/grokking.png"))
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    epochs = 120 if options.quick else options.epochs
    arms = ARMS + ([FULL_SIZE] if options.full else [])
    print(f"fusee {fusee.__version__}, engine {fusee.engine()}, {options.threads} thread(s)")
    curves = {arm: train(arm, epochs, options.seed) for arm in arms}
    plot(curves, options.output)
    print(f"\n{table(curves)}\n\nfigure: {options.output}")
    if options.check:
        check(curves)


if __name__ == "__main__":
    main()
