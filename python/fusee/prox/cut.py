"""Takes the channels that are zero out of a model, which computes the same without them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fusee.prox.channels import PRODUCERS, Coupling, call
from fusee.prox.prunable import tried_couplings
from fusee.prox.surgery import Trial, cut_units, spare_one, zero_units


@dataclass(frozen=True)
class LayerCut:
    """What :func:`fusee.nn.cut_zero_groups` did to one layer."""

    name: str
    before: int
    """How many channels it put out."""
    after: int
    """How many it puts out."""


@dataclass(frozen=True, repr=False)
class CutReport:
    """What :func:`fusee.nn.cut_zero_groups` did: its ``str`` is a table."""

    layers: list[LayerCut]
    """The layers that make channels, in order, cut or not."""
    parameters: tuple[int, int]
    """How many parameters the model had and has."""
    macs: tuple[int, int]
    """Multiplications and additions of matrix products and convolutions for ``example_inputs``."""
    spared: list[str]
    """The layers that were all zero, of which one channel was kept."""
    left_out: dict[str, str]
    """Why a layer kept all its channels whatever they are, by its name."""

    def __str__(self) -> str:
        rows = [(layer.name, f"{layer.before:,}", f"{layer.after:,}") for layer in self.layers]
        totals = {"parameters": self.parameters, "MACs": self.macs}
        rows += [(name, f"{old:,}", f"{new:,}") for name, (old, new) in totals.items()]
        head = ("layer", "before", "after")
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [
            "  ".join([name.ljust(widths[0]), before.rjust(widths[1]), after.rjust(widths[2])])
            for name, before, after in (head, *rows)
        ]
        rule = "-" * len(lines[0])
        parts = [lines[0], rule, *lines[1:-2], rule, *lines[-2:]]
        parts += [f"all zero, one channel kept: {name}" for name in self.spared]
        parts += [f"left out: {name}: {reason}" for name, reason in self.left_out.items()]
        return "\n".join(parts)

    __repr__ = __str__


def cut_zero_groups(
    model: nn.Module,
    example_inputs: Any,
    *,
    ignored: Iterable[str | nn.Module] = (),
    heads: Mapping[str, str] | None = None,
    inplace: bool = False,
    check: bool = True,
) -> tuple[nn.Module, CutReport]:
    r"""Cuts the channels whose groups are zero out of a model.

    The groups are those of :func:`fusee.nn.prunable_groups`, found anew. A channel goes if all that
    makes it is exactly zero, as proximal operators leave it; a small number keeps it. With it go its
    running statistics and the columns with which other layers read it. The model is an ordinary one
    with smaller layers, and computes what it did, to rounding, in evaluation mode and in training mode.
    Its ``state_dict`` fits a model that was cut likewise; to load it elsewhere, save the whole model, or
    the model before the cut.

    A layer that is all zero keeps one channel, and the report says so: layers without channels do not
    run.

    Args:
        model: a model, in training or in evaluation mode, which stays as it is in that.
        example_inputs: see :func:`fusee.nn.prunable_groups`.
        ignored: likewise.
        heads: likewise. The attributes that count the heads get the new number.
        inplace: whether the model itself is cut, rather than a copy. Parameters that lose elements are
            then new ones and all gradients are gone: make a new optimizer.
        check: whether the cut is tried first, see :func:`fusee.nn.prunable_groups`, and the outputs
            compared in the end, in float64 where the model runs in that.

    Returns:
        The model, or its copy, and a :class:`CutReport` with the channels of each layer, the parameters
        and the multiplications (MACs) before and after. The ``str`` of the report is a table.

    Raises:
        TypeError, ValueError, RuntimeError, ImportError: as :func:`fusee.nn.prunable_groups`. That
            nothing can be cut, or nothing is zero, is no error.
        RuntimeError: the outputs of the cut model differ, which ``check`` sees. The model is then left
            as it was.

    Frozen parameters may be cut as any, and stay frozen.

    Deterministic.

    Source: see :func:`fusee.nn.prunable_groups`.

    Example:
        >>> import torch, fusee
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> with torch.no_grad():
        ...     for parameter in model[0].parameters():
        ...         _ = parameter[1:3].zero_()
        >>> small, report = fusee.nn.cut_zero_groups(model, torch.randn(1, 6))
        >>> small
        Sequential(
          (0): Linear(in_features=6, out_features=2, bias=True)
          (1): ReLU()
          (2): Linear(in_features=2, out_features=2, bias=True)
        )
        >>> print(report)
        layer       before  after
        -------------------------
        0                4      2
        2                2      2
        -------------------------
        parameters      38     20
        MACs            32     16
        left out: 2: its channels are outputs of the model
    """
    couplings = tried_couplings(model, example_inputs, ignored, heads, check=check, trained=False)
    cuts: list[tuple[Coupling, Tensor]] = []
    spared: list[str] = []
    for coupling in couplings.found:
        dead, kept = spare_one(coupling, zero_units(model, coupling))
        spared += kept
        cuts.append((coupling, dead))
    if check and cuts:
        problem = Trial(model, example_inputs).difference(cuts)
        if problem is not None:
            raise RuntimeError(
                f"the zero groups were not cut: {problem}. Name the layers to leave in `ignored`"
            )
    before, macs = _channels(model), _macs(model, example_inputs)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    with torch.inference_mode(False):
        result = model if inplace else deepcopy(model)
        cut_units(result, cuts)
    after = _channels(result)
    report = CutReport(
        layers=[LayerCut(name, count, after[name]) for name, count in before.items()],
        parameters=(parameters, sum(parameter.numel() for parameter in result.parameters())),
        macs=(macs, _macs(result, example_inputs)),
        spared=[name for name in spared if name in before],
        left_out=couplings.left_out,
    )
    return result, report


def _channels(model: nn.Module) -> dict[str, int]:
    counts = {}
    for name, module in model.named_modules():
        if isinstance(module, PRODUCERS):
            attributes = ("out_channels", "out_features", "embedding_dim")
            counts[name] = next(int(getattr(module, a)) for a in attributes if hasattr(module, a))
    return counts


def _macs(model: nn.Module, example_inputs: Any) -> int:
    modes = {module: module.training for module in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        # In training mode running statistics would move; the fast path of attention is not counted.
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call(model, example_inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes.items():
            module.training = mode
    return counter.get_total_flops() // 2
