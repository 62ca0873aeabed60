"""From a network's graph to programs that compute with boxes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from fusee.bounds import rules
from fusee.bounds.boxes import Box


class _Tracer(fx.Tracer):
    """Modules with a rule of their own stay whole."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return _own_rule(module) is not None or super().is_leaf_module(module, name)


def _own_rule(module: nn.Module) -> rules.Rule | None:
    """Of a module that says itself what it makes of a box, or of one that torch has."""
    if hasattr(module, "interval_forward"):
        return _interval_forward
    for kind in type(module).__mro__:
        if kind in rules.MODULES and (kind is type(module) or _same_forward(type(module), kind)):
            return rules.MODULES[kind]
    return None


def _interval_forward(module: Any, box: Box, sound: bool = False) -> Box:
    return Box(*module.interval_forward(*box, sound=sound))


def _same_forward(kind: type, base: type) -> bool:
    """Whether a subclass computes what its base does: a parametrised layer does."""
    return kind.forward is base.forward  # type: ignore[attr-defined]


class Network:
    """The graph of a network from one tensor to one tensor."""

    def __init__(self, model: nn.Module) -> None:
        if _own_rule(model) is not None:
            model = nn.Sequential(model)  # a tracer goes into what it is given
        tracer = _Tracer()
        try:
            self.graph = tracer.trace(model)
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} could not be traced with torch.fx: {error}"
            ) from error
        self.model = model
        self.boxed = self._find_boxed()
        self.output = self._find_output()
        self.head = self._find_head()

    def _find_boxed(self) -> set[fx.Node]:
        """The nodes whose values depend on the input."""
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        needed = [node for node in inputs if not node.args]
        if len(needed) != 1:
            raise ValueError(f"the model must have one input, got {len(needed)}")
        boxed = {needed[0]}
        for node in self.graph.nodes:
            depends = any(argument in boxed for argument in node.all_input_nodes)
            if depends and not _is_plain(node):
                boxed.add(node)
        return boxed

    def _find_output(self) -> fx.Node:
        (output,) = (node for node in self.graph.nodes if node.op == "output")
        value = output.args[0]
        if not isinstance(value, fx.Node) or value not in self.boxed:
            raise ValueError("the model must return one tensor that depends on its input")
        return value

    def _find_head(self) -> fx.Node | None:
        """The last layer, where it is linear."""
        node = self.output
        of_module = node.op == "call_module" and isinstance(self.module(node), nn.Linear)
        return node if of_module and len(node.users) == 1 else None

    def module(self, node: fx.Node) -> nn.Module:
        return self.model.get_submodule(str(node.target))

    def last_layer(self) -> nn.Module | None:
        return None if self.head is None else self.module(self.head)

    def rule(self, node: fx.Node) -> rules.Rule:
        """What a node makes of a box."""
        target: Any = node.target
        if node.op == "call_module":
            found = _own_rule(self.module(node))
            name = f"{type(self.module(node)).__name__} ({target})"
        elif node.op == "call_method":
            found, name = rules.METHODS.get(target), f"Tensor.{target}"
        else:
            found, name = rules.FUNCTIONS.get(target), getattr(target, "__name__", str(target))
        if found is None:
            raise NotImplementedError(f"no interval rule for {name}, node {node.name!r}")
        return found

    def local_rule(self, node: fx.Node) -> rules.Rule:
        """What a node makes of a box where ReLU is the linear function that it is at the center."""
        found = self.rule(node)
        if found in rules.CURVED or found is _interval_forward:
            raise NotImplementedError(
                f"no local rule for node {node.name!r}: ReLU alone is known, and what is linear"
            )
        if found is rules.relu:
            return rules.local_relu
        return rules.local_relu_module if found is rules.relu_module else found

    def is_relu(self, node: fx.Node) -> bool:
        return self.rule(node) in (rules.relu, rules.relu_module)


def _is_plain(node: fx.Node) -> bool:
    """Whether a node gives numbers about a tensor's shape, not a tensor."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    return node.op == "call_function" and node.target is getattr and node.args[1] not in ("T", "mT")


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
            if node.op == "placeholder":
                # The default of an argument that the model is not given.
                plain[node] = node.args[0]
            elif any(used in boxes for used in node.all_input_nodes):
                plain[node] = _of_shape(graph, node, argument)
            else:
                plain[node] = graph.node_copy(node, argument)
            if clean:
                points[node] = plain[node]
            continue
        if clean:
            points[node] = graph.node_copy(node, points.__getitem__)
        if node is network.head:
            continue
        if node in fused:
            boxes[node] = boxes[node.all_input_nodes[0]]
            continue
        rule = network.local_rule(node) if local else network.rule(node)
        args = fx.node.map_arg(node.args, argument)
        named: dict[str, Any] = dict(fx.node.map_arg(node.kwargs, argument))
        if node.op == "call_module":
            args = (graph.get_attr(str(node.target)), *args)
        if rule is rules.batch_norm_module and clean:
            named["clean"] = points[node.all_input_nodes[0]]
        following = next(iter(node.users))
        alone = len(node.users) == 1 and following.op != "output" and not (collect or local)
        if alone and rule in rules.WITH_RELU and network.is_relu(following):
            named["relu"] = True
            fused.add(following)
        if network.is_relu(node) and collect:
            before_relu.append(boxes[node.all_input_nodes[0]])
        boxes[node] = graph.call_function(rule, args, {**named, "sound": sound})
    graph.output((boxes[last], points[network.output] if clean else None, tuple(before_relu)))
    return fx.GraphModule(network.model, graph)


def _of_shape(graph: fx.Graph, node: fx.Node, argument: Callable[[fx.Node], fx.Node]) -> fx.Node:
    """What a node says of the shape of a box's center."""
    args = fx.node.map_arg(node.args, argument)
    target = getattr if node.op == "call_function" else getattr(torch.Tensor, str(node.target))
    center = graph.call_function(getattr, (args[0], "center"))
    return graph.call_function(target, (center, *args[1:]), dict(node.kwargs))
