"""From a network's graph to programs that compute with boxes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from fusee.bounds import rules
from fusee.bounds.interval_trace import Network, traced_through
from fusee.bounds.options import in_mode

_MODEL = "model."
"""Where the model is below the root of a program."""


def build(network: Network, *, clean: bool, collect: bool, local: bool = False) -> fx.GraphModule:
    """A module that takes (box, sound), or (box, sound, input), and returns

    - the box before the network's last layer where that is linear, else the box at its end;
    - the network's output for the input where there is one (``clean``), else None;
    - the boxes before each ReLU where asked (``collect``), else none.

    ReLU is computed with the layer before it, unless its box is asked for. With ``clean`` batch norm
    uses the statistics of the input in training. With ``local`` ReLU is the linear function that it is
    at the center.
    """
    graph = fx.Graph()
    box, sound = graph.placeholder("box"), graph.placeholder("sound")
    boxes: dict[fx.Node, fx.Node] = {}
    points: dict[fx.Node, fx.Node] = {}
    plain: dict[fx.Node, fx.Node] = {}
    before_relu: list[fx.Node] = []
    fused: set[fx.Node] = set()
    last = network.head.all_input_nodes[0] if network.head is not None else network.output

    def argument(node: fx.Node) -> fx.Node:
        return boxes[node] if node in boxes else plain[node]

    for node in network.graph.nodes:
        if node.op == "output":
            continue
        if node.op == "placeholder" and node in network.boxed:
            boxes[node] = box
            if clean:
                points[node] = graph.placeholder("input")
            continue
        if node not in network.boxed:
            plain[node] = _plain(graph, node, boxes, argument)
            if clean:
                points[node] = plain[node]
            continue
        if clean:
            points[node] = _copy(graph, node, points.__getitem__)
        if node is network.head or not node.users:
            continue
        if node in fused:
            boxes[node] = boxes[node.all_input_nodes[0]]
            continue
        rule = network.local_rule(node) if local else network.rule(node)
        args = fx.node.map_arg(node.args, argument)
        named: dict[str, Any] = dict(fx.node.map_arg(node.kwargs, argument))
        for name in ("input", "tensors"):
            if name in named:
                args = (named.pop(name), *args)
        if node.op == "call_module":
            args = (graph.get_attr(_MODEL + str(node.target)), *args)
        if rule is rules.batch_norm_module and clean:
            named["clean"] = points[node.all_input_nodes[0]]
        following = next(iter(node.users))
        alone = len(node.users) == 1 and not (collect or local)
        if alone and rule in rules.WITH_RELU and network.is_relu(following):
            named["relu"] = True
            fused.add(following)
        if network.is_relu(node) and collect:
            before_relu.append(boxes[node.all_input_nodes[0]])
        boxes[node] = graph.call_function(rule, args, {**named, "sound": sound})
    graph.output((boxes[last], points[network.output] if clean else None, tuple(before_relu)))
    return fx.GraphModule(network.root, graph)


def _plain(
    graph: fx.Graph,
    node: fx.Node,
    boxes: dict[fx.Node, fx.Node],
    argument: Callable[[fx.Node], fx.Node],
) -> Any:
    """What does not depend on the input's values."""
    if node.op == "placeholder":
        return node.args[0]  # the default of an argument that the model is not given
    if node.op == "get_attr":
        # Read at each run, as it may be replaced; what holds it stays.
        owner, _, name = (_MODEL + str(node.target)).rpartition(".")
        return graph.call_function(getattr, (graph.get_attr(owner), name))
    if not any(used in boxes for used in node.all_input_nodes):
        return _copy(graph, node, argument)
    # What a node says of the shape of a box's center.
    args = fx.node.map_arg(node.args, argument)
    target = getattr if node.op == "call_function" else getattr(torch.Tensor, str(node.target))
    center = graph.call_function(getattr, (args[0], "center"))
    return graph.call_function(target, (center, *args[1:]), dict(node.kwargs))


def _copy(graph: fx.Graph, node: fx.Node, argument: Callable[[fx.Node], fx.Node]) -> fx.Node:
    """The node itself, below a program's root."""
    copied = graph.node_copy(node, argument)
    if node.op == "call_module":
        copied.target = _MODEL + str(node.target)
    return copied


class Programs:
    """The programs of a model, each built when it is asked for."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._sources = traced_through(model)
        self._networks: dict[tuple[bool, ...], Network] = {}
        self._programs: dict[tuple[int, bool, bool], fx.GraphModule] = {}

    def network(self) -> Network:
        """The model's graph in the modes that its modules are in; equal graphs are one."""
        modes = tuple([module.training for module in self._sources])
        if modes not in self._networks:
            made = Network(self.model)
            known = [n for n in self._networks.values() if str(n.graph) == str(made.graph)]
            self._networks[modes] = known[0] if known else made
        return self._networks[modes]

    def program(self, *, clean: bool, collect: bool) -> fx.GraphModule:
        """One of :func:`build`."""
        network = self.network()
        key = (id(network), clean, collect)
        if key not in self._programs:
            self._programs[key] = build(network, clean=clean, collect=collect)
        return self._programs[key]

    def build_all(self) -> None:
        """Builds them all for training and for evaluation, so that a compiler finds them."""
        for training in (False, True):
            with in_mode(self.model, training):
                for clean in (False, True):
                    for collect in (False, True):
                        self.program(clean=clean, collect=collect)
