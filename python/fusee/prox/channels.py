"""Channels of the layers of a model, and what stands against cutting them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PRODUCERS = (nn.Linear, nn.Embedding, *CONVOLUTIONS, *TRANSPOSED)
BATCH_NORMS = nn.modules.batchnorm._BatchNorm
INSTANCE_NORMS = nn.modules.instancenorm._InstanceNorm


class Place(NamedTuple):
    """The channels that a module puts out or takes in, or those of a parameter of its own."""

    name: str
    side: str
    """``"out"``, ``"in"`` or ``"parameter"``, whose ``name`` is that of the parameter."""
    dim: int = 0
    """The dimension of the parameter."""


@dataclass
class Coupling:
    """Units that are cut out one by one, each in all its places.

    ``ids`` has for each place the number of the unit of each channel, -1 for those in none.
    """

    units: int
    ids: dict[Place, Tensor]
    layers: tuple[str, ...]
    """The layers that make the channels."""
    head_counts: tuple[str, ...] = ()
    """The attributes that count the units, where these are attention heads."""

    def owned(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter, int, Tensor]]:
        """The parameters that make the units: name, parameter, dimension, unit of each slice."""
        for place, ids in self.ids.items():
            if place.side == "parameter":
                yield place.name, model.get_parameter(place.name), place.dim, ids
            elif place.side == "out":
                module = model.get_submodule(place.name)
                for attribute, dim in owned_attributes(module):
                    yield (
                        f"{place.name}.{attribute}".lstrip("."),
                        getattr(module, attribute),
                        dim,
                        ids,
                    )


def owned_attributes(module: nn.Module) -> list[tuple[str, int]]:
    """The parameters of a module that make its channels, and the dimension of those.

    A ``PReLU`` has none here: whatever its slope is, it makes zero of zero.
    """
    if isinstance(module, nn.PReLU):
        return []
    dim = 0
    if isinstance(module, nn.Embedding) or (isinstance(module, TRANSPOSED) and module.groups == 1):
        dim = 1
    attributes = [("weight", dim), ("bias", 0)]
    return [(name, dim) for name, dim in attributes if getattr(module, name, None) is not None]


def call(model: nn.Module, example_inputs: Any) -> Any:
    """The outputs for example inputs as the public functions take them."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return model(*example_inputs)
    return model(example_inputs)


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in nested dicts, lists and tuples, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in tensors_of(part)]
    return []


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Nested dicts, lists and tuples with each of their tensors changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(part, change) for key, part in value.items()}
    return (
        [map_tensors(part, change) for part in value] if isinstance(value, (tuple, list)) else value
    )


def check_model(model: Any, example_inputs: Any) -> None:
    """Raises unless there is a model with weights, and something to run it on."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a Module, got {type(model).__name__}")
    if not tensors_of(example_inputs):
        raise TypeError(
            "example_inputs must be a Tensor, or a tuple or dict with the arguments of the model, got "
            f"{type(example_inputs).__name__}"
        )
    for name, parameter in model.named_parameters():
        if is_lazy(parameter) or parameter.is_meta:
            raise ValueError(f"{name} must have values, but is not initialised yet")
        if hasattr(parameter, "full_tensor"):
            raise ValueError(f"{name} must not be sharded: give the model before it is sharded")


def check_ignored(model: nn.Module, ignored: Iterable[str | nn.Module]) -> set[str]:
    """The names of the ignored layers and of all their parts."""
    names = {module: name for name, module in model.named_modules()}
    modules = dict(model.named_modules(remove_duplicate=False))
    if isinstance(ignored, (str, nn.Module)):
        raise TypeError("ignored must be a list of names or modules, not one alone")
    chosen = set()
    for layer in ignored:
        module = modules.get(layer) if isinstance(layer, str) else layer
        if not isinstance(module, nn.Module) or module not in names:
            shown = repr(layer) if isinstance(layer, str) else type(layer).__name__
            raise ValueError(f"ignored must be layers of the model or their names, got {shown}")
        chosen |= {names[part] for part in module.modules()}
    return chosen


def check_heads(model: nn.Module, heads: Mapping[str, str] | None) -> dict[str, int]:
    """The number of heads that each layer named in ``heads`` has at present."""
    counts = {}
    modules = dict(model.named_modules())
    for layer, path in (heads or {}).items():
        if not isinstance(modules.get(layer), nn.Linear):
            raise ValueError(f"heads must have the names of linear layers, got {layer!r}")
        owner, _, attribute = path.rpartition(".")
        count = getattr(modules.get(owner), attribute, None)
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(
                f"heads must name an attribute that counts the heads of {layer}, got {path!r}"
            )
        counts[layer] = count
    return counts


def problems_of(model: nn.Module, trained: bool) -> dict[Place, str]:
    """What is wrong with cutting channels, by place."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{name}.{attribute}".lstrip("."))
    problems: dict[Place, str] = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        either = out = None
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            either = f"{name} ({kind}) takes its statistics over channels"
        elif isinstance(module, (BATCH_NORMS, INSTANCE_NORMS)) and not module.affine:
            out = f"{name} ({kind}) has no scale and shift: it makes something of zero"
        elif isinstance(module, nn.MultiheadAttention):
            either = f"{name} ({kind}) has as many channels inside as outside"
        elif isinstance(module, nn.LSTM):
            out = f"{name} ({kind}) feeds its channels back"
        elif isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)) and module.groups > 1:
            depthwise = module.groups == module.out_channels == module.in_channels
            if not depthwise and (module.groups == module.out_channels or module.transposed):
                either = f"{name} ({kind}) has groups that are not cut"
        if parametrize.is_parametrized(module):
            either = f"{name} has a parametrisation: fold it first"
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            full = f"{name}.{attribute}".lstrip(".")
            others = [other for other in owners[id(parameter)] if other != full]
            if others:
                either = f"{full} is shared with {others[0]}"
                problems.update(
                    {Place(full, "parameter", d): either for d in range(parameter.dim())}
                )
            elif trained and not parameter.requires_grad:
                frozen = f"{full} is frozen"
                problems.update(
                    {Place(full, "parameter", d): frozen for d in range(parameter.dim())}
                )
                if attribute in dict(owned_attributes(module)):
                    out = out or frozen
        for side, reason in (("out", either or out), ("in", either)):
            if reason is not None:
                problems[Place(name, side)] = reason
    return problems
