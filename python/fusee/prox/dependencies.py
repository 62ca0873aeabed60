"""Which channels of a model have to vanish together, from the graph of its dependencies."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusee.prox.channels import (
    CONVOLUTIONS,
    PRODUCERS,
    TRANSPOSED,
    Coupling,
    Place,
    call,
    check_heads,
    check_ignored,
    check_model,
    map_tensors,
    problems_of,
    tensors_of,
)


def torch_pruning() -> Any:
    """The library that knows the dependencies; ImportError, with what to install, without it."""
    try:
        return importlib.import_module("torch_pruning")
    except ImportError as error:
        raise ImportError(
            "the dependencies of a model's layers come from the package torch-pruning, which is not "
            "installed: pip install 'fusee[prune]'"
        ) from error


OUTPUTS = "its channels are outputs of the model"
WRONG = "the graph of the dependencies is not right about its channels"


@dataclass
class Couplings:
    """What :func:`find_couplings` found."""

    found: list[Coupling] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """Why a layer's channels are not among them, by its name."""


class _Partition:
    """Items in classes that are merged."""

    def __init__(self) -> None:
        self.parents: dict[Any, Any] = {}

    def find(self, item: Any) -> Any:
        self.parents.setdefault(item, item)
        while self.parents[item] != item:
            self.parents[item] = self.parents[self.parents[item]]
            item = self.parents[item]
        return item

    def merge(self, items: Iterable[Any]) -> None:
        roots = [self.find(item) for item in items]
        for root in roots[1:]:
            self.parents[self.find(root)] = self.find(roots[0])

    def classes(self) -> list[list[Any]]:
        members: dict[Any, list[Any]] = {}
        for item in self.parents:
            members.setdefault(self.find(item), []).append(item)
        return list(members.values())


class _Index(NamedTuple):
    """An index as the library's mappings take it."""

    idx: int
    root_idx: int


