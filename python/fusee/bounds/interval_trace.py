"""The graph of a network: what depends on its input, what stays whole, and what has a rule."""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
from torch import fx, nn

from fusee.bounds import rules
from fusee.bounds.boxes import Box, checked_box

_SHAPE_METHODS = ("size", "dim", "numel", "is_floating_point")
_SHAPE_ATTRIBUTES = ("shape", "ndim", "dtype", "device", "layout", "is_cuda", "requires_grad")
_IN_PLACE = (
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv),
    *(torch.relu_, torch.nn.functional.relu_),
)


class _Proxy(fx.Proxy):
    """One that tells ``y += z``, which writes to a tensor, from ``y = y + z``."""

    def _write(self, function: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __iadd__(self, other: Any) -> Any:
        return self._write(operator.iadd, other)

    def __isub__(self, other: Any) -> Any:
        return self._write(operator.isub, other)

    def __imul__(self, other: Any) -> Any:
        return self._write(operator.imul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._write(operator.itruediv, other)


class _Tracer(fx.Tracer):
    """Modules with a rule of their own stay whole, and buffers are read at each run."""

    proxy_buffer_attributes = True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return own_rule(module) is not None or super().is_leaf_module(module, name)


def own_rule(module: nn.Module) -> rules.Rule | None:
    """Of a module that says itself what it makes of a box, or of one that torch has."""
    if hasattr(module, "interval_forward"):
        return _interval_forward
    for kind in type(module).__mro__:
        if kind in rules.MODULES and (kind is type(module) or _same_forward(type(module), kind)):
            return rules.MODULES[kind]
    return None


def _interval_forward(module: Any, box: Box, *, sound: bool = False) -> Box:
    made = module.interval_forward(*box, sound=sound)
    if not (isinstance(made, tuple) and len(made) == 2 and made[0].shape == made[1].shape):
        raise ValueError(
            f"{type(module).__name__}.interval_forward must return a center and a radius of one shape"
        )
    return checked_box(*made)


def _same_forward(kind: type, base: type) -> bool:
    """Whether a subclass computes what its base does: a parametrised layer does."""
    return kind.forward is base.forward  # type: ignore[attr-defined]


class _Root(nn.Module):
    """Above the model, so that tensors of the model's own are a child's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def traced_through(model: nn.Module) -> list[nn.Module]:
    """The modules whose own code makes the graph."""
    tracer = _Tracer()
    return [m for name, m in model.named_modules() if not tracer.is_leaf_module(m, name)]


class Network:
    """The graph of a network from one tensor to one tensor, in the modes that its modules are in."""

    def __init__(self, model: nn.Module) -> None:
        if own_rule(model) is not None:
            # A tracer goes into what it is given.
            model = nn.Sequential(model).train(model.training)
        try:
            self.graph = _Tracer().trace(model)
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} could not be traced with torch.fx: {error}"
            ) from error
        self.root = _Root(model)
        self.boxed = self._find_boxed()
        self.output = self._find_output()
        self._check_writes()
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
            if depends and node.op != "output" and not _is_of_shape(node):
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
        alone = node.op == "call_module" and len(node.users) == 1
        return node if alone and self.rule(node) is rules.linear_module else None

    def _check_writes(self) -> None:
        """Raises where a tensor is used after it was written to under another name: rules compute
        anew, and would give it as it was."""
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        names: dict[fx.Node, list[fx.Node]] = {}
        """The nodes that may share memory with a node, itself among them."""
        for node in self.graph.nodes:
            if node not in self.boxed:
                continue
            names[node] = [node]
            written = self._writes(node)
            if not (written or self._may_alias(node)):
                continue
            source = next(used for used in node.all_input_nodes if used in self.boxed)
            if written:
                for name in names[source]:
                    for user in name.users:
                        if order[user] > order[node]:
                            raise NotImplementedError(
                                f"no interval rule for node {node.name!r}, which writes to what node "
                                f"{user.name!r} reads; let it return a new tensor"
                            )
            names[node] = names[source]
            names[node].append(node)

    def _writes(self, node: fx.Node) -> bool:
        """Whether it changes its input."""
        if node.op == "call_module":
            return bool(getattr(self.module(node), "inplace", False))
        if node.op == "call_method":
            return str(node.target).endswith("_")
        return node.target in _IN_PLACE or bool(_option(node, "inplace"))

    def _may_alias(self, node: fx.Node) -> bool:
        """Whether its result may be its input, or a part of it."""
        try:
            return self.rule(node) in rules.ALIASES
        except NotImplementedError:
            return False

    def module(self, node: fx.Node) -> nn.Module:
        return self.root.model.get_submodule(str(node.target))

    def last_layer(self) -> nn.Module | None:
        return None if self.head is None else self.module(self.head)

    def rule(self, node: fx.Node) -> rules.Rule:
        """What a node makes of a box."""
        target: Any = node.target
        if node.op == "call_module":
            module = self.module(node)
            found, name = own_rule(module), f"{type(module).__name__} ({target})"
            if module._forward_pre_hooks or module._forward_hooks:
                raise NotImplementedError(
                    f"no interval rule for the hooks of {name}; torch.nn.utils.parametrizations has "
                    "weight_norm and spectral_norm without, and prune.remove makes pruning permanent"
                )
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
        return node in self.boxed and self.rule(node) in (rules.relu, rules.relu_module)


def _option(node: fx.Node, name: str) -> Any:
    """An argument of a function's call, by name or not; None where there is none."""
    try:
        names = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # built in
        return node.kwargs.get(name)
    at = names.index(name) if name in names else len(node.args)
    return node.args[at] if at < len(node.args) else node.kwargs.get(name)


def _is_of_shape(node: fx.Node) -> bool:
    """Whether a node tells of a tensor's shape or kind, not of its values."""
    if node.op == "call_method":
        return node.target in _SHAPE_METHODS
    return node.target is getattr and node.args[1] in _SHAPE_ATTRIBUTES
