"""StableMax itself: s(x) / sum s, with s(x) = x + 1 for x >= 0 and 1 / (1 - x) below."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from bench.harness import Case, Peer, Work, bench_cases, compiled
from bench.losses.peers import positive_map, symlog


def eager_stablemax(input: Tensor) -> Tensor:
    """The two-line form that users write."""
    s = positive_map(input)
    return s / s.sum(-1, keepdim=True)


def softmax_of_symlog(input: Tensor) -> Tensor:
    """The same function as a softmax, one expression for a compiler to fuse."""
    return torch.softmax(symlog(input), -1)


def eager_log_stablemax(input: Tensor) -> Tensor:
    """Logarithm of the two-line form."""
    s = positive_map(input)
    return torch.log(s / s.sum(-1, keepdim=True))


def log_softmax_of_symlog(input: Tensor) -> Tensor:
    """The same function as a log-softmax."""
    return torch.log_softmax(symlog(input), -1)


def case(name: str, rows: int, classes: int) -> Case:
    """Forward: read x, write y (a row fits on chip). Backward: read x, upstream; write dx."""
    n = 4 * rows * classes
    log = name == "log_stablemax"
    eager = eager_log_stablemax if log else eager_stablemax
    one_line = log_softmax_of_symlog if log else softmax_of_symlog
    cousin = torch.log_softmax if log else torch.softmax

    def setup(device: str) -> dict[str, Any]:
        return {"input": 3 * torch.randn(rows, classes, device=device)}

    return Case(
        name=name,
        label=f"{rows} x {classes} float32",
        setup=setup,
        grad=("input",),
        work={
            "forward": Work(bytes=2 * n, written=n),
            "forward+backward": Work(bytes=5 * n, written=2 * n),
        },
        contenders={
            "fusee": Peer(
                lambda: getattr(importlib.import_module("fusee"), name), requires="fusee"
            ),
            "eager, float32": Peer(lambda: eager),
            "torch.compile, symlog": Peer(lambda: compiled(one_line), slow_start=True),
            "torch softmax (another function)": Peer(lambda: lambda input: cousin(input, -1)),
        },
    )


NAMES = ("stablemax", "log_stablemax")

test_stablemax = bench_cases(
    [case(name, *size) for name in NAMES for size in ((4096, 32000), (131072, 11))],
    quick=[case(name, 16, 100) for name in NAMES],
)