class _Graph:
    """The dependency graph of a copy of the model, in names of the model."""

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        tp = torch_pruning()
        outputs: list[Tensor] = []

        def mark(out: Any) -> list[Tensor]:
            # Only an output that no layer of its own makes is marked as one in the graph.
            outputs.extend(tensor * 1 for tensor in tensors_of(out) if tensor.requires_grad)
            return outputs

        with torch.inference_mode(False), torch.enable_grad():
            # The library leaves the model in evaluation mode, and follows only what requires a gradient,
            # in which tensors from inference mode take no part.
            self.model = deepcopy(model).eval()
            for parameter in self.model.parameters():
                parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
            example_inputs = map_tensors(example_inputs, Tensor.clone)
            try:
                self.graph = tp.DependencyGraph().build_dependency(
                    self.model,
                    example_inputs,
                    forward_fn=call,
                    output_transform=mark,
                    verbose=False,
                )
            except Exception as error:
                if not outputs:
                    raise
                raise RuntimeError(
                    f"torch-pruning did not get through the dependencies of this model: "
                    f"{type(error).__name__}: {error}"
                ) from error
        if not outputs:
            raise ValueError("the model must put out tensors that depend on its parameters")
        self.output_type = tp.ops.OPTYPE.OUTPUT
        self.names: dict[Any, str] = {module: name for name, module in self.model.named_modules()}
        self.parameters = {id(p): name for name, p in self.model.named_parameters()}
        self.order = {name: number for number, name in enumerate(self.names.values())}
        producers = [m for m in self.graph.module2node if isinstance(m, PRODUCERS)]
        self.producers = sorted(producers, key=lambda m: self.order[self.names[m]])
        # No layer or concatenation has more channels than all layers together.
        self.limit = sum(
            self.channels(Place(self.names[module], side))
            for module in self.graph.module2node
            if module in self.names
            for side in ("out", "in")
        )

    def coupled(
        self, module: nn.Module, channel: int
    ) -> tuple[list[tuple[Place, int]], str | None]:
        """All channels that go with one output channel, and why none of them can be cut, if so.

        As the library's ``get_pruning_group``, which does not end where mappings of channels contradict
        one another, and finds all mappings anew for each channel.
        """
        channels, reason = [], None
        pruner = self.graph.get_pruner_of_module(module)
        start = (self.graph.module2node[module], pruner.prune_out_channels, channel)
        seen, open_ends = {start}, [start]
        while open_ends:
            node, prune, index = open_ends.pop()
            place = self._place(node, prune)
            if place is not None:
                channels.append((place, index))
            if node.type == self.output_type:
                reason = OUTPUTS
            for dependency in node.dependencies:
                if not dependency.is_triggered_by(prune):
                    continue
                indices: list[Any] = [_Index(index, index)]
                for mapping in dependency.index_mapping:
                    indices = indices if mapping is None else mapping(indices)
                for mapped in indices:
                    item = (dependency.target, dependency.handler, mapped.idx)
                    if not 0 <= mapped.idx < self.limit:
                        reason = WRONG
                    elif item not in seen:
                        seen.add(item)
                        open_ends.append(item)
            if reason == WRONG:
                break
        return channels, reason

    def _place(self, node: Any, prune: Any) -> Place | None:
        if isinstance(node.module, nn.Parameter):
            name = self.parameters[id(node.module)]
            return Place(name, "parameter", node.pruning_dim % node.module.dim())
        if node.module not in self.names:
            return None
        out = self.graph.is_out_channel_pruning_fn(prune)
        return Place(self.names[node.module], "out" if out else "in")

    def is_producer(self, place: Place) -> bool:
        return isinstance(self.model.get_submodule(place.name), PRODUCERS)

    def channels(self, place: Place) -> int:
        if place.side == "parameter":
            return int(self.model.get_parameter(place.name).shape[place.dim])
        module = self.model.get_submodule(place.name)
        ask = self.graph.get_out_channels if place.side == "out" else self.graph.get_in_channels
        count = ask(module)
        # A PReLU with one slope for all channels has nothing to cut.
        return 0 if count is None else int(count)


def find_couplings(
    model: nn.Module,
    example_inputs: Any,
    ignored: Iterable[str | nn.Module],
    heads: Mapping[str, str] | None,
    *,
    trained: bool,
) -> Couplings:
    """The sets of channels that the graph and the kinds of layers allow to be cut.

    Whether a cut leaves the outputs as they were is not tried here. Where the units are to be
    ``trained``, sets with frozen parameters are left out.
    """
    check_model(model, example_inputs)
    skipped, counts = check_ignored(model, ignored), check_heads(model, heads)
    graph = _Graph(model, example_inputs)
    problems = problems_of(model, trained)
    problems.update({Place(name, "out"): "ignored" for name in skipped})
    partition = _partition(graph, problems)
    _merge_grouped(graph, partition)
    # What is left out anyway was not followed to the last channel.
    _merge_heads(partition, {k: v for k, v in counts.items() if Place(k, "out") not in problems})
    result = Couplings(left_out=_never_called(model, graph))
    for units in _sets(partition):
        places = _ordered(graph, {place for unit in units for place, _ in unit})
        layers = tuple(p.name for p in places if p.side == "out" and graph.is_producer(p))
        reason = next((problems[place] for place in places if place in problems), None)
        if reason is None and len(units) < 2:
            reason = "its channels can only be cut all together"
        ids = None if reason else _ids(graph, places, units)
        if ids is not None:
            counted = dict.fromkeys((heads or {})[layer] for layer in layers if layer in counts)
            result.found.append(Coupling(len(units), ids, layers, tuple(counted)))
        else:
            result.left_out.update(dict.fromkeys(layers, reason or WRONG))
    return result


