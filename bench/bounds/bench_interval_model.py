"""Bounds of whole networks against auto_LiRPA's, and against the rules in plain operators.

No registry has a current auto_LiRPA; with its source on the path it is timed, and else named as absent.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bench.bounds.peers import Pair, PlainBounds, lirpa_bounds
from bench.harness import Case, Peer, Work, bench_cases

LIRPA = "auto_LiRPA, IBP"
PLAIN = "plain operators"


def mlp(width: int, features: int = 784) -> nn.Sequential:
    """Four linear layers."""
    widths = (features, width, width, width, 10)
    layers: list[nn.Module] = []
    for k, n in itertools.pairwise(widths):
        layers += [nn.Linear(k, n), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn7(width: int, norm: bool, side: int = 32) -> nn.Sequential:
    """The network of the certified-training literature: five convolutions, two linear layers."""
    layers: list[nn.Module] = []
    channels = 3
    for factor, stride in ((1, 1), (1, 1), (2, 2), (2, 1), (2, 1)):
        layers.append(nn.Conv2d(channels, factor * width, 3, stride, 1, bias=not norm))
        channels = factor * width
        layers += [*([nn.BatchNorm2d(channels)] if norm else []), nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(channels * (side // 2) ** 2, 512)]
    layers += [*([nn.BatchNorm1d(512)] if norm else []), nn.ReLU(), nn.Linear(512, 10)]
    return nn.Sequential(*layers).eval()


Bounds = Callable[[Tensor, Tensor], Pair]


def trained(bounds: Bounds, model: nn.Module) -> Bounds:
    """Bounds and the gradients of all parameters."""

    def step(lower: Tensor, upper: Tensor) -> Any:
        with torch.enable_grad():
            low, high = bounds(lower, upper)
            loss = (high - low).sum() + high.square().sum()
            return torch.autograd.grad(loss, list(model.parameters()))

    return step


def case(
    name: str,
    make: Callable[[], nn.Sequential],
    shape: tuple[int, ...],
    bars: Mapping[str, float],
    *,
    training: bool = False,
) -> Case:
    def setup(device: str) -> dict[str, Any]:
        x = torch.rand(shape, device=device)
        return {"lower": x - 0.01, "upper": x + 0.01}

    def contender(bounds: Callable[[nn.Sequential], Bounds]) -> Callable[[], Bounds]:
        def build() -> Bounds:
            torch.manual_seed(0)
            model = make()
            made = bounds(model)
            return trained(made, model) if training else made

        return build

    def ours(model: nn.Sequential) -> Bounds:
        net: Bounds = importlib.import_module("fusee").nn.IntervalModel(model)
        return net

    kind = "forward plus backward" if training else "forward"
    return Case(
        name="interval_model",
        label=f"{name}, batch {shape[0]}, {kind}",
        setup=setup,
        ceiling="none",
        work={"forward": Work(bars=bars)},
        contenders={
            "fusee": Peer(contender(ours), requires="fusee"),
            LIRPA: Peer(contender(lambda model: lirpa_bounds(model, shape)), requires="auto_LiRPA"),
            PLAIN: Peer(contender(PlainBounds)),
        },
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "MLP 4 x 512": (lambda: mlp(512), (784,)),
    "MLP 4 x 2048": (lambda: mlp(2048), (784,)),
    "CNN7": (lambda: cnn7(64, norm=False), (3, 32, 32)),
    "CNN7 with batch norm": (lambda: cnn7(64, norm=True), (3, 32, 32)),
}
PROMISED = {
    ("MLP 4 x 512", 1): 4.0,
    ("CNN7", 1): 4.0,
    ("CNN7 with batch norm", 32): 1.2,
}
SIZES = [(name, batch) for name in NETWORKS for batch in ((1, 128) if "MLP" in name else (1, 32))]


def network_case(name: str, batch: int, *, training: bool) -> Case:
    make, shape = NETWORKS[name]
    promised = PROMISED.get((name, batch))
    # Of a training step a bar is promised where the batch is one of training.
    bars = {} if promised is None or (training and batch == 1) else {LIRPA: promised}
    return case(name, make, (batch, *shape), bars, training=training)


test_networks = bench_cases(
    [network_case(*size, training=False) for size in SIZES],
    quick=[
        case("MLP", lambda: mlp(8, 6), (2, 6), {}),
        case("CNN7", lambda: cnn7(2, True, 8), (2, 3, 8, 8), {}),
    ],
)
test_training = bench_cases(
    [network_case(*size, training=True) for size in SIZES],
    quick=[case("MLP", lambda: mlp(8, 6), (2, 6), {}, training=True)],
)
