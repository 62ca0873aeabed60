"""Tables of the channels of a model that vanish together, for an optimiser to bring to zero."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fusee.prox.channels import Coupling
from fusee.prox.dependencies import Couplings, find_couplings
from fusee.prox.group_table import GroupTable
from fusee.prox.surgery import Trial, spare_one


@dataclass(frozen=True, eq=False)
class CoupledGroups:
    """Layers whose channels are cut together, as :func:`fusee.nn.prunable_groups` finds them."""

    layers: tuple[str, ...]
    """The layers that make the channels."""
    names: tuple[str, ...]
    """The parameters that make them, as in ``named_parameters``."""
    parameters: tuple[nn.Parameter, ...]
    """These parameters, in the order of the table."""
    table: GroupTable
    """The groups: one for each channel, or for each attention head."""

    def __repr__(self) -> str:
        return f"CoupledGroups(groups={len(self.table)}, names={list(self.names)})"


@dataclass(frozen=True, eq=False)
class PrunableGroups:
    """What :func:`fusee.nn.prunable_groups` returns: a sequence of :class:`CoupledGroups`."""

    sets: tuple[CoupledGroups, ...]
    others: tuple[nn.Parameter, ...]
    """The parameters of the model that are in none of them."""
    left_out: dict[str, str]
    """Why the channels of a layer are in none of them, by the name of the layer."""

    def __len__(self) -> int:
        return len(self.sets)

    def __iter__(self) -> Iterator[CoupledGroups]:
        return iter(self.sets)

    def __getitem__(self, index: int) -> CoupledGroups:
        return self.sets[index]

    def param_groups(self, **options: Any) -> list[dict[str, Any]]:
        """Parameter groups for an optimiser that takes ``groups``: one for each set, with its table and
        the ``options``, and one for all other parameters, without."""
        groups: list[dict[str, Any]] = [
            {"params": list(coupled.parameters), "groups": coupled.table, **options}
            for coupled in self.sets
        ]
        return groups + ([{"params": list(self.others)}] if self.others else [])

    def __str__(self) -> str:
        lines = [f"{len(c.table)} groups: {', '.join(c.layers)}" for c in self.sets]
        lines += [f"left out: {layer}: {reason}" for layer, reason in self.left_out.items()]
        return "\n".join(lines)


def tried_couplings(
    model: nn.Module,
    example_inputs: Any,
    ignored: Iterable[str | nn.Module],
    heads: Mapping[str, str] | None,
    *,
    check: bool,
    trained: bool,
) -> Couplings:
    """The sets that can be cut, after trying it with a random half of their units."""
    couplings = find_couplings(model, example_inputs, ignored, heads, trained=trained)
    if not check or not couplings.found:
        return couplings
    trial = Trial(model, example_inputs, perturbed=True)
    generator = torch.Generator().manual_seed(0)
    cuts = [_random_cut(coupling, generator) for coupling in couplings.found]
    if trial.difference(cuts) is None:
        return couplings
    # One of them is at fault, or several.
    kept = []
    for coupling, cut in zip(couplings.found, cuts, strict=True):
        reason = trial.difference([cut])
        if reason is None:
            kept.append(coupling)
        else:
            couplings.left_out.update(dict.fromkeys(coupling.layers, reason))
    return Couplings(kept, couplings.left_out)


def _random_cut(coupling: Coupling, generator: torch.Generator) -> tuple[Coupling, torch.Tensor]:
    dead = torch.zeros(coupling.units, dtype=torch.bool)
    dead[torch.randperm(coupling.units, generator=generator)[: (coupling.units + 1) // 2]] = True
    return coupling, spare_one(coupling, dead)[0]


def prunable_groups(
    model: nn.Module,
    example_inputs: Any,
    *,
    ignored: Iterable[str | nn.Module] = (),
    heads: Mapping[str, str] | None = None,
    check: bool = True,
) -> PrunableGroups:
    r"""Finds the channels of a model that can be cut out of it, as groups of its parameters.

    A group is everything that makes a channel: its row of the weight of a convolution or a linear
    layer, its bias, and its scale and shift in the batch normalisations behind. Where all of these are
    zero, the channel is zero, whatever the input and the running statistics are, and
    :func:`fusee.nn.cut_zero_groups` takes it out. Layers that are added to one another, as by residual
    connections, have their channels in common: their rows make one group. So have depthwise
    convolutions with the layer before. Of grouped convolutions as many channels are cut from each of
    the groups: the first of each make one group here, the second another.

    The columns with which the next layer reads a channel are in no group of that channel. They belong
    to rows of their own, an element has one group only, and a zero column does not make a channel zero.

    Each set is tried: in a copy of the model with its parameters moved a little, half of the groups are
    set to zero and cut, and the outputs compared. A set for which they change is left out. That is so
    where something behind a channel makes of zero what is not (a sigmoid), takes statistics over
    channels (layer normalisation), or needs a number of channels.

    Args:
        model: a model, in training or in evaluation mode; it is not changed. Give the plain model, not
            one that is wrapped for several devices.
        example_inputs: what the model is run on, a few samples: a tensor, or a tuple of arguments, or a
            dict of arguments with names; on the device of the model.
        ignored: layers, or their names, whose channels are to stay; all parts of a layer are ignored
            with it. The layers whose channels are the outputs need not be named.
        heads: for attention that is written with linear layers: the name of each layer that makes
            queries, keys or values (or all three), and the name of the attribute that holds the number
            of heads, such as ``{"blocks.0.attn.qkv": "blocks.0.attn.num_heads"}``. The groups are then
            the heads. The model must read the number there, and use the width of a head otherwise
            only. Layers of attention that are not named are left out.
        check: whether each set is tried. It needs two copies of the model in float64. Without it,
            models are served whose outputs differ from run to run; then ``ignored`` must name every
            layer whose channels cannot be cut.

    Returns:
        A sequence of :class:`CoupledGroups`, each with ``parameters``, their ``names`` and a ``table``
        that fits them. ``others`` has all remaining parameters, ``left_out`` says why the channels of a
        layer are not among them, ``param_groups`` makes parameter groups for an optimiser. Every
        parameter is in one place only. The ``str`` is an overview.

    Left out are also sets with frozen or shared parameters, with parametrisations (fold them first),
    with a batch normalisation without scale and shift, recurrent layers, and the channels of
    ``nn.MultiheadAttention``, which has as many inside as outside.

    Raises:
        TypeError: ``model`` is not a module, or there are no ``example_inputs``.
        ValueError: ``ignored`` or ``heads`` name what is not in the model, a number of heads does not
            divide the channels, nothing can be cut, or parameters have no values or are sharded.
        RuntimeError: ``torch-pruning`` does not get through the model.
        ImportError: the package ``torch-pruning``, which follows the dependencies, is not installed
            (``pip install 'fusee[prune]'``).

    Deterministic.

    Source: the dependency graph of `Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023
    <https://arxiv.org/abs/2301.12900>`_.

    Example:
        >>> import torch, fusee
        >>> from torch import nn
        >>> model = nn.Sequential(
        ...     nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)
        ... )
        >>> groups = fusee.nn.prunable_groups(model, torch.randn(2, 1, 8, 8))
        >>> groups[0]
        CoupledGroups(groups=4, names=['0.weight', '0.bias', '1.weight', '1.bias'])
        >>> groups.left_out
        {'4': 'its channels are outputs of the model'}
    """
    couplings = tried_couplings(model, example_inputs, ignored, heads, check=check, trained=True)
    if not couplings.found:
        reasons = "; ".join(f"{layer}: {reason}" for layer, reason in couplings.left_out.items())
        raise ValueError(
            f"model must have channels that can be cut ({reasons or 'no layer makes channels'})"
        )
    sets = tuple(_coupled_groups(model, coupling) for coupling in couplings.found)
    taken = {id(parameter) for coupled in sets for parameter in coupled.parameters}
    others = tuple(p for p in model.parameters() if id(p) not in taken)
    return PrunableGroups(sets, others, couplings.left_out)


def _coupled_groups(model: nn.Module, coupling: Coupling) -> CoupledGroups:
    names, parameters, tables = [], [], []
    for name, parameter, dim, ids in coupling.owned(model):
        along = [1] * parameter.dim()
        along[dim] = -1
        names.append(name)
        parameters.append(parameter)
        tables.append(ids.to(parameter.device).reshape(along).expand(parameter.shape))
    table = GroupTable(tables, coupling.units)
    return CoupledGroups(coupling.layers, tuple(names), tuple(parameters), table)