def _partition(graph: _Graph, problems: dict[Place, str]) -> _Partition:
    """All channels, in one class where they go together. Of a layer that is left out one channel is
    enough; what has its channels in common with it is added to the ``problems``."""
    partition = _Partition()
    for module in graph.producers:
        own = Place(graph.names[module], "out")
        for channel in range(graph.channels(own)):
            if (own, channel) in partition.parents:
                continue
            channels, found = graph.coupled(module, channel)
            partition.merge([(own, channel), *channels])
            places = _ordered(graph, {own, *(place for place, _ in channels)})
            reason = next((problems[place] for place in places if place in problems), None)
            reason = found or reason
            if reason is not None:
                for place in places:
                    if place.side != "in":
                        problems.setdefault(place, reason)
                break
    return partition


def _never_called(model: nn.Module, graph: _Graph) -> dict[str, str]:
    """The layers that are not in the graph, but for those of attention, which is one layer there."""
    called = {graph.names[module] for module in graph.producers}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            called |= {f"{name}.{part}".lstrip(".") for part, _ in module.named_modules()}
    reason = "the model does not call it on example_inputs, in evaluation mode"
    return {
        name: reason
        for name, module in model.named_modules()
        if isinstance(module, PRODUCERS) and name not in called
    }


def _ordered(graph: _Graph, places: set[Place]) -> list[Place]:
    """Producers in the order of the model, then parameters, then the layers that read them."""
    sides = ("out", "parameter", "in")
    return sorted(
        places, key=lambda p: (sides.index(p.side), graph.order.get(p.name, -1), p.name, p.dim)
    )


def _ids(
    graph: _Graph, places: list[Place], units: list[list[tuple[Place, int]]]
) -> dict[Place, Tensor] | None:
    """The units of all channels; None where there are no such channels."""
    ids = {place: torch.full((graph.channels(place),), -1) for place in places}
    for number, unit in enumerate(units):
        for place, channel in unit:
            if ids[place].numel():
                if channel >= len(ids[place]):
                    return None
                ids[place][channel] = number
    return {place: numbers for place, numbers in ids.items() if numbers.numel()}


def _merge_grouped(graph: _Graph, partition: _Partition) -> None:
    """Grouped convolutions lose as many channels in each of their groups: the first of each together,
    the second, and so on."""
    classes: dict[Any, list[Any]] = {}
    for place, channel in list(partition.parents):
        module = None if place.side == "parameter" else graph.model.get_submodule(place.name)
        if (
            isinstance(module, (*CONVOLUTIONS, *TRANSPOSED))
            and 1 < module.groups < module.out_channels
        ):
            size = graph.channels(place) // module.groups
            classes.setdefault((place, channel % size), []).append((place, channel))
    for members in classes.values():
        partition.merge(members)


def _merge_heads(partition: _Partition, counts: dict[str, int]) -> None:
    """All channels of a head are one unit. One layer may make queries, keys and values in turn."""
    heads = []
    for layer, count in counts.items():
        own = sorted(
            channel for place, channel in partition.parents if place == Place(layer, "out")
        )
        if not own:
            raise ValueError(f"heads must name layers that the model runs, got {layer!r}")
        roots = [partition.find((Place(layer, "out"), channel)) for channel in own]
        width = len(own) // roots.count(roots[0])
        if width % count:
            raise ValueError(
                f"heads must divide the {width} channels of {layer}, got {count} heads"
            )
        size = width // count
        heads += [
            [(Place(layer, "out"), c) for c in own if c % width // size == head]
            for head in range(count)
        ]
    # After all layers were counted: to merge those of one merges those of others.
    for channels in heads:
        partition.merge(channels)


def _sets(partition: _Partition) -> list[list[list[tuple[Place, int]]]]:
    """Units that share a producing layer or a parameter, which can be in one table only."""
    units = partition.classes()
    sets = _Partition()
    for number, unit in enumerate(units):
        sets.merge([number, *{place for place, _ in unit if place.side != "in"}])
    chosen = [[units[n] for n in members if isinstance(n, int)] for members in sets.classes()]
    return [members for members in chosen if members]
