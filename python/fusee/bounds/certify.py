"""How many samples of a data set a network reads right, reads right under attack, and provably so."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fusee._checks import check_floating, check_tensor
from fusee.bounds.boxes import next_above, next_below
from fusee.bounds.interval_margins import check_targets
from fusee.bounds.interval_model import IntervalModel
from fusee.bounds.options import check_count, check_model, check_number, in_mode
from fusee.bounds.pgd_attack import check_outputs, pgd_attack, reads_right


@dataclass(frozen=True)
class CertificationReport:
    """What :func:`fusee.nn.certify` returns: counts of samples. Its ``str`` is a table of shares."""

    samples: int
    standard: int
    """Read right."""
    adversarial: int
    """Those of them that the attack could not change."""
    certified: int
    """Those of them for which no point of the box can be read otherwise."""
    eps: float
    """How far each element of an input may move."""

    def __str__(self) -> str:
        rows = [
            (name, f"{count:,}", f"{100 * count / max(self.samples, 1):.2f} %")
            for name, count in (
                ("right", self.standard),
                ("under attack", self.adversarial),
                ("certified", self.certified),
            )
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            f"{name:<{widths[0]}}  {count:>{widths[1]}}  {share:>{widths[2]}}"
            for name, count, share in rows
        ]
        return "\n".join((f"{self.samples:,} samples, eps {self.eps:g}", *lines))


class _Progress:
    """A line on stderr that is written over, at most five times a second."""

    def __init__(self, loader: Any, shown: bool) -> None:
        self.batches = len(loader) if hasattr(loader, "__len__") else None
        self.shown = shown
        self.start = time.monotonic()
        self.last = 0.0
        self.width = 0

    def batch(self, done: int, samples: int, certified: int) -> None:
        now = time.monotonic()
        if not self.shown or (now - self.last < 0.2 and done != self.batches):
            return
        self.last = now
        text = f"certified {100 * certified / max(samples, 1):.1f} % of {samples:,}, batch {done}"
        if self.batches is not None:
            left = (now - self.start) / done * (self.batches - done)
            text += f" of {self.batches}, {left:.0f} s left"
        self.width = max(self.width, len(text))
        print(f"\r{text:<{self.width}}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.width:
            print(file=sys.stderr)


def _ends(
    input: Tensor, eps: float, minimum: float, maximum: float, sound: bool
) -> tuple[Tensor, Tensor]:
    lower, upper = input - eps, input + eps
    if sound:
        # The box itself is within half a unit in the last place of these.
        lower, upper = (
            next_below((input.double() - eps).to(input.dtype)),
            next_above((input.double() + eps).to(input.dtype)),
        )
        least, most = (torch.tensor(end, dtype=torch.float64) for end in (minimum, maximum))
        low, high = least.to(input.dtype), most.to(input.dtype)
        minimum = (low if low.double() <= least else next_below(low)).item()
        maximum = (high if high.double() >= most else next_above(high)).item()
    return lower.clamp(min=minimum), upper.clamp(max=maximum)


def certify(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    eps: float,
    *,
    minimum: float = 0.0,
    maximum: float = 1.0,
    attack_steps: int = 40,
    restarts: int = 1,
    sound: bool = False,
    progress: bool = True,
    generator: torch.Generator | None = None,
) -> CertificationReport:
    r"""Counts the samples that a network reads right, under attack too, and provably in the whole box.

    The box of an input x is all x' with \|x' - x\| <= ``eps`` and ``minimum`` <= x' <= ``maximum``,
    element by element. A sample is right if the output of its class is above all others; under attack,
    if it still is at the point that :func:`fusee.nn.pgd_attack` finds; certified, if besides all its
    margins (:meth:`fusee.nn.IntervalModel.margins`) are below zero, strictly. The three sets lie in each
    other. Interval bounds certify less than a complete verifier may.

    The model runs in evaluation mode, and then each of its modules is in the mode that it had.

    Args:
        model: a network whose output is (batch, classes), or a :class:`fusee.nn.IntervalModel` of one.
        loader: gives ``(input, target)``, floating and int64, such as a ``DataLoader``. They are moved
            to the device of the model's first parameter.
        eps: the radius, in the unit of the model's input: a normalisation belongs into the model.
        minimum, maximum: the range of the inputs; ``-inf`` and ``inf`` for none.
        attack_steps: of the attack, in each restart.
        restarts: of the attack.
        sound: whether the boxes and their bounds are rounded outward, so that what is certified is so
            for the network in exact arithmetic.
        progress: whether a line on stderr shows how far it is, and the time left where the loader has a
            length.
        generator: of the attack's first points, on the device of the model.

    Returns:
        A :class:`fusee.nn.CertificationReport`.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: ``eps`` is negative or infinite, ``minimum`` is not below ``maximum``, a number is
            not positive, an input is not in the range, the loader has no samples, the model cannot be
            traced, or its output is not (batch, classes).
        IndexError: a target is no class.
        NotImplementedError: an operation has no rule, or none for ``sound``.

    Deterministic as far as the model is, given the generator.

    Source: Gowal et al., "On the effectiveness of interval bound propagation for training verifiably
    robust models", 2018.

    Example:
        >>> import torch, fusee
        >>> model = torch.nn.Linear(2, 2)
        >>> _ = model.weight.data.copy_(torch.eye(2)), model.bias.data.zero_()
        >>> x, y = torch.tensor([[0.9, 0.1], [0.5, 0.4], [0.2, 0.8]]), torch.tensor([0, 0, 0])
        >>> print(fusee.nn.certify(model, [(x, y)], 0.1, progress=False))
        3 samples, eps 0.1
        right         2  66.67 %
        under attack  1  33.33 %
        certified     1  33.33 %
    """
    check_model(model)
    check_number("eps", eps, 0, sys.float_info.max)
    check_number("minimum", minimum, -torch.inf, torch.inf)
    check_number("maximum", maximum, -torch.inf, torch.inf)
    if not minimum < maximum:
        raise ValueError(f"minimum must be below maximum {maximum}, got {minimum}")
    check_count("attack_steps", attack_steps)
    check_count("restarts", restarts)
    parameter = next(model.parameters(), None)
    samples = standard = adversarial = certified = 0
    line = _Progress(loader, progress)
    with in_mode(model, False), torch.no_grad():
        net = IntervalModel(model)
        for done, (input, target) in enumerate(loader, 1):
            check_floating("input", input)
            check_tensor("target", target)
            if parameter is not None:
                input, target = input.to(parameter.device), target.to(parameter.device)
            if not bool(((input >= minimum) & (input <= maximum)).all()):
                raise ValueError(
                    f"inputs must be in [{minimum}, {maximum}], got values from "
                    f"{input.min().item()} to {input.max().item()}"
                )
            output = net.model(input.clone())  # which may write to it
            check_outputs(output, len(input))
            check_targets(target, (len(input),), output.shape[1])
            right = reads_right(output, target)
            samples += len(input)
            if bool(right.any()):
                standard += int(right.sum())
                x, y = input[right], target[right]
                lower, upper = _ends(x, eps, minimum, maximum, sound)
                found = pgd_attack(
                    net.model,
                    x,
                    y,
                    lower,
                    upper,
                    steps=attack_steps,
                    restarts=restarts,
                    generator=generator,
                )
                holds = reads_right(net.model(found.clone()), y)
                below = net.margins(lower, upper, y, sound=sound) < 0
                proven = holds & (below.sum(1) == output.shape[1] - 1)
                adversarial += int(holds.sum())
                certified += int(proven.sum())
            line.batch(done, samples, certified)
    line.close()
    if samples == 0:
        raise ValueError("loader has no samples")
    return CertificationReport(samples, standard, adversarial, certified, float(eps))
